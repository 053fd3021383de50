"""What several processes share, to the same end: micro-batches of four, shards of pairs, batches of an evaluation."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import processes
from cli_files import class_model, noisy_classes
from pixelgrow.distributed import join
from pixelgrow.errors import UserError
from processes import few_checked, made, noted, run_team, start
from runs import WEIGHTS, class_images, record

SHARDS = 5


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A core, and pairs of images of two classes, some of which cannot be read."""
    folder = tmp_path_factory.mktemp("recipe")
    images = class_images(folder)
    for name in sorted(images.rglob("*.png"))[::5]:
        name.write_bytes(name.read_bytes()[:200])
    core = {"name": "core", "size": "tiny", "resolution": 16, "images": 32, "batch": 8, "accumulate": 4, "log_every": 8}
    core |= {"sample_every": 0, "validate_every": 0, "snapshot_every": 0, "bad_limit": 0.9}
    inverted = {"name": "pairs", "from": "core", "n": 4 * SHARDS - 1, "shard": 4, "batch": 2, "steps": 2, "flip": True}
    stages = [{"train": core}, {"pairs": inverted | {"bad_limit": 0.9}}]
    data, held = {"source": str(images)}, {"at_most": 2}
    path = folder / "p.yaml"
    path.write_text(json.dumps({"name": "p", "text": {"classes": 2}, "data": data, "heldout": held, "stages": stages}))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The run of one process."""
    root = tmp_path_factory.mktemp("whole")
    (result,) = run_team(root / "said", "run", recipe, "--runs", root, size=1)
    assert result.code == 0, result.err
    return root / "p"


def test_four_processes_train_and_fewer_go_on(tmp_path: Path, recipe: Path, whole: Path) -> None:
    core = tmp_path / "p" / "core"
    for size, images in ((4, 8), (2, 16)):
        stop = partial(processes.at_step, processes.terminated, images, size - 1)
        ended = run_team(tmp_path / "said", "run", recipe, "--runs", tmp_path, size=size, prepare=stop)
        assert [r.code for r in ended] == [128 + signal.SIGTERM] * size, ended
    (result,) = run_team(tmp_path / "said", "run", recipe, "--runs", tmp_path, size=1)
    assert result.code == 0, result.err
    one, shared = (load_file(of / WEIGHTS) for of in (whole / "core", core))
    assert all(torch.allclose(one[name], shared[name], rtol=0, atol=1e-5) for name in one)  # sums in another order
    logs = [(of / "log.jsonl").read_text().splitlines() for of in (whole / "core", core)]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_pairs_are_those_of_one_process_whoever_makes_them(tmp_path: Path, recipe: Path, whole: Path) -> None:
    shutil.copytree(whole / "core", tmp_path / "p" / "core")
    fault = partial(processes.killed_in_pairs, tmp_path, 3, 1)
    ended = run_team(tmp_path / "said", "run", recipe, "--runs", tmp_path, prepare=fault)
    assert [r.code for r in ended] == [2, -signal.SIGKILL]
    assert made(tmp_path, 2) == [["pairs/0", "pairs/2", "pairs/4"], ["pairs/1"]]
    more = run_team(tmp_path / "said", "run", recipe, "--runs", tmp_path, size=3, prepare=partial(noted, tmp_path))
    assert [r.code for r in more] == [0, 0, 0], more
    assert made(tmp_path, 3) == [["pairs/0", "pairs/2", "pairs/4", "pairs/3"], ["pairs/1"], []]
    one, several = whole / "pairs", tmp_path / "p" / "pairs"
    for name in (*(f"{i:05d}.safetensors" for i in range(SHARDS)), "pairs.json"):
        assert (one / name).read_bytes() == (several / name).read_bytes(), name
    bad, again = (sorted((of / "bad_files.jsonl").read_text().splitlines()) for of in (one, several))
    assert bad == again and len(bad) > 2
    assert record(one)["result"]["bad_files"] == record(several)["result"]["bad_files"] == len(bad)
    assert more[0].err.count("bad files skipped") == 1


def test_bad_files_are_too_many_if_they_are_together(tmp_path: Path, recipe: Path, whole: Path) -> None:
    shutil.copytree(whole / "core", tmp_path / "p" / "core")
    bad = len((whole / "pairs" / "bad_files.jsonl").read_text().splitlines())
    limit = f"stages.pairs.bad_limit={(bad - 0.5) / 24}"  # each process meets fewer
    ended = run_team(tmp_path / "said", "run", recipe, "--runs", tmp_path, "--set", limit, prepare=few_checked)
    assert [r.code for r in ended] == [2, 2]
    said = [line for r in ended for line in r.err.splitlines() if line.startswith("pixelgrow: ")]
    assert len(said) == 1 and f"{bad} of 24 samples are bad or lost" in said[0], said


def test_an_evaluation_is_that_of_one_process(tmp_path: Path) -> None:
    model, data = class_model(tmp_path / "checkpoint"), noisy_classes(tmp_path, each=5)
    asked = ["--data", data, "-n", "15", "--steps", "1", "--guidance", "1", "--batch", "4", "--seeds", "2"]
    asked += ["--metrics", "fd,precision,is", "--reference", "{}/reference.safetensors"]

    def begin(n: int) -> processes.Running:
        folder = tmp_path / str(n)
        folder.mkdir()
        words = [str(w).format(folder) for w in asked]
        sweep = ["--sweep", "guidance=1,2", "-o", folder / "e.json"]
        return start(folder / "said", "evaluate", model, *words, *sweep, size=n, prepare=partial(noted, folder))

    found = []
    for n, running in {n: begin(n) for n in (1, 2)}.items():
        ended = running.end()
        assert [r.code for r in ended] == [0] * n, ended
        assert "FD" in ended[0].out and all(r.out == r.err == "" for r in ended[1:])
        values: dict[str, Any] = json.loads((tmp_path / str(n) / "e.json").read_text())
        assert all(one.pop("measured")["seconds_per_image"] > 0 for one in values["evaluations"])
        found.append((values, (tmp_path / str(n) / "reference.safetensors").read_bytes()))
        assert not list((tmp_path / str(n)).glob("*.part"))
    assert found[0] == found[1]
    first, second = made(tmp_path / "2", 2)
    assert first[:4] == ["real/0", "real/8", "seed-0/0", "seed-0/8"] and second[:2] == ["real/4", "real/12"]
    assert len(first) == len(second) and sorted(first + second) == sorted(made(tmp_path / "1", 1)[0])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is nothing"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_what_torchrun_sets_and_is_not_there_is_one_line(
    given: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{line}, expected what torchrun sets: start them with torchrun"), join():
        pass
