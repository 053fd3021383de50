"""Settings, learning rate, and which tensors an optimizer takes."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pixelgrow.training.optim import optimizers, rate, restore, set_rate
from pixelgrow.training.settings import TrainSettings


def test_lengths_left_out_are_filled_in() -> None:
    s = TrainSettings(images=200_000)
    assert (s.warmup, s.log_every, s.save_every, s.validate_every) == (10_000, 1_000, 10_000, 20_000)
    s = TrainSettings(images=100, batch=32, warmup=0, sample_every=0)
    assert (s.warmup, s.log_every, s.save_every, s.sample_every) == (0, 32, 32, 0)
    assert TrainSettings(**s.model_dump()) == s
    assert TrainSettings(images=64, batch=32, accumulate=4).micro_batch == 8


def test_periods_left_out_are_bounded_by_steps() -> None:
    """A share of 512 million images alone would be a line every 10,000 steps and a save every 100,000."""
    s = TrainSettings(images=2_000_000 * 256, batch=256)
    periods = (s.log_every, s.save_every, s.validate_every, s.sample_every, s.snapshot_every)
    assert [n / s.batch for n in map(int, periods)] == [100, 10_000, 2_000, 5_000, 100_000]
    assert TrainSettings(images=2_000_000 * 256, batch=256, log_every=10**6).log_every == 10**6


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"batch": 10, "accumulate": 4}, "multiple of accumulate"),
        ({"ema": (0.4,)}, "between 0 and 0.289"),
        ({"ema": (0.1, 0.1)}, "distinct"),
        ({"betas": (0.9, 1.0)}, r"\[0, 1\)"),
        ({"learning_rate": 1}, "not permitted"),
        ({"decay": "inverse_sqrt", "warmup": 0}, "warmup: got 0 with decay: inverse_sqrt"),
        ({"noise": {"kind": "cosine", "mean": 0.5}}, "mean: got 0.5 with kind cosine"),
        ({"noise": {"kind": "interpolated", "std": 2}}, "std: got 2.0 with kind interpolated"),
        ({"noise": {"finest": 2}}, "finest: got 2.0 with kind lognormal"),
        ({"images": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bad: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainSettings(**({"images": 100} | bad))


def test_rates() -> None:
    s = TrainSettings(images=1000, warmup=100, decay="cosine")
    assert [rate(x, s) for x in (0, 50, 100)] == [0, 0.5, 1]
    assert rate(550, s) == pytest.approx(0.5)
    assert rate(1000, s) == pytest.approx(0)
    s = TrainSettings(images=1000, warmup=100, decay="inverse_sqrt")
    assert rate(400, s) == pytest.approx(0.5)
    assert rate(50, s) == pytest.approx(0.5)
    s = TrainSettings(images=1000, warmup=0, decay="constant")
    assert rate(0, s) == rate(999, s) == 1


def test_noise_is_read_back_as_it_was_written() -> None:
    s = TrainSettings(images=100, noise={"kind": "interpolated", "finest": 2})
    assert TrainSettings(**s.model_dump()) == s


@pytest.mark.parametrize(
    ("decay", "warmup"),
    [(d, w) for d in ("cosine", "constant", "inverse_sqrt") for w in (0, 1, 10, 100) if w or d != "inverse_sqrt"],
)
def test_rates_stay_in_range(decay: str, warmup: int) -> None:
    s = TrainSettings(images=100, warmup=warmup, decay=decay)
    assert all(0 <= rate(x / 2, s) <= 1 for x in range(400))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Embedding(6, 5), nn.LayerNorm(5))


def test_frozen_tensors_are_left_out_and_one_dimension_is_not_decayed() -> None:
    module = net()
    module[1].requires_grad_(False)
    (adamw,) = optimizers(module, TrainSettings(images=1, weight_decay=0.3))
    assert adamw.defaults["fused"]
    groups = {g["weight_decay"]: {id(p) for p in g["params"]} for g in adamw.param_groups}
    assert groups[0.3] == {id(module[0].weight), id(module[2].weight)}
    assert groups[0.0] == {id(module[0].bias), id(module[3].weight), id(module[3].bias)}


def test_muon_takes_the_matrices_of_linear_layers() -> None:
    module = net()
    muon, adamw = optimizers(module, TrainSettings(images=1, optimizer="muon"))
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(module[1].weight)]
    taken = [id(p) for opt in (muon, adamw) for g in opt.param_groups for p in g["params"]]
    assert sorted(taken) == sorted(id(p) for p in module.parameters())
    set_rate([muon, adamw], 0.25)
    assert {g["lr"] for opt in (muon, adamw) for g in opt.param_groups} == {0.25}


def test_fused_adamw_is_adamw() -> None:
    """Against the update written out (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""
    module = nn.Linear(3, 2, bias=False)
    s = TrainSettings(images=1, lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    (adamw,) = optimizers(module, s)
    w, m, v = module.weight.detach().double().clone(), 0.0, 0.0
    for t in range(1, 6):
        g = torch.randn(2, 3)
        module.weight.grad = g.clone()
        adamw.step()
        m, v = 0.8 * m + 0.2 * g.double(), 0.9 * v + 0.1 * g.double() ** 2
        w = w * (1 - 0.1 * 0.5) - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
    torch.testing.assert_close(module.weight.detach().double(), w, rtol=1e-5, atol=1e-6)
    assert math.isfinite(float(w.sum()))


@pytest.mark.parametrize("name", ["radam", "adamw", "muon"])
def test_restored_state_is_where_the_optimizer_creates_it(name: str) -> None:
    """`meta` stands in for a GPU: a state of a CPU's run is restored beside parameters of another device."""
    settings = TrainSettings(images=1, optimizer=name)
    here = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))
    away = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 3)).to("meta")
    away[1].to(memory_format=torch.channels_last)
    for p in [*here.parameters(), *away.parameters()]:
        p.grad = torch.ones_like(p)
    for ours, theirs in zip(optimizers(here, settings), optimizers(away, settings), strict=True):
        fused = bool(theirs.defaults.get("fused"))
        ours.step()
        ours.step()
        theirs.step()  # creates each slot
        created = {p: dict(slots) for p, slots in theirs.state.items()}
        pairs = [(p, q) for g, h in zip(theirs.param_groups, ours.param_groups, strict=True)
                 for p, q in zip(g["params"], h["params"], strict=True)]  # fmt: skip
        restore(theirs, {p: {slot: t.contiguous() for slot, t in ours.state[q].items()} for p, q in pairs})
        for p, q in pairs:
            assert theirs.state[p].keys() == created[p].keys() == ours.state[q].keys()
            for slot, t in theirs.state[p].items():
                want = created[p][slot]
                assert (t.device, t.dtype, t.shape, t.stride()) == (want.device, want.dtype, want.shape, want.stride())
                assert t.device.type == ("cpu" if slot == "step" and not fused else "meta")
            if not fused and "step" in theirs.state[p]:
                assert float(theirs.state[p]["step"]) == 2


def test_restored_state_has_memory_of_its_own() -> None:
    module = nn.Linear(3, 4)
    (adamw,) = optimizers(module, TrainSettings(images=1))
    kept = {p: {"step": torch.tensor(1.0), "exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
            for group in adamw.param_groups for p in group["params"]}  # fmt: skip
    restore(adamw, kept)
    for p in kept:
        p.grad = torch.ones_like(p)
    adamw.step()
    assert all(float(slots["step"]) == 1 and bool((slots["exp_avg"] == 1).all()) for slots in kept.values())
