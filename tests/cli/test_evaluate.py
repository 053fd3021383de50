"""`evaluate` and `compare` from the command line: one JSON, resumed, compared, plotted; mistakes."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli_files import noisy_classes
from conftest import CliResult, RunCli
from extractors import Pixels
from pipelines import save_of_text
from pixelgrow.evaluation.features import load_extractor
from pixelgrow.evaluation.images import OfModel
from pixelgrow.evaluation.measures import EXTRACTOR

METRICS = ("--metrics", "precision,mmd")
Evaluate = Callable[..., CliResult]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extractor that is named by default costs nothing."""

    def load(name: str, device: object) -> object:
        return Pixels() if name == EXTRACTOR else load_extractor(name)

    monkeypatch.setattr("pixelgrow.evaluation.planning.load_extractor", load)


@pytest.fixture
def evaluate(_quick: None, model: Path, run_cli: RunCli, tmp_path: Path) -> Evaluate:
    """`evaluate("-o", "a.json")`: an untrained model of classes on random images, 12 of them, in one step."""
    data = noisy_classes(tmp_path, each=5)

    def run(*words: str | Path, candidate: Path = model, n: int = 12) -> CliResult:
        asked = ["--data", data, *METRICS, "-n", str(n), "--steps", "1", "--guidance", "1", "--batch", "6"]
        return run_cli("evaluate", candidate, *asked, *words, cwd=tmp_path)

    return run


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_twice_gives_the_same_file_but_for_times(evaluate: Evaluate, tmp_path: Path, model: Path) -> None:
    for name in ("a", "b"):
        result = evaluate("-o", f"{name}.json", "--seeds", "2")
        assert result.code == 0, result.err
        assert "precision-12 (pixels)" in result.out and "network evaluations an image: 1" in result.out
    a, b = read(tmp_path / "a.json"), read(tmp_path / "b.json")
    measured = a.pop("measured")
    assert b.pop("measured") != measured and a == b
    assert measured.keys() == {"seconds_per_image", "batch", "seconds", "peak_memory", "finished"}
    assert measured["peak_memory"] > 2**20 and a["candidate"]["sha256"] and a["candidate"]["lineage"]
    assert a["candidate"]["sampling"] == {"grid": "karras", "steps": 1, "sampler": "dpm++2m", "guidance": 1.0}
    assert (a["seeds"], a["images"], a["real"]["images"]) == ([0, 1], 12, 12)
    assert a["extractors"]["pixels"]["identity"] and a["versions"]["torch"] and a["machine"]["cores"]
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))
    again = evaluate("-o", "a.json", "--seeds", "2")
    assert again.code == 0 and "a.json is there already" in again.err and "precision-12" in again.out
    other = evaluate("-o", "a.json", "--seeds", "3")
    assert other.code == 2 and f"--output a.json: holds another evaluation, of {model}" in other.err
    assert read(tmp_path / "a.json") == a | {"measured": measured}


