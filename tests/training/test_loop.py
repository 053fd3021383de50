"""The loop: exact resume, skipped steps, signals, frozen tensors, hooks that change nothing."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import training_toy as toy
from pixelgrow.errors import UserError
from pixelgrow.training import loop, monitor, periods, state
from pixelgrow.training.loop import Interrupted
from pixelgrow.training.monitor import Hook
from pixelgrow.training.objective import Terms
from pixelgrow.training.saving import Saver

TOY = Path(toy.__file__)


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "matmul_rate", lambda *_: 1e11)


class Stop(Exception):
    pass


def stop_at(images: int) -> Hook:
    def run(now: int) -> dict[str, float]:
        if now == images:
            raise Stop
        return {}

    return Hook("stop", 8, run)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def results(folder: Path) -> list[dict[str, float]]:
    """What a log says of the training itself, without times and speeds."""
    kept = ("images", "loss", "grad_norm", "lr", "sigma_mean", "skipped", "validation/error")
    return [{k: v for k, v in r.items() if k in kept} for r in lines(folder)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 2}, {"optimizer": "muon"}, {"optimizer": "radam"}, {"clip": 0.01, "decay": "inverse_sqrt"}],
)
def test_stopped_and_resumed_is_the_same_bytes(tmp_path: Path, changes: dict) -> None:
    whole, cut = toy.Toy(), None
    expected = toy.weights(whole, toy.run(tmp_path / "whole", whole, **changes))
    for at in (8, 40, 56, 88):
        with pytest.raises(Stop):
            toy.run(tmp_path / "cut", toy.Toy(), hooks=(stop_at(at),), **changes)
    cut = toy.Toy()
    result = toy.run(tmp_path / "cut", cut, **changes)
    assert (result.images, result.steps, result.skipped) == (96, 12, 0)
    same(toy.weights(cut, result), expected)
    assert {r["images"] for r in results(tmp_path / "whole")} == {0, 16, 32, 48, 64, 80, 96}
    assert results(tmp_path / "whole") == results(tmp_path / "cut")


def test_saves_by_the_clock_change_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = toy.Toy()
    expected = toy.weights(whole, toy.run(tmp_path / "whole", whole, save_every=96))
    monkeypatch.setattr(periods, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(periods, "SAVE_SHARE", math.inf)
    for at in (24, 56):  # neither is a multiple of save_every
        with pytest.raises(Stop):
            toy.run(tmp_path / "cut", toy.Toy(), hooks=(stop_at(at),), save_every=96)
        saved = state.load(tmp_path / "cut" / "state")
        assert saved is not None
        assert saved.counters["images"] == at
    rest = toy.Toy()
    same(toy.weights(rest, toy.run(tmp_path / "cut", rest, save_every=96)), expected)
    assert rest.seen[0] == 56
    assert results(tmp_path / "whole") == results(tmp_path / "cut")


def test_steps_go_on_while_a_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = toy.Toy()
    expected = toy.weights(whole, toy.run(tmp_path / "whole", whole))
    later, waited, store = threading.Event(), [], state._store

    def slow(path: Path, *rest: Any) -> None:
        waited.append(later.wait(20))
        store(path, *rest)

    def step(images: int) -> dict[str, float]:
        if images == 40:
            later.set()
            raise Stop
        return {}

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(state, "_store", slow)
        toy.run(tmp_path / "cut", toy.Toy(), hooks=(Hook("step", 8, step),), snapshot_every=0)
    assert waited == [True]
    rest = toy.Toy()
    same(toy.weights(rest, toy.run(tmp_path / "cut", rest)), expected)
    assert rest.seen[0] == 24


def test_a_state_that_cannot_be_written_ends_the_run_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, toys = state._store, toy.Toy()

    def full(path: Path, *rest: Any) -> None:
        if path.parent.name == ".24.part":
            raise OSError(errno.ENOSPC, "No space left on device")
        store(path, *rest)

    def settle(self: loop.Training, micro: Any, real: Any = loop.Training.step) -> None:
        if self.saver.flight is not None:
            self.saver.flight[2].exception()
        real(self, micro)

    monkeypatch.setattr(state, "_store", full)
    monkeypatch.setattr(loop.Training, "step", settle)
    with pytest.raises(UserError, match="No space left on device; make room there"):
        toy.run(tmp_path, toys, save_every=24)
    assert max(toys.seen) == 31


def test_slow_steps_are_logged_by_the_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, slow = toy.Toy(), toy.Toy()
    expected = toy.weights(whole, toy.run(tmp_path / "whole", whole, log_every=96))
    monkeypatch.setattr(periods, "LOG_SECONDS", 0.0)
    same(toy.weights(slow, toy.run(tmp_path / "slow", slow, log_every=96)), expected)
    (mean,), steps = ([r["loss"] for r in lines(tmp_path / name) if "loss" in r] for name in ("whole", "slow"))
    assert len(steps) == 12 and sum(steps) / 12 == pytest.approx(mean, rel=1e-4)


def test_a_save_sets_the_clock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, saves = 0.0, []
    start = Saver.start

    def slow(saver: Saver, images: int, *rest: Any) -> None:
        nonlocal now
        now += 60
        saves.append(images)
        start(saver, images, *rest)

    def step(_: int) -> dict[str, float]:
        nonlocal now
        now += 300
        return {}

    monkeypatch.setattr(loop, "SaveClock", lambda: periods.SaveClock(lambda: now))
    monkeypatch.setattr(Saver, "start", slow)
    toy.run(tmp_path, hooks=(Hook("step", 8, step, at_start=True),), save_every=96)
    assert saves == [24, 56, 88, 96]  # after 900 s; then every 1,200 s, as a save takes 60 s


def test_the_clock_asks_for_a_save_every_quarter_of_an_hour_or_less_often_where_saving_is_slow() -> None:
    now = 0.0
    clock = periods.SaveClock(lambda: now)

    def wait() -> float:
        nonlocal now
        began = now
        while not clock.due:
            now += 1
        return now - began

    assert wait() == 900
    began, now = now, now + 10
    clock.saved(began)
    assert not clock.due
    assert wait() == 900
    began, now = now, now + 100
    clock.saved(began)
    assert wait() == 2000  # 5% of the time


def test_a_finished_run_runs_no_step_again(tmp_path: Path) -> None:
    first = toy.Toy()
    expected = toy.weights(first, toy.run(tmp_path, first))
    again = toy.Toy()
    same(toy.weights(again, toy.run(tmp_path, again)), expected)
    assert not again.seen


def test_it_learns_and_logs(tmp_path: Path) -> None:
    toy.run(tmp_path, images=800, lr=1e-2)
    records = [r for r in lines(tmp_path) if "loss" in r]
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    assert {
        "lr",
        "grad_norm",
        "sigma_mean",
        "images_per_second",
        "waited",
        "matmul_share",
        "memory_mib",
        "skipped",
    } <= records[0].keys()
    assert any((tmp_path / "tensorboard").iterdir())


def test_accumulation_sees_the_same_images(tmp_path: Path) -> None:
    one, two = toy.Toy(), toy.Toy()
    toy.run(tmp_path / "1", one)
    toy.run(tmp_path / "2", two, accumulate=4)
    assert one.seen == two.seen == list(range(96))


def test_hooks_change_nothing(tmp_path: Path) -> None:
    quiet, busy = toy.Toy(), toy.Toy()
    a = toy.weights(quiet, toy.run(tmp_path / "a", quiet, validate_every=0))
    assert busy.modules["net"].training

    def look(images: int) -> dict[str, float]:
        assert not busy.modules["net"].training
        assert not torch.is_grad_enabled()
        torch.manual_seed(images)
        return {"x": float(torch.rand(()))}

    b = toy.weights(busy, toy.run(tmp_path / "b", busy, hooks=(Hook("look", 8, look),), validate_every=8))
    same(a, b)


def test_frozen_tensors_stay_and_have_no_state(tmp_path: Path) -> None:
    frozen = toy.Toy(frozen=True)
    before = frozen.modules["net"][0].weight.clone()
    result = toy.run(tmp_path, frozen)
    assert torch.equal(before, frozen.modules["net"][0].weight)
    assert frozen.modules["net"][0].weight.grad is None
    saved = state.load(tmp_path / "state")
    assert saved is not None
    assert not [n for n in saved.tensors if n.endswith("0.weight")]
    average = result.averages["net"][0].state_dict()
    assert average["0.weight"].data_ptr() == frozen.modules["net"][0].weight.data_ptr()
    frozen.modules["net"].requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        toy.run(tmp_path / "x", frozen)


class Joining(toy.Toy):
    """One run that the first layer joins after 48 images."""

    def loss(self, batch, part: str) -> Terms:
        self.modules[part][0].requires_grad_(int(batch.index[0]) >= 48)
        return super().loss(batch, part)


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_two_phases_are_one_run_that_more_tensors_join(tmp_path: Path, optimizer: str) -> None:
    whole, last = Joining(), toy.Toy()
    expected = toy.weights(whole, toy.run(tmp_path / "whole", whole, optimizer=optimizer))
    first, second = tmp_path / "first", tmp_path / "second"
    for at in (16, 40):
        with pytest.raises(Stop):
            toy.run(first, toy.Toy(frozen=True), hooks=(stop_at(at),), stop_at=42, optimizer=optimizer)
    assert toy.run(first, toy.Toy(frozen=True), stop_at=42, optimizer=optimizer).images == 48
    for at in (56, 80):
        with pytest.raises(Stop):
            toy.run(second, toy.Toy(), hooks=(stop_at(at),), after=first, optimizer=optimizer)
    result = toy.run(second, last, after=first, optimizer=optimizer)
    assert (result.images, result.steps) == (96, 12)
    same(toy.weights(last, result), expected)
    rates = [[(r["images"], r["lr"]) for r in lines(tmp_path / f) if "lr" in r] for f in ("whole", "first", "second")]
    assert rates[0] == rates[1] + rates[2]


def test_a_bad_step_is_skipped_and_counted(tmp_path: Path) -> None:
    bad = toy.Toy(poison=frozenset([17, 50]))
    result = toy.run(tmp_path, bad)
    assert result.skipped == 2
    assert all(bool(t.isfinite().all()) for t in result.averages["net"][0].tensors.values())
    assert lines(tmp_path)[-2]["skipped"] == 2


def test_too_many_bad_steps_stop_and_keep_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 times in a row, last at step 9 .*noise levels 0\.\d+ to 1\.?\d*") as error:
        toy.run(tmp_path, toy.Toy(poison=frozenset(range(48, 96))), max_bad_steps=3)
    assert "\n" not in str(error.value)
    saved = state.load(tmp_path / "state")
    assert saved is not None
    assert saved.counters["images"] == 48
    result = toy.run(tmp_path)
    assert result.images == 96


class Still(toy.Toy):
    """Without buffers: a skipped step leaves nothing behind."""

    def __init__(self, poison: frozenset[int] = frozenset()) -> None:
        super().__init__(poison)
        self.modules["net"] = self.modules["net"][:4]


def test_bad_steps_leave_a_state_and_a_result_behind(tmp_path: Path) -> None:
    whole = Still()
    expected = toy.weights(whole, toy.run(tmp_path / "whole", whole))
    kept: list[tuple[Path, int]] = []
    folder, stopped = tmp_path / "cut", Still(poison=frozenset(range(40, 96)))
    with pytest.raises(UserError, match=r"replace this stage by .*, with from: that folder, and a lower lr$") as error:
        toy.run(folder, stopped, max_bad_steps=3, keep=lambda *what: kept.append(what))
    assert str(folder / "checkpoint") in str(error.value)
    assert kept == [(folder / "checkpoint", 40)]
    saved = state.load(folder / "state")
    assert saved is not None
    assert saved.counters["images"] == 40  # 24 is the last round number
    rest = Still()
    same(toy.weights(rest, toy.run(folder, rest)), expected)
    assert [r["images"] for r in lines(folder)] == [r["images"] for r in lines(tmp_path / "whole")]


def test_bad_steps_from_the_start_keep_nothing(tmp_path: Path) -> None:
    words = r"^not finite 3 times .* no step before was good: delete .*cut and begin again with a lower lr"
    with pytest.raises(UserError, match=words + "$"):
        toy.run(tmp_path / "cut", Still(poison=frozenset(range(96))), max_bad_steps=3, keep=pytest.fail)
    with pytest.raises(UserError, match=words + ", or precision: fp32$"):
        toy.run(tmp_path / "cut", Still(poison=frozenset(range(96))), max_bad_steps=3, precision="bf16")
    assert state.load(tmp_path / "cut" / "state") is None


def test_bad_data_leave_a_state_and_a_result_behind(tmp_path: Path) -> None:
    whole, kept = toy.Toy(), {}
    expected = toy.weights(whole, toy.run(tmp_path / "whole", whole))

    def broken(start: int, step: int) -> Iterator[object]:
        for batch in toy.stream(8)(start, step):
            if int(batch.index[0]) == 56:
                raise UserError("too many files are bad")
            yield batch

    def keep(where: Path, images: int) -> None:
        kept[images] = {n: t.clone() for n, t in cut.modules["net"].state_dict().items()}

    cut = toy.Toy()
    with pytest.raises(UserError, match="too many files are bad"):
        toy.run(tmp_path / "cut", cut, batches=broken, keep=keep)
    saved = state.load(tmp_path / "cut" / "state")
    assert saved is not None
    assert torch.equal(kept[56]["0.weight"], saved.read()["ema/0.05/net/0.weight"])
    rest = toy.Toy()
    same(toy.weights(rest, toy.run(tmp_path / "cut", rest)), expected)


def test_a_full_disk_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    whole = toy.Toy()
    expected = toy.weights(whole, toy.run(tmp_path / "whole", whole))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; make room there") as error:
            toy.run(tmp_path / "full", snapshot_every=0)
    assert "\n" not in str(error.value)
    saved = state.load(tmp_path / "full" / "state")
    assert saved is not None
    assert 0 < saved.counters["images"] < 96
    assert not list((tmp_path / "full" / "state").glob(".*"))
    later = toy.Toy()
    same(toy.weights(later, toy.run(tmp_path / "full", later, snapshot_every=0)), expected)


def test_another_network_is_refused(tmp_path: Path) -> None:
    toy.run(tmp_path)
    other = toy.Toy()
    other.modules["net"].add_module("5", torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(UserError, match="is of another network"):
        toy.run(tmp_path, other)


@pytest.mark.parametrize("kind", ["weights/", "optimizer/"])
def test_a_state_of_another_precision_is_refused(tmp_path: Path, kind: str) -> None:
    toy.run(tmp_path)
    saved = state.load(tmp_path / "state")
    assert saved is not None
    tensors = {n: t.half() if n.startswith(kind) else t.clone() for n, t in saved.read().items()}
    state.save(tmp_path / "state", saved.counters["images"], tensors, saved.counters)
    with pytest.raises(UserError, match=f"of another precision: .*{kind}") as error:
        toy.run(tmp_path)
    assert "\n" not in str(error.value)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def _heeded() -> Iterator[None]:
    """Signals have their usual effect, even if a shell or nohup started the tests with some of them ignored."""

    def unheeded(signum: int, frame: object) -> None:
        raise AssertionError(f"signal {signum} is not heeded")

    was = [signal.signal(s, unheeded) for s in SIGNALS]
    yield
    for signum, handler in zip(SIGNALS, was, strict=True):
        signal.signal(signum, handler)


@pytest.mark.usefixtures("_heeded")
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, signum: int) -> None:
    handlers = [signal.getsignal(s) for s in SIGNALS]

    def shout(now: int) -> dict[str, float]:
        if now == 32:
            os.kill(os.getpid(), signum)
        return {}

    whole = toy.Toy()
    expected = toy.weights(whole, toy.run(tmp_path / "whole", whole))
    with pytest.raises(Interrupted, match="same command again") as stopped:
        toy.run(tmp_path / "cut", hooks=(Hook("shout", 8, shout),))
    assert stopped.value.status == 128 + signum
    assert [signal.getsignal(s) for s in SIGNALS] == handlers
    saved = state.load(tmp_path / "cut" / "state")
    assert saved is not None
    assert saved.counters["images"] == 40
    rest = toy.Toy()
    same(toy.weights(rest, toy.run(tmp_path / "cut", rest)), expected)


@pytest.mark.usefixtures("_heeded")
def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As nohup makes SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def shout(now: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGHUP)
        return {}

    toy.run(tmp_path, hooks=(Hook("shout", 8, shout),))
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_stop_amid_bad_steps_says_what_is_saved(tmp_path: Path) -> None:
    def shout(now: int) -> dict[str, float]:
        if now == 56:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Interrupted, match="saved at 48 images"):
        toy.run(tmp_path, toy.Toy(poison=frozenset(range(48, 96))), hooks=(Hook("shout", 8, shout),))


def test_two_networks_in_turn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in an adversarial objective: each part descends its own loss, and no gradient reaches the other's step."""

    class Pair(toy.Toy):
        def __init__(self) -> None:
            super().__init__()
            self.modules |= {"second": torch.nn.Conv2d(3, 3, 1)}
            self.rates |= {"second": 0.5}

        def loss(self, batch, part: str) -> Terms:
            first = self.modules["net"](batch.image)
            second = self.modules["second"](first if part == "net" else first.detach())
            loss = (second - batch.image).square().mean()
            assert all(p.grad is None for m in self.modules.values() for p in m.parameters())
            return Terms(loss if part == "net" else -loss.neg())

    pair = Pair()
    with caplog.at_level(logging.INFO):
        result = toy.run(tmp_path, pair)
    assert set(result.averages) == {"net", "second"}
    assert {"net/loss", "second/loss", "second/grad_norm"} <= lines(tmp_path)[-2].keys()
    assert f"loss {lines(tmp_path)[-2]['net/loss']:.4g}, " in caplog.text  # what is watched is the first part's
    again = Pair()
    toy.run(tmp_path, again)
    for part in pair.modules:
        same(pair.modules[part].state_dict(), again.modules[part].state_dict())


