"""Runs of recipes: every stage end to end, exact resume after a kill, refusal of changes, regimes of growth."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import pixelgrow
import pixelgrow.training.state
from conftest import RunCli
from pixelgrow.data.loader import Batch
from pixelgrow.errors import UserError
from pixelgrow.recipe.read import load_recipe, read_recipe
from pixelgrow.recipe.stages import RESERVED
from pixelgrow.run import _hashes, _parent, _warn_of_micro_batches, _warn_of_missing_parents, less_memory, locked, run
from pixelgrow.stages.materials import Materials
from pixelgrow.stages.record import Record
from pixelgrow.training.denoise import DenoiseObjective
from pixelgrow.training.objective import Terms
from pixelgrow.training.optim import rate
from pixelgrow.training.saving import Saver
from pixelgrow.writing import CannotWrite
from runs import WEIGHTS, class_images, class_recipe, few_samples, only_core, own_files, record, stopped_after


@pytest.fixture(scope="module", autouse=True)
def _few_samples() -> Iterator[None]:
    with few_samples():
        yield


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the smoke recipe."""
    root = tmp_path_factory.mktemp("runs")
    assert run(load_recipe("smoke"), root) == root / "smoke" / "report.html"
    return root / "smoke"


def test_every_stage_writes_its_result(smoke: Path) -> None:
    assert all(record(smoke / s)["done"] for s in ("core", "grown", "eval"))
    assert (smoke / "core" / WEIGHTS).exists()
    assert not (smoke / "core" / "state").exists()
    core, grown = (load_file(smoke / s / WEIGHTS)["core.text_scale"] for s in ("core", "grown"))
    assert not core.equal(torch.eye(len(core)))  # the text was whitened, and growth keeps it
    assert core.equal(grown)
    growth = json.loads((smoke / "grown" / "growth.json").read_text())
    assert growth["dropped"] == []
    assert list(growth["after"].values()) == pytest.approx(list(growth["before"].values()))
    config = json.loads((smoke / "grown" / "checkpoint" / "config.json").read_text())
    assert [entry["stage"] for entry in config["lineage"]] == ["core", "grown"]
    assert config["lineage"][1]["unfrozen_after"] == 16
    assert config["noise"]["kind"] == "lognormal"
    metrics = json.loads((smoke / "eval" / "metrics.json").read_text())
    assert metrics["prompts"] == 8
    assert metrics["sampling"]["grid"] == "native"
    assert set(metrics["accuracy"]) >= {"background", "colour", "shape", "count"}


def test_names_of_a_runs_own_files_are_reserved(smoke: Path) -> None:
    assert {"text", "report.html"} <= own_files(smoke) <= set(RESERVED)


def test_a_frozen_phase_keeps_the_core_to_the_bit(smoke: Path) -> None:
    core, warm = (load_file(smoke / p / WEIGHTS) for p in ("core", "grown/frozen"))
    final = load_file(smoke / "grown" / WEIGHTS)
    assert all(warm[name].equal(core[name]) for name in core)
    assert not all(final[name].equal(core[name]) for name in core)


def test_one_schedule_goes_through_the_unfreezing(smoke: Path) -> None:
    stage = load_recipe("smoke").stage("grown")
    settings = stage.training()  # type: ignore[union-attr]
    logs = [smoke / "grown" / f / "log.jsonl" for f in ("frozen", ".")]
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines() if '"lr"' in line]
    assert [(r["images"], r["lr"]) for r in records] == [
        (images, pytest.approx(settings.lr * rate(images - settings.batch / 2, settings), rel=1e-5))
        for images in (8, 16, 24, 32)
    ]
    assert record(smoke / "grown")["result"]["images"] == 32
    assert not (smoke / "grown" / "frozen" / "state").exists()


