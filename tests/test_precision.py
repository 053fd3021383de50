"""Number formats: bfloat16 only where the GPU has it; TF32 while something computes, unless the user says otherwise."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from pixelgrow import precision
from pixelgrow.diffusion.heldout import denoising_error
from pixelgrow.diffusion.sampling import generate, sample
from pixelgrow.editing import edits
from pixelgrow.models.cond import Cond
from pixelgrow.onestep.estimator import described
from pixelgrow.onestep.pairs import Ode

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`gpu(bf16)`: as if there were a GPU, with bfloat16 or not."""

    def pretend(bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)

    return pretend


@pytest.mark.parametrize(
    ("setting", "device", "has", "expected", "word"),
    [
        ("auto", GPU, True, torch.bfloat16, ""),
        ("auto", GPU, False, torch.float32, "this GPU has no bfloat16: training in float32"),
        ("auto", CPU, True, torch.float32, ""),
        ("fp32", GPU, True, torch.float32, ""),
        ("fp32", GPU, False, torch.float32, ""),
        ("bf16", GPU, True, torch.bfloat16, ""),
        ("bf16", GPU, False, torch.bfloat16, "precision: bf16 is emulated by this GPU"),
        ("bf16", CPU, False, torch.bfloat16, ""),
    ],
)
def test_training_is_in_bfloat16_where_the_gpu_has_it(
    gpu: Callable[[bool], None], caplog: pytest.LogCaptureFixture,
    setting: precision.Precision, device: torch.device, has: bool, expected: torch.dtype, word: str,
) -> None:  # fmt: skip
    gpu(has)
    with caplog.at_level(logging.INFO):
        assert precision.training_dtype(setting, device) == expected
    assert (word in caplog.text) if word else not caplog.text


def test_without_a_gpu_there_is_no_bfloat16_of_its_own() -> None:
    assert not precision.has_bf16()
    with precision.autocast(CPU, torch.float32):
        assert not torch.is_autocast_enabled("cpu")
    with precision.autocast(CPU, torch.bfloat16):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def products() -> tuple[str, str, str]:
    """Of matrix products on a GPU: by torch's newer interface, by its older one (which `torch.compile` reads); on a
    CPU."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision, torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision


UNSET, ON = ("none", "highest", "none"), ("tf32", "high", "none")


def test_tf32_lasts_as_long_as_something_computes(gpu: Callable[[bool], None]) -> None:
    with precision.tf32():
        assert products() == UNSET  # on a CPU nothing changes
    gpu(True)
    with precision.tf32():
        with precision.tf32():
            assert products() == ON
        assert products() == ON
    assert products() == UNSET
    with pytest.raises(RuntimeError), precision.tf32():
        raise RuntimeError
    assert products() == UNSET


def test_threads_share_it_and_the_last_one_restores_it(gpu: Callable[[bool], None]) -> None:
    gpu(True)
    entered, leave = threading.Event(), threading.Event()

    @precision.tf32()
    def work() -> None:
        entered.set()
        leave.wait(10)

    with precision.tf32():
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait(10)
    assert products() == ON
    leave.set()
    thread.join()
    assert products() == UNSET


@pytest.mark.parametrize("way", ["older", "newer", "all"])
def test_what_the_user_has_set_stands(gpu: Callable[[bool], None], way: str) -> None:
    gpu(True)
    if way == "older":
        torch.set_float32_matmul_precision("highest")
    elif way == "newer":
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    else:
        torch.backends.fp32_precision = "ieee"
    try:
        before = products()
        with precision.tf32():
            assert products() == before
        assert products() == before
    finally:
        torch.backends.fp32_precision = "none"


class Watching:
    """A denoiser and a generator that note how products are computed when they are called."""

    sigma_min, sigma_max, noise_scale = 0.1, 1.0, 1.0

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, str]] = set()

    def __call__(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        self.seen.add(products())
        return 0.5 * x

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size


COND = Cond(None, None, None, torch.zeros(2, dtype=torch.bool))
X = torch.zeros(2, 3, 4, 4)
ODE = Ode("heun", 3, 0.1, 1.0)
WORK: dict[str, Callable[[Watching], object]] = {
    "sample": lambda net: sample(net, COND, size=(4, 4), steps=2),
    "generate": lambda net: generate(net, COND, size=(4, 4)),
    "held-out error": lambda net: denoising_error(net, X, COND, scale=1.0),
    "pairs, inverted": lambda net: ODE.to_latent(net, X),
    "pairs, sampled": lambda net: ODE.to_image(net, X),
    "round trip": lambda net: ODE.round_trip(net, X),
}


@pytest.mark.parametrize("name", WORK)
def test_inference_computes_in_it(gpu: Callable[[bool], None], name: str) -> None:
    gpu(True)
    net = Watching()
    WORK[name](net)
    assert net.seen == {ON}
    assert products() == UNSET


class Stop(Exception):
    pass


def first(*_: object) -> None:
    """The first thing that a function computes with."""
    raise Stop(products())


first.teacher = SimpleNamespace(resolution=4)
BEGINNING: dict[str, Callable[[], object]] = {
    "inpaint": lambda: edits.inpaint(None, X, X, "a"),
    "upscale": lambda: edits.upscale(None, X, "a"),
    "transfer": lambda: edits.transfer(None, X, "a", "b"),
    "interpolate": lambda: edits.interpolate(None, "a"),
    "features": lambda: described(first, X, COND),
}


@pytest.mark.parametrize("name", BEGINNING)
def test_edits_and_features_compute_in_it(
    gpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    gpu(True)
    for called in ("pixels_of", "stack", "check_space"):
        monkeypatch.setattr(edits, called, first)
    with pytest.raises(Stop) as stopped:
        BEGINNING[name]()
    assert stopped.value.args == (ON,)
    assert products() == UNSET