def test_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(TOY), str(tmp_path), "800", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert int(done.stdout) >= 2
    a, b = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("whole", "cut"))
    assert a == b
    seen = [r["images"] for r in lines(tmp_path / "cut") if "loss" in r]
    assert seen == list(range(8, 801, 8))


def test_half_precision_and_compiling_are_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[torch.nn.Module, bool]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic: compiled.append((module, dynamic)))
    half, full = toy.Toy(), toy.Toy()
    a = toy.weights(half, toy.run(tmp_path / "a", half, precision="bf16", compile=True))
    b = toy.weights(full, toy.run(tmp_path / "b", full))
    assert compiled == [(half.modules["net"], False)]
    assert all(t.dtype == b[n].dtype for n, t in a.items())
    assert not torch.equal(a["0.weight"], b["0.weight"])
    torch.testing.assert_close(a["0.weight"], b["0.weight"], atol=0.02, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_hooks_compute_in_the_precision_that_trains(tmp_path: Path, precision: str) -> None:
    half, seen = toy.Toy(), []
    look = Hook("look", 96, lambda _: seen.append(half.modules["net"][0](torch.rand(1, 3, 8, 8)).dtype) or {})
    toy.run(tmp_path, half, hooks=(look,), precision=precision)
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]


@pytest.mark.parametrize("batch", [8, 32])
def test_a_linear_warmup_has_the_same_mean_rate_in_steps_of_any_size(tmp_path: Path, batch: int) -> None:
    """A step has the rate of its middle. The sum of rates is then the integral: half the rate times the images."""
    toy.run(tmp_path, batch=batch, log_every=batch, warmup=96, decay="constant", lr=1e-3)
    rates = [r["lr"] for r in lines(tmp_path) if "lr" in r]
    assert len(rates) == 96 // batch
    assert sum(rates) / len(rates) == pytest.approx(1e-3 / 2)