def test_a_growth_that_unfreezes_resumes_to_the_same_bytes(smoke: Path, tmp_path: Path) -> None:
    """Stopped in the frozen phase, between its last state and its checkpoint, and in the second phase."""
    shutil.copytree(smoke, tmp_path / "smoke")
    shutil.rmtree(tmp_path / "smoke" / "grown")
    for images in (8, 16, 24):
        with stopped_after(images):
            run(load_recipe("smoke"), tmp_path)
    for name in ("growth.json", "frozen/result.json"):  # are made again if damaged
        (tmp_path / "smoke" / "grown" / name).write_text("{")
    run(load_recipe("smoke"), tmp_path)
    for part in ("grown", "grown/frozen"):
        assert (tmp_path / "smoke" / part / WEIGHTS).read_bytes() == (smoke / part / WEIGHTS).read_bytes()


class Page(HTMLParser):
    """Counts elements and sees that they are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag not in ("meta", "img", "line", "polyline", "circle"):
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("src", "href") or str(value).startswith(("data:", "#")), "the page loads something"

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "circle"):
            assert self.open.pop() == tag


def test_the_report_is_whole(smoke: Path) -> None:
    text = (smoke / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.seen["svg"] >= 5
    assert page.seen["img"] >= 5
    for words in ("Growth from 16 to 32 px", "The checker", "peak memory", "bad files", "Frozen phase"):
        assert words in text


def test_a_finished_run_changes_no_file(smoke: Path) -> None:
    before = {
        p: p.stat().st_mtime_ns for p in smoke.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json")
    }
    run(load_recipe("smoke"), smoke.parent)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_changed_stage_is_refused(smoke: Path) -> None:
    for override, words in (
        ("stages.core.images=80", r"stage 'core': images changed since it was begun \(was 64, now 80\)"),
        ("stages.eval.prompts=7", r"stage 'eval': prompts changed"),
        ("data.captions=25", r"stage 'core': the data \(scenes: .*\) changed since"),
        ("seed=1", r"stage 'core': seed changed"),
    ):
        with pytest.raises(UserError, match=words):
            run(load_recipe("smoke", [override]), smoke.parent)
    run(load_recipe("smoke", ["stages.core.workers=1", "stages.core.log_every=16"]), smoke.parent)


def test_an_unfinished_stage_resumes_with_other_settings_that_are_free(
    smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, saves = only_core(tmp_path), [16, 32, 48]
    began = tmp_path / "smoke" / "core" / "stage.json"
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic: None)
    changes = [
        [],
        ["accumulate=4"],
        ["accumulate=2", "activation_checkpointing=true"],
        ["compile=true", "log_every=16", "workers=1"],
    ]
    every = [f"{name}_every={n}" for name, n in (("validate", 32), ("sample", 0), ("snapshot", 32))]
    for images, some in zip([*saves, None], changes, strict=True):
        changed = load_recipe(recipe, [f"stages.core.{s}" for s in (*some, *(every if some else []))])
        with stopped_after(images) if images else nullcontext():
            run(changed, tmp_path)
        if images == 16:  # the advice for a damaged record
            for path in (began, began.with_name(".stage.json.copy")):
                path.write_text("{")
            with pytest.raises(UserError, match=r"delete .*stage\.json alone, and the same command goes on"):
                run(changed, tmp_path)
            began.unlink()
    found, expected = (load_file(folder / "core" / WEIGHTS) for folder in (tmp_path / "smoke", smoke))
    for name, tensor in expected.items():  # gradients are added up in another order
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_the_advice_after_running_out_of_memory_can_be_followed(
    smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, real = only_core(tmp_path), DenoiseObjective.loss

    def loss(self: DenoiseObjective, batch: Batch, part: str) -> Terms:
        if len(batch.image) > 8 and int(batch.index[0]) >= 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return real(self, batch, part)

    monkeypatch.setattr(DenoiseObjective, "loss", loss)
    with pytest.raises(UserError, match=r"stage 1 of 1, core: out of memory \(CUDA .*allocate\): what was") as error:
        run(load_recipe(recipe), tmp_path)
    advice = re.findall(r"--set (\S+)", str(error.value))
    assert advice == ["stages.core.accumulate=2", "stages.core.activation_checkpointing=true"]
    run(load_recipe(recipe, advice[:1]), tmp_path)
    assert record(tmp_path / "smoke" / "core")["done"]


@pytest.mark.parametrize("name", ["smoke", "smoke-guided", "demo"])
def test_the_advice_on_memory_is_valid_for_every_stage(name: str) -> None:
    for stage in load_recipe(name).stages:
        advice = re.findall(r"--set (\S+)", less_memory(stage))
        assert advice and all(set_.split(".")[2].split("=")[0] in stage.free for set_ in advice)
        load_recipe(name, advice)


def test_a_missing_parent_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe("smoke")
    records = {stage.name: Record(tmp_path / stage.name) for stage in recipe.stages}
    records["grown"].begin({}, {"core": "hash"})
    _warn_of_missing_parents(recipe, records)
    assert "stage grown depends on core, whose folder is missing; if its new weights differ" in caplog.text
    assert f"delete {records['grown'].folder} to redo it" in caplog.text


@pytest.mark.parametrize(("stage", "file"), [("core", "checkpoint/config.json"), ("pairs", "pairs.json")])
def test_a_missing_file_of_a_finished_stage_is_one_line(tmp_path: Path, stage: str, file: str) -> None:
    recipe = load_recipe("smoke-onestep")
    (tmp_path / "core" / "checkpoint").mkdir(parents=True)
    (tmp_path / "core" / "checkpoint" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "pairs.json").write_text("{}", encoding="utf-8")
    (tmp_path / stage / file).unlink()
    with pytest.raises(UserError, match=rf"{file} is missing, though stage '{stage}' is done: put it back, or delete"):
        if stage == "core":
            _parent(recipe.stage("pairs"), Materials(recipe, tmp_path))
        _hashes(recipe.stage("onestep"), None, Materials(recipe, tmp_path))


def test_a_generator_is_warned_of_other_micro_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = load_recipe("smoke-guided", ["stages.onestep.accumulate=2"]).stage("onestep")
    begun = Record(tmp_path / "onestep")
    begun.begin({"accumulate": 1}, {})
    _warn_of_micro_batches(stage, begun)
    assert "accumulate was 1, now 2" in caplog.text


def test_a_killed_run_resumes_to_the_same_bytes(smoke: Path, tmp_path: Path) -> None:
    recipe = only_core(tmp_path)
    command = [sys.executable, "-c", "from pixelgrow.cli.main import main; main()", "run", str(recipe)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "runs" / "smoke" / "core" / "state"
    deadline = time.monotonic() + 90
    while not list(state.glob("0*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    run(load_recipe(recipe), tmp_path / "runs")
    assert (state.parent / WEIGHTS).read_bytes() == (smoke / "core" / WEIGHTS).read_bytes()


def test_sigterm_saves_and_says_how_to_resume(
    smoke: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Saver.start

    def start(self: Saver, *state: Any) -> None:
        real(self, *state)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "start", start)
        stopped = run_cli("run", only_core(tmp_path), cwd=tmp_path)
    assert stopped.code == 143
    assert stopped.err.splitlines()[-1].endswith("saved at 16 images: run the same command again to go on")
    assert "Traceback" not in stopped.err
    assert run_cli("run", "smoke.yaml", cwd=tmp_path).code == 0
    assert (tmp_path / "runs/smoke/core" / WEIGHTS).read_bytes() == (smoke / "core" / WEIGHTS).read_bytes()


def test_a_full_disk_says_that_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise CannotWrite("cannot write x: the disk is full; make room there")

    monkeypatch.setattr("pixelgrow.run._execute", full)
    with pytest.raises(UserError, match="x: the disk is full; make room there, then run the same command again"):
        run(class_recipe(tmp_path, {"classes": 2}), tmp_path)


def test_two_runs_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixelgrow.run.PATIENCE", 0.2)
    with locked(tmp_path / "a"), pytest.raises(UserError, match="in use by process"), locked(tmp_path / "a"):
        pass
    with locked(tmp_path / "a"):
        pass


def test_the_workers_of_a_killed_run_are_waited_for(tmp_path: Path) -> None:
    """Forked workers hold the lock of a process that has ended."""
    worker = (tmp_path / ".lock").open("a")
    fcntl.flock(worker, fcntl.LOCK_EX)
    threading.Timer(0.5, worker.close).start()
    with locked(tmp_path):
        assert worker.closed


def test_nothing_is_trained_before_the_data_is_there(tmp_path: Path) -> None:
    recipe = load_recipe("photos", [f"data.source={tmp_path / 'nowhere'}"])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        run(recipe, tmp_path)
    assert not (tmp_path / "photos" / "core").exists()


def test_nothing_is_trained_before_every_stage_has_images(tmp_path: Path) -> None:
    """Images of 64 px are large enough for the core, not for its growth."""
    small = "size: tiny, resolution: 16, images: 8, batch: 8"
    (tmp_path / "recipe.yaml").write_text(f"""
