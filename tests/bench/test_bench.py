"""The benchmarks at their smallest: that they run, and that their arithmetic is right."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixelgrow import checkpoint
from pixelgrow.data.scenes.seeing import look
from pixelgrow.diffusion.generator import Generator
from pixelgrow.distributed import Team
from pixelgrow.growth import ungrown
from pixelgrow.model import find
from pixelgrow.models.uvit import UViT
from pixelgrow.stages import looks
from pixelgrow.stages import pairs as stages_of_pairs
from pixelgrow.writing import flush
from text_models import save_t5

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


# --- throughput -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["core", "preserve", "sample"])
def test_throughput_measures_a_case(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from bench import throughput

    case = f"tiny:{kind}:{16 if kind == 'core' else 64}"
    throughput.main(["--only", case, "--here", "--batch", "1", "--rounds", "2", "--gemm", "64", "--seconds", "0.001"])
    result = json.loads(capsys.readouterr().out)
    assert result["case"] == case
    assert len(result["shares"]) == 2 and result["share"] > 0
    assert result["images_per_s"] > 0 and result["gemm_gflops"] > 0
    assert case.split(":")[1] in throughput.table([result])


def test_throughput_counts_attention_and_not_what_is_frozen() -> None:
    from bench import throughput

    def flops(kind: str) -> float:
        under = throughput.Conditions("cpu", "fp32", False, batch=1, rounds=1, gemm=64, seconds=1e-3)
        return float(throughput.measure(throughput.Case("tiny", kind, 64), under)["gflop_per_image"])

    assert flops("preserve") < 0.75 * flops("random")


def test_throughput_refuses_what_is_no_case(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import throughput

    with pytest.raises(SystemExit):
        throughput.main(["--only", "tiny:random:32"])
    assert "grown ones above 32 px" in capsys.readouterr().err


def test_throughput_plots_cost_by_resolution(tmp_path: Path) -> None:
    from bench import throughput

    results: list[dict[str, Any]] = [
        {"size": "tiny", "kind": kind, "resolution": side, "images_per_s": 1e3 / side, "memory_mib": side, "batch": 1}
        for kind, side in (("core", 32), ("random", 64), ("preserve", 64))
    ]
    throughput.plot(results, tmp_path / "figures" / "throughput.png")
    assert (tmp_path / "figures" / "throughput.png").stat().st_size > 1000


# --- distribution -----------------------------------------------------------------------------------------------------


def test_distribution_times_every_kind_of_work() -> None:
    from bench import distribution

    args = Namespace(size="tiny", resolution=16, batch=1, processes=1, rounds=2, seconds=1e-3)
    found = distribution.measure(args, Team())
    assert [len(found[kind]) for kind in distribution.KINDS] == [2, 2, 2]
    assert all(seconds > 1e-4 for of in found.values() for seconds in of)


def test_distribution_tells_what_is_lost_from_what_the_machine_takes() -> None:
    from bench import distribution

    found = {"alone": [1.0, 1.0, 1.0], "apart": [1.0, 1.25, 1.25], "shared": [1.0, 2.0, 1.25]}
    result = distribution.summary(found)
    assert result["lost"] == pytest.approx(0.2) and result["machine"] == pytest.approx(0.2)
    assert result["rounds_lost"] == pytest.approx([0, 0.5, 0.2])


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resume_compares_results_and_not_times(tmp_path: Path) -> None:
    from bench import resume

    for name, seconds, loss in (("a", 1, 0.5), ("b", 2, 0.5), ("c", 2, 0.6)):
        stage = tmp_path / name / "core"
        (stage / "state" / "000000000008").mkdir(parents=True)
        (stage / "state" / "000000000008" / "state.json").write_text(f"{seconds}")
        (stage / "stage.json").write_text(json.dumps({"wall_seconds": seconds, "result": {"seconds": seconds}}))
        (stage / "log.jsonl").write_text(json.dumps({"time": seconds, "loss": loss}) + "\n")
    made = {name: resume.contents(tmp_path / name) for name in "abc"}
    assert set(made["a"]) == {"core/stage.json", "core/log.jsonl"}
    assert made["a"] == made["b"] != made["c"]
    assert resume.where(tmp_path / "a") == "core, saved at 8"


def test_resume_cuts_off_a_write(tmp_path: Path) -> None:
    from bench import resume

    child = os.fork()
    if not child:
        writes = resume._count_writes(2)
        for name in "abc":
            (tmp_path / name).write_bytes(b"1234")
            flush(tmp_path / name)
        os._exit(writes())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {"a": 4, "b": 2}


def test_resume_counts_equal_runs_by_fault() -> None:
    from bench import resume

    good = resume.Trial(resume.Fault("kill one", 1, 2.0), (-9, 0), "core, saved at 8", (), "")
    trials = [good, replace(good, differ=("core/log.jsonl",)), replace(good, statuses=(-9, 2), where="grown, ...")]
    assert "| kill one | 3 | 1 | 2 core, 1 grown |" in resume.table(trials)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 4, "precision": "fp32"},
        {"batch": 2, "accumulate": 2, "precision": "bf16", "activation_checkpointing": True, "ema": []},
    ],
)
def test_memory_is_planned_to_a_tenth(settings: dict[str, Any]) -> None:
    from bench import memory

    case = memory.Case("tiny", 16, settings=settings)
    measured = memory.tensors(lambda: memory.steps(case))
    assert memory.planned(case) == pytest.approx(measured, rel=memory.TARGET)


def test_memory_measures_in_processes_and_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bench import memory

    monkeypatch.setattr(memory, "CASES", {"a": memory.Case("tiny", 16, settings={"batch": 2, "precision": "fp32"})})
    memory.main(["--only", "a", "--here", "process"])
    grew = int(capsys.readouterr().out)
    takes = memory.planned(memory.CASES["a"])
    monkeypatch.setattr(memory, "in_own_process", lambda name, how: grew if how == "process" else takes)
    memory.main(["--output", str(tmp_path / "memory.jsonl")])
    assert "| a | " in capsys.readouterr().out and "tensors" in (tmp_path / "memory.jsonl").read_text()
    monkeypatch.setattr(memory, "in_own_process", lambda name, how: 2**20)
    with pytest.raises(SystemExit, match="off by more than 10%: a"):
        memory.main([])


# --- a GPU ------------------------------------------------------------------------------------------------------


def test_gpu_runs_to_its_end_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import gpu

    gpu.main(["--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["toy"] and gpu.SECTIONS.keys() < found.keys()
    for name in gpu.SECTIONS:
        assert not {"failed", "skipped"} & found[name].keys(), found[name]
    for row in (found["train"][work.name] for work in gpu.TOY.works):
        assert row["images_per_second"] > 0 and 0 < row["mfu"] < 1 and row["planned_gib"] > 0
    assert list(found["latency"]["milliseconds"]) == ["8 px", "16 px"]
    assert found["sharded"]["ratio"] > 0 and found["saving"]["gib"] > 0 and found["loader"]["images_per_second"] > 0
    rows = next(iter(found["kernels"].values()))[:5]
    assert rows[0]["share"] >= rows[1]["share"] > 0 and sum(r["share"] for r in rows) <= 1
    assert "written to" in capsys.readouterr().out


def test_gpu_tells_of_what_fails_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import gpu

    def fails(_: Any) -> dict[str, Any]:
        raise ValueError("broken")

    monkeypatch.setitem(gpu.SECTIONS, "latency", fails)
    with pytest.raises(SystemExit, match="failed: latency"):
        gpu.main(["--device", "cpu", "--only", "latency", "machine", "--output", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["latency"]["failed"] == "ValueError: broken" and found["machine"]["products_tflops"] > 0
    late = gpu.measure(["machine"], torch.device("cpu"), gpu.TOY, minutes=-1)
    assert "minutes were over" in late["machine"]["skipped"]


# --- growth -----------------------------------------------------------------------------------------------------------


def test_growth_dry_run_shares_out_equal_compute(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from bench import growth, growth_plan

    argv = ["--dry-run", "--root", str(tmp_path / "runs"), "--budget", "0.5"]
    growth.main(argv)
    out = capsys.readouterr().out
    assert all(name in out for name in growth_plan.DEFAULT) and "minutes at 90 GFLOP/s" in out
    assert not (tmp_path / "runs").exists()


def test_growth_budgets_are_equal_to_within_a_batch() -> None:
    from bench import growth, growth_plan

    names = ["scratch", "frozen-random", "frozen-preserve", "unfreeze-preserve"]
    args = growth.parser().parse_args(["--batch", "8", "--low", "16", "--to", "32", "--regimes", *names])
    plan = growth_plan.make_plan(args)
    totals = {n: plan.starts(n) + sum(p.cost for p in phases) for n, phases in plan.regimes.items()}
    for name, phases in plan.regimes.items():
        slack = sum(8 * p.flops for p in phases) + 8 * plan.core.flops
        assert abs(totals[name] - (args.core + args.growth) * growth_plan.TERA) <= slack
    assert plan.regimes["frozen-preserve"][0].flops < plan.regimes["frozen-random"][0].flops
    assert plan.regimes["frozen-random"][0].flops < plan.regimes["scratch"][0].flops


def test_growth_trains_on_the_world_and_the_stride_that_it_plans() -> None:
    from bench import growth, growth_plan

    words = ["--size", "nano", "--stride", "2", "--world", "simple", "--regimes", "finetune-exact"]
    args = growth.parser().parse_args(words)
    plan = growth_plan.make_plan(args)
    made = growth.recipe(0, plan, args)
    core, grown = made.stages
    assert (core.stride, grown.exact, grown.core) == (2, True, "finetune")  # type: ignore[union-attr]
    assert {source.world for source in (*made.data, made.heldout)} == {"simple"}  # type: ignore[union-attr]
    wider = growth_plan.make_plan(growth.parser().parse_args(["--size", "nano", *words[4:]]))
    assert wider.core.flops < plan.core.flops / 2  # a quarter of the tokens


def test_growth_crossing_is_interpolated() -> None:
    from bench.growth_summary import Curve, crossing

    curve = Curve([10.0, 20.0, 30.0, 40.0], {"mean": [1.0, 0.5, 0.6, 0.2]})
    assert crossing(curve, 1.5) == 10.0
    assert crossing(curve, 0.75) == pytest.approx(15.0)
    assert crossing(curve, 0.4) == pytest.approx(35.0)
    assert crossing(curve, 0.1) is None


def test_growth_fractions_leave_the_core_out_where_both_have_it() -> None:
    from bench.growth_plan import Phase, Plan
    from bench.growth_summary import Curve, fractions

    def curve(flops: list[float], errors: list[float]) -> Curve:
        return Curve(flops, {"mean": errors})

    curves = {
        "frozen-preserve": curve([100, 150, 200], [0.5, 0.3, 0.1]),
        "frozen-random": curve([100, 200], [1.0, 0.4]),
        "scratch": curve([0, 200], [1.0, 0.2]),
    }
    plan = Plan(Phase(100, 1.0), {}, {})
    found = fractions(curves, plan, "frozen-preserve")
    assert found == {"frozen-random": pytest.approx(0.25), "scratch": pytest.approx(175 / 200)}
    assert fractions(curves, plan, "finetune-exact") == {}
    found = fractions(curves | {"finetune-exact": curve([100, 150], [0.4, 0.2])}, plan, "finetune-exact")
    assert found == {"frozen-random": 0, "scratch": pytest.approx(150 / 200)}


def test_growth_runs_goes_on_and_summarizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.growth_plan import Phase, Plan

    from bench import growth

    save_t5(tmp_path / "t5")
    monkeypatch.setattr(looks, "GRID_STEPS", 1)
    monkeypatch.setattr(looks, "GRID", 1)
    few = Phase(2, 1e9)
    regimes = {"scratch": (few,), "frozen-random": (few,), "frozen-preserve": (few,), "unfreeze-preserve": (few, few)}
    plan = Plan(few, regimes, dict.fromkeys(regimes, 1000000000.0))
    monkeypatch.setattr(growth, "make_plan", lambda _: plan)
    argv = ["--root", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures"), "--encoder", str(tmp_path / "t5")]
    small = {"seeds": 1, "low": 16, "to": 32, "batch": 2, "captions": 4, "heldout": 1, "evaluations": 1, "prompts": 2}
    argv += [word for k, v in (small | {"steps": 1}).items() for word in (f"--{k}", str(v))]
    with pytest.raises(SystemExit, match="a target is missed"):  # one step meets none
        growth.main(argv)
    first = capsys.readouterr().out
    assert "scratch | total compute" in first and "| unfreeze-preserve |" in first
    (seed,) = json.loads((tmp_path / "runs" / "results.json").read_text())["seeds"]
    curve = seed["curves"]["unfreeze-preserve"]
    assert curve["flops"] == [2e9, 4e9, 6e9] and len(curve["errors"]["20"]) == 3
    assert seed["curves"]["scratch"]["flops"] == [0, 2e9]
    assert {"background", "colour"} <= seed["accuracy"]["scratch"].keys()
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["growth.png", "growth_by_noise.png"]
    weights = tmp_path / "runs" / "seed0" / "scratch" / "checkpoint" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    growth.execute(plan, growth.parser().parse_args(argv))
    assert weights.stat().st_mtime_ns == written


# --- one step ---------------------------------------------------------------------------------------------------------


def test_onestep_measures_speed_parts_and_resolutions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    from bench import onestep

    onestep.main(["--quick", "--figures", str(tmp_path)])
    out = capsys.readouterr().out
    assert "times faster" in out and "| of it, growth blocks |" in out and "| 128 |" in out
    assert (tmp_path / "onestep.png").stat().st_size > 1000


def test_onestep_counts_what_each_rung_costs_without_allocating() -> None:
    from bench import onestep

    (config,) = onestep.shapes(["tiny"], 256).values()
    found = onestep.counted(lambda: Generator(UViT(config)), lambda g: onestep.drawn(g, *onestep.inputs(config)))
    assert len(found) == 4 and [c.flops for c in found] == sorted(c.flops for c in found)
    more = [b.flops - a.flops for a, b in pairwise(found)]
    assert more[2] > 3 * more[1]  # four times the pixels, the same channels


def test_a_search_keeps_the_preview_that_the_checker_likes_best(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import search

    images = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    assert np.array_equal(search.averaged(images, 2)[0, :, :, 0], [[7.5, 13.5], [31.5, 37.5]])
    search.main(["tiny", "--prompts", "2", "--of", "2", "--steps", "2"])
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[1:3]] == ["one sample", "best of 2"]
    assert float(said[-1].rpartition("at most ")[2].split()[0]) <= 1


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_are_mended_and_another_teacher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.drift import before

    from bench import pairs

    monkeypatch.setattr(pairs, "IMAGES", 6)
    monkeypatch.setattr(pairs, "SHARD", 2)
    monkeypatch.setattr(stages_of_pairs, "CHECKED", 2)
    model, config = checkpoint.load(find("tiny"))
    checkpoint.save(tmp_path / "teacher", ungrown(model), before(config))
    pairs.work(str(tmp_path / "teacher"), str(tmp_path / "run"))
    assert pairs.whole(tmp_path / "run") == 3 and len(pairs.contents(tmp_path / "run")) == 4
    found = pairs.cut_off(tmp_path / "teacher", tmp_path / "run", random.Random(0))
    assert found["found"] and found["same"] and found["alone"]
    said = pairs.refused(tmp_path / "teacher", tmp_path / "run")
    assert "its parent" in said["stage"] and "changed since it was begun" in said["stage"]
    assert "the pairs are of the teacher" in said["distillation"]


def test_the_shipped_core_inverts_to_30_db_on_40_levels() -> None:
    from bench import pairs

    found = pairs.round_trip(ungrown(checkpoint.load(find("tiny"))[0]), images=2)
    assert list(found)[-1] == "stored" and min(found.values()) > pairs.TARGET


# --- editing ----------------------------------------------------------------------------------------------------------


def test_editing_knows_an_edit_that_is_right_from_none() -> None:
    from bench import editing

    cases = [editing.recolour(scene) for scene in editing.heldout(30)]
    done = [editing.judge(look(case.changed.render(64, 64)), case) for case in cases]
    not_done = [editing.judge(look(case.scene.render(64, 64)), case) for case in cases]
    assert np.mean([d["right"] for d in done]) >= 0.9 and not any(d["right"] for d in not_done)
    assert all(case.new in case.after and case.new not in case.before.split() for case in cases)
    assert np.mean([d["place"] for d in not_done]) >= 0.9


def test_editing_masks_the_second_group_alone() -> None:
    from bench import editing

    for scene in editing.heldout(20, lambda spec: bool(spec.relation)):
        mask, wanted, words = editing.replaced(scene)
        first, second = scene.spec.groups
        inside = {o.colour: mask[int(64 * o.y), int(64 * o.x)] for o in scene.view().objects}
        assert (inside[first.colour], inside[second.colour]) == (False, True)
        assert wanted.groups[1].colour in words and second.colour != wanted.groups[1].colour


def test_editing_runs_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import editing

    with pytest.raises(SystemExit, match="a target is missed: transfer"):  # two steps are too few
        editing.main(["tiny", "--cases", "2", "--steps", "2", "--guidance", "1", "--figures", str(tmp_path)])
    out = capsys.readouterr().out
    assert "transfer: right" in out and "known 0" in out and "bicubic_psnr" in out
    names = ["edit-inpaint.png", "edit-interpolate.png", "edit-transfer.png", "edit-upscale.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


# --- all of them ------------------------------------------------------------------------------------------------------


def test_exact_compares_what_evaluations_measure() -> None:
    from bench import exact
    from pixelgrow.diffusion.heldout import SIGMAS

    kinds = (*exact.KINDS, "all")

    def metrics(error: float = 1.0, accuracy: float = 0.7) -> dict[str, Any]:
        errors, accuracies = {f"{s:g}": error / 1e3 for s in SIGMAS}, dict.fromkeys(kinds, accuracy)
        return {"error": errors, "accuracy": accuracies, "details": {"samples": 0.004, "images": 0.0093}}

    for changed, good in (
        ({}, True),
        ({"exact, no gate": {"error": 1.03}}, False),
        ({"exact": {"accuracy": 0.68}}, False),
    ):
        seed = {regime: metrics(**changed.get(regime, {})) for regime in exact.REGIMES}  # type: ignore[attr-defined]
        text, met = exact.tables([seed] * 3)
        assert met == good and "details" in text and "4.00" in text


@pytest.mark.parametrize(
    ("growth", "drift", "missed"),
    [
        ("exact", (140.0, 120.0), 0),
        ("exact", (140.0, 90.0), 1),
        ("exact", (40.0, 30.0), 2),
        ("plain", (40.0, 30.0), 0),
        ("random", (20.0, 19.0), 2),
    ],
)
def test_drift_expects_of_exact_rungs_that_there_is_none(growth: str, drift: tuple[float, float], missed: int) -> None:
    from bench.drift import GROWTHS, misses, recipe

    found = dict(zip(("with", "without"), drift, strict=True))
    assert len(misses(growth, found, True)) == missed and len(misses(growth, found, False)) == missed + 1
    grown = recipe(Path("x"), 32, growth, 80).stage("with")
    assert {k: getattr(grown, k) for k in GROWTHS[growth]} == GROWTHS[growth]


def test_every_bench_is_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import __main__ as benches

    benches.main(["--list"])
    out = capsys.readouterr().out
    for name in benches.BENCHES:
        assert f"-m bench.{name}" in out
        assert (ROOT / "bench" / f"{name}.py").exists()
    assert sys.executable not in out
    runs = {p.stem for p in (ROOT / "bench").glob("*.py") if "\ndef main(" in p.read_text()}
    assert runs - {"__main__"} == set(benches.BENCHES)
    assert all(f"| `{name}` |" in (ROOT / "bench" / "README.md").read_text() for name in benches.BENCHES)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_runs_them_all_and_holds_a_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import metrics

    monkeypatch.setattr(metrics, "kid", partial(metrics.kid, blocks=2, size=100))
    metrics.main(["--images", "200", "--width", "4"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["metric"] for line in lines][3:5] == ["FD", "KID"] and len(lines) == 9
    assert all(0 < line["peak_gib"] < 8 for line in lines)
    monkeypatch.setattr(metrics, "scale", lambda images, width: 2.5)
    with pytest.raises(SystemExit, match=r"held 2.50 GiB, expected at most 2"):
        metrics.main([])


def test_metrics_knows_the_truth_of_its_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import metrics

    metrics.by_number([400], width=2, wider=2.0)
    row = json.loads(capsys.readouterr().out)
    assert row["perfect, true FD"] == 0 and row["worse, true FD"] == pytest.approx(1.5)  # 1 + 1/2, (2 - 1)^2 of each
    assert row["perfect, FD"] < 0.1 and row["worse, FD"] == pytest.approx(1.5, rel=0.3)
    metrics.by_copies(n=120)
    cases = {row["generated"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert cases["5 of 10 modes"]["coverage"] < 0.6 < cases["as the real ones"]["coverage"]
    assert cases["generated images 4 times"]["recall"] == 0 == cases["real images 4 times"]["precision"]
    metrics.by_draws(draws=20, n=50, width=2)
    held, same, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert held["intervals that hold it"] > 0.7 and 0.3 < same["precision"] < 3
