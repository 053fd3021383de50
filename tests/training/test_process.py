"""What a run sets in its process: denormals, random numbers, recompilation; all of it as before when the run ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import training_toy as toy
from pixelgrow.errors import UserError
from pixelgrow.training import cpu, monitor, process


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "matmul_rate", lambda *_: 1e11)


def kept() -> float:
    """The share of denormal numbers that arithmetic keeps: 1 or 0, in between where threads differ."""
    x = torch.full((1 << 20,), 1e-40)
    return int((x * 1.0).count_nonzero()) / len(x)


def test_denormals_are_flushed_in_every_thread_and_kept_again_afterwards() -> None:
    assert kept() == 1
    assert cpu.flush_denormals() >= 1
    assert kept() == 0
    with cpu.denormals_flushed():
        assert kept() == 0
    assert kept() == 0  # as before
    cpu.flush_denormals(False)
    with pytest.raises(RuntimeError, match="within"), cpu.denormals_flushed():
        assert kept() == 0
        raise RuntimeError("within")
    assert kept() == 1


@pytest.mark.parametrize("poison", [frozenset(), frozenset(range(96))])
def test_training_leaves_the_process_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: frozenset[int]
) -> None:
    monkeypatch.setattr(cpu, "tune_allocator", pytest.fail)  # cannot be undone: for a process of our own
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic: None)
    from torch._dynamo import config

    objective = toy.Toy(poison)
    before = torch.get_rng_state(), config.recompile_limit
    during: list[tuple[float, int]] = []

    def look(_: int) -> dict[str, float]:
        during.append((kept(), config.recompile_limit))
        return {}

    hook = monitor.Hook("look", 8, look, at_start=True)
    try:
        toy.run(tmp_path, objective, hooks=(hook,), compile=True, max_bad_steps=3)
    except UserError:
        assert poison
    assert set(during) == {(0.0, process.RECOMPILES)}
    assert kept() == 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert config.recompile_limit == before[1] < process.RECOMPILES


def test_the_command_line_tunes_its_own_process(run_cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(cpu, "tune_allocator", lambda: done.append("tuned"))
    monkeypatch.setattr("pixelgrow.run.run", lambda recipe, runs, team: done.append("run") or runs / "report.html")
    assert run_cli("run", "smoke", "--runs", tmp_path).code == 0
    assert done == ["tuned", "run"]


def test_training_and_its_hooks_compute_in_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen: list[str] = []

    def rate(*_: object) -> float:  # the speed of training is a share of it
        seen.append(torch.get_float32_matmul_precision())
        return 1e11

    monkeypatch.setattr(monitor, "matmul_rate", rate)

    class Watching(toy.Toy):
        def loss(self, batch, part):
            seen.append(torch.get_float32_matmul_precision())
            return super().loss(batch, part)

    hook = monitor.Hook("look", 8, lambda _: {"x": seen.append(torch.get_float32_matmul_precision()) or 0.0})
    toy.run(tmp_path, Watching(), hooks=(hook,))
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"