name: c
text: {{classes: 2}}
data: {{source: {class_images(tmp_path)}}}
stages:
  - train: {{name: core, {small}}}
  - grow: {{name: grown, to: 128, images: 8, batch: 8}}
""")
    with pytest.raises(UserError, match=r"none of its \d+ images is at least 128x128 pixels"):
        run(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    assert not (tmp_path / "c" / "core").exists()
    train, held = class_images(tmp_path / "other"), class_images(tmp_path / "held")
    for label in ("dark", "light"):
        Image.new("RGB", (200, 200)).save(train / label / "large.png")
    overrides = [f"data.source={train}", f"heldout={{source: {held}}}"]
    with pytest.raises(UserError, match=r"held-out data .* has no readable image of 128x128"):
        run(load_recipe(tmp_path / "recipe.yaml", overrides), tmp_path)
    assert not (tmp_path / "c" / "core").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["patch=32"], "patch 32 does not fit a growth to 32 px"),
        (["until=90"], "until: got 90, expected a sigma between the model's sigma_min 0.002 and sigma_max 80"),
        (["until=0.001"], "until: got 0.001, expected a sigma between the model's sigma_min 0.002 and sigma_max 80"),
        (["until=0.05", "noise={mean: 4, std: 0.5}"], "until: 0.05 is below 99.9% of the training noise"),
        (["until=1", "to=[32, 64]", "noise={mean: 4, std: 0.5}"], "until: 1 is below 99.9% of the training noise"),
    ],
)
def test_nothing_is_trained_before_every_shape_and_gate_fits(tmp_path: Path, settings: list[str], message: str) -> None:
    recipe = load_recipe("smoke", ["stages.grown.init=preserve", *(f"stages.grown.{s}" for s in settings)])
    with pytest.raises(UserError, match=re.escape(f"stage 'grown': {message}")):
        run(recipe, tmp_path)
    assert not (tmp_path / "smoke" / "core").exists()


def test_nothing_is_trained_before_every_source_is_good_enough(tmp_path: Path) -> None:
    """Faults that only the second stage has: too many bad files, captions for labels, a missing checkpoint."""
    good, bad = class_images(tmp_path), class_images(tmp_path / "bad")
    for name in ("a", "b"):
        (bad / "dark" / f"{name}.png").write_bytes(b"")
    small = "images: 8, batch: 8"
    (tmp_path / "recipe.yaml").write_text(f"""