def test_the_same_command_goes_on(evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = OfModel.make, []

    def cut(self: OfModel, prompts: Any, numbers: Any, seed: int) -> Any:
        made.append(numbers[0])
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(self, prompts, numbers, seed)

    monkeypatch.setattr(OfModel, "make", cut)
    stopped = evaluate("-o", "x.json")
    assert stopped.code == 130 and stopped.err.endswith("stopped by SIGINT: run the same command again to go on\n")
    assert not (tmp_path / "x.json").exists() and (tmp_path / "x.json.part").is_dir()
    changed = evaluate("-o", "x.json", "--guidance", "3")
    assert changed.code == 2 and "candidates[0].sampling.guidance: was 1, now 3" in changed.err
    assert evaluate("-o", "x.json").code == 0
    assert made == [0, 6, 6] and not (tmp_path / "x.json.part").exists()


def test_a_sweep_is_a_table_and_a_plot(evaluate: Evaluate, tmp_path: Path) -> None:
    result = evaluate("-o", "s.json", "--sweep", "steps=1,2", "--metrics", "mmd,is")
    assert result.code == 0, result.err
    assert "s steps 1" in result.out and "s steps 2" in result.out and "no plot: it takes a distance" in result.err
    swept = read(tmp_path / "s.json")
    assert swept["sweep"] == {"setting": "steps", "values": [1, 2]}
    assert [e["candidate"]["sampling"]["steps"] for e in swept["evaluations"]] == [1, 2]
    first, second = (e["metrics"][0]["mean"] for e in swept["evaluations"])
    assert first != second


def test_files_side_by_side(evaluate: Evaluate, tmp_path: Path, run_cli: RunCli) -> None:
    assert evaluate("-o", "one.json").code == 0
    assert evaluate("-o", "more.json", "--guidance", "4").code == 0
    assert evaluate("-o", "fewer.json", n=11).code == 0
    result = run_cli("compare", "one.json", "more.json", cwd=tmp_path)
    assert result.code == 0, result.err
    lines = {line.split("  ")[0].strip(): line.split() for line in result.out.splitlines()}
    assert lines["guidance"][-2:] == ["1", "4"] and lines[next(iter(lines))][-2:] == ["one", "more"]
    refused = run_cli("compare", "one.json", "fewer.json", cwd=tmp_path)
    assert refused.code == 2 and "one and fewer are not comparable: images: one 12, fewer 11" in refused.err
    (tmp_path / "deep").mkdir()
    shutil.copy(tmp_path / "one.json", tmp_path / "deep")
    assert "deep/one" in run_cli("compare", "one.json", "deep/one.json", cwd=tmp_path).out


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve held-out scenes, as a folder that another program made."""
    from pixelgrow.data.scenes.source import Scenes

    folder, source = tmp_path_factory.mktemp("scenes"), Scenes(n=12, captions=12, split="heldout")
    for i in range(12):
        Image.fromarray(source.image(i, (32, 32))).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(source.text(i))
    return folder


def test_a_folder_of_scenes_is_plotted(scenes: Path, run_cli: RunCli, tmp_path: Path) -> None:
    words = ["--data", "scenes", "--metrics", "scenes,mmd", "--reference", "scenes.safetensors"]
    for name in ("a", "b"):
        result = run_cli("evaluate", scenes, *words, "-o", f"{name}.json", cwd=tmp_path)
        assert result.code == 0, result.err
    assert read(tmp_path / "a.json")["metrics"] == read(tmp_path / "b.json")["metrics"]
    assert "sees 12 of 12 images" in result.err
    rows = {row["name"]: row["mean"] for row in read(tmp_path / "a.json")["metrics"]}
    assert rows["scenes-12"] >= 0.9 and rows["MMD-12 (efficientnet-lite0)"] < 0.01
    assert run_cli("compare", "a.json", "b.json", "--plot", "p.svg", cwd=tmp_path).out.endswith("plot: p.svg\n")
    root = ElementTree.fromstring((tmp_path / "p.svg").read_text(encoding="utf-8"))
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a", "b", "scenes-12 (higher is better)", "MMD-12 (efficientnet-lite0) (lower is better)"} <= set(texts)


@pytest.mark.usefixtures("_quick")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_pipeline_is_evaluated_the_same_way(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    pipeline = save_of_text(tmp_path / "p")
    words = ["--data", "scenes", "--metrics", "precision,scenes", "-n", "10", "--steps", "2", "--guidance", "3"]
    result = run_cli("evaluate", pipeline, *words, "-o", "p.json", cwd=tmp_path)
    assert result.code == 0, result.err
    found = read(tmp_path / "p.json")
    assert found["candidate"]["class"] == "StableDiffusionPipeline" and found["candidate"]["sha256"]
    assert found["candidate"]["sampling"] == {"steps": 2, "guidance": 3.0} and found["cost"]["nfe"] == 4
    assert {"precision-10 (pixels)", "scenes-10"} <= {row["name"] for row in found["metrics"]}
    refused = run_cli("evaluate", pipeline, *words, "--threshold", "0.9", "-o", "q.json", cwd=tmp_path)
    assert refused.code == 2 and "takes no threshold" in refused.err


def test_mistakes(evaluate: Evaluate, model: Path, run_cli: RunCli, tmp_path: Path, scenes: Path) -> None:
    assert evaluate("-o", "good.json").code == 0

    def line(*words: str | Path) -> str:
        result = run_cli(*words, cwd=tmp_path)
        assert result.code == 2, result.err
        *notes, last = result.err.strip().splitlines()
        assert last.startswith("pixelgrow: ") and all(": sees " in note for note in notes)
        return last

    def of(*words: str | Path) -> str:
        return line("evaluate", model, "--data", "classes", "-n", "12", *words)

    (tmp_path / "empty").mkdir()
    two = tmp_path / "two"
    two.mkdir()
    for i in range(2):
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(two / f"{i}.png")
    assert "empty: no samples in it" in line("evaluate", "empty", "--data", "scenes")
    assert "two: got 2 images to evaluate, expected at least 10" in line("evaluate", "two", "--data", "scenes")
    assert "two: got 2 real images, expected at least 10" in line("evaluate", scenes, "--data", two)
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(two / "2.png")
    assert "two: images of 2 sizes" in line("evaluate", "two", "--data", "scenes")
    assert "metric 'fdd' is unknown: did you mean fd" in of("--metrics", "fdd")
    assert "--metrics: got no name" in of("--metrics", ",")
    assert "one of the two" in line("evaluate", model)
    assert "'some/model' is not on this machine and cannot be fetched" in of("--extractor", "some/model")
    assert "nobody/nothing is not a folder here and cannot be fetched from the hub" in line(
        "evaluate", "nobody/nothing", "--data", "scenes"
    )
    assert "reference good.json is no safetensors file: make it again" in of("--reference", "good.json")
    assert "expected a name that ends in .json" in of("-o", "x.png")
    (tmp_path / "other.json").write_text('{"a": 1}')
    assert "other.json: no evaluation in it" in of("-o", "other.json")
    assert "no evaluation in it" in line("compare", "good.json", "other.json")
    assert "cannot read nowhere.json: No such file" in line("compare", "nowhere.json")
    assert "expected a name that ends in .svg" in line("compare", "good.json", "--plot", "x.png")
    assert "expected SETTING=VALUE,VALUE" in of("--sweep", "guidance")
    assert "sampler: got 'euler', expected one of" in of("--sampler", "euler")
    assert "guidance: input should be greater than or equal to 0; got '-1'" in of("--sweep", "guidance=-1,2")
    assert "has captions, and the model was trained on classes" in line("evaluate", model, "--data", "scenes")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.usefixtures("_quick")
def test_a_model_that_makes_no_finite_image(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["exit.16.conv.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = read(broken / "config.json") | {"sha256": ""}
    (broken / "config.json").write_text(json.dumps(config))
    noisy_classes(tmp_path, each=5)
    result = run_cli("evaluate", "broken", "--data", "classes", "-n", "12", *METRICS, "--steps", "1", cwd=tmp_path)
    assert result.code == 2 and "gave non-finite pixels among samples 0 to 11" in result.err.splitlines()[-1]