name: c
text: {{classes: 2}}
data: {{source: {good}}}
stages:
  - train: {{name: core, size: tiny, resolution: 16, {small}}}
  - train: {{name: tuned, from: core, {small}}}
""")
    for override, words in (
        (
            f"stages.tuned.data.source={bad}",
            r"bad/images \(train\): 2 of 26 samples are bad or lost, the limit is 0.01 .*dark/a",
        ),
        ("stages.tuned.data.source=scenes", r"scenes has captions, not class folders, .*\{classes: 2\}: write text:"),
        ("stages.tuned.from=./nope/x", r"\./nope/x is not a checkpoint"),
    ):
        with pytest.raises(UserError, match=words):
            run(load_recipe(tmp_path / "recipe.yaml", [override]), tmp_path)
        assert not (tmp_path / "c" / "core").exists()


def test_held_out_data_are_not_training_data(tmp_path: Path) -> None:
    folder = class_images(tmp_path)
    with pytest.raises(UserError, match=r"images is trained on and held out: name another source in heldout"):
        run(load_recipe("smoke", same(folder)), tmp_path)
    scenes = "{source: scenes, n: 8, captions: 8"
    for overrides in (
        ["data.split=heldout"],
        ["data.split=heldout", "heldout={fraction: 0.1}"],
        [f"heldout={scenes}}}"],
        [f"stages.grown.data={scenes}, split: heldout}}"],
    ):
        with pytest.raises(UserError, match=r"scenes to train on and held-out scenes both have split: (train|heldout)"):
            run(load_recipe("smoke", overrides), tmp_path)
    assert not (tmp_path / "smoke" / "core").exists()


def same(folder: Path) -> list[str]:
    """Overrides of the smoke recipe that hold a class folder out of itself."""
    return [f"data={{source: {folder}}}", f"heldout={{source: {folder}}}", "text={classes: 2}"]


def test_scenes_are_not_mirrored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"flip: true would make captions of scenes untrue"):
        run(load_recipe("smoke", ["stages.grown.flip=true"]), tmp_path)
    assert not (tmp_path / "smoke" / "core").exists()


def test_training_can_start_from_what_bad_steps_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = DenoiseObjective.loss

    def loss(self: DenoiseObjective, batch: Batch, part: str) -> Terms:
        terms = real(self, batch, part)
        return terms if int(batch.index[0]) < 16 else replace(terms, loss=terms.loss * float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(DenoiseObjective, "loss", loss)
        with pytest.raises(UserError, match="replace this stage by a train stage of another name") as error:
            run(class_recipe(tmp_path, {"classes": 2}, images=32, max_bad_steps=2, sample_every=0, **LONG), tmp_path)
    checkpoint = tmp_path / "c" / "core" / "checkpoint"
    found = pixelgrow.training.state.load(checkpoint.parent / "state")
    assert found is not None
    kept, saved = load_file(checkpoint / "model.safetensors"), found.read()
    for name in moved(saved):
        assert kept[name].equal(saved[f"ema/0.25/denoiser/net.{name}"])
    assert str(checkpoint) in str(error.value)
    assert pixelgrow.load(checkpoint).config.lineage[-1]["stopped_after"] == 16
    stage = {"name": "core2", "from": str(checkpoint), "images": 8, "batch": 8, "lr": 1e-4, "sample_every": 0}
    data = {"source": str(tmp_path / "images")}
    again = {"name": "c", "text": {"classes": 2}, "data": data, "stages": [{"train": stage}]}
    run(read_recipe(again, "test"), tmp_path)
    lineage = pixelgrow.load(tmp_path / "c" / "core2").config.lineage
    assert [entry["stage"] for entry in lineage] == ["core", "core2"]


LONG: dict[str, Any] = {"ema": [0.25], "lr": 1e-2, "warmup": 0}  # an average that is far from the last weights


def moved(state: dict[str, Tensor]) -> list[str]:
    """Names of the weights in a denoiser's state that differ from their average; most do."""
    whole = {n: t for n, t in state.items() if n.startswith("weights/denoiser/")}
    found = [n for n, t in whole.items() if not t.equal(state[n.replace("weights", "ema/0.25", 1)])]
    assert 2 * len(found) > len(whole) > 0
    return [n.removeprefix("weights/denoiser/net.") for n in found]


def test_the_result_of_a_stage_is_the_average_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, states = pixelgrow.training.state.save, []

    def save(folder: Path, images: int, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        states.append({n: t.clone() for n, t in tensors.items()})
        real(folder, images, tensors, counters)

    monkeypatch.setattr(pixelgrow.training.state, "save", save)
    run(class_recipe(tmp_path, {"classes": 2}, images=24, sample_every=0, validate_every=0, **LONG), tmp_path)
    result = load_file(tmp_path / "c" / "core" / WEIGHTS)
    for name in moved(states[-1]):
        assert result[name].equal(states[-1][f"ema/0.25/denoiser/net.{name}"])
