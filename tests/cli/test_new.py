"""The `new` verb: what it finds in images of all kinds, and that the recipes that it writes run."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import RunCli
from pixelgrow.cli import new
from pixelgrow.cli.new import flow, quoted
from pixelgrow.plan.machine import Machine
from pixelgrow.recipe.plain_yaml import Loader, scalar
from pixelgrow.recipe.read import load_recipe
from pixelgrow.recipe.stages import Recipe
from runs import few_samples, record

LAPTOP = Machine(cores=2, memory=8 << 30, rate=100e9)


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new, "this_machine", lambda: LAPTOP)


def png(number: int, size: tuple[int, int] = (64, 72), alpha: bool = False) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (*size, 4 if alpha else 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def captioned(folder: Path, count: int = 12, size: tuple[int, int] = (64, 72), alpha: bool = False) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(i, size, alpha))
        (folder / f"{i}.txt").write_text(f'a "thing": number {i} #{i % 3} \N{RED APPLE}\n', encoding="utf-8")
    return folder


def classes(folder: Path) -> Path:
    for i in range(24):
        (folder / ("no", "a cat")[i % 2]).mkdir(parents=True, exist_ok=True)
        (folder / ("no", "a cat")[i % 2] / f"{i}.png").write_bytes(png(i))
    return folder


def shards(folder: Path) -> Path:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(10):
                for suffix, data in (("png", png(i + 10 * shard)), ("txt", f"picture {shard} {i}".encode())):
                    info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def splits(folder: Path) -> Path:
    captioned(folder / "train", 20)
    captioned(folder / "test", 4)
    return folder


SHORT = ["images=8", "batch=8", "sample_every=8", "validate_every=0", "snapshot_every=0"]
KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "captions": (captioned, "{source: my pictures}, {fraction: 0.02, at_most: 2}"),
    "classes": (classes, "{source: my pictures, kind: classes}, {fraction: 0.02, at_most: 2}"),
    "shards": (shards, "{source: my pictures}, {fraction: 0.02, at_most: 2}"),
    "splits": (splits, "{source: my pictures/train}, {source: my pictures/test}"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_writes_runs(kind: str, tmp_path: Path, run_cli: RunCli) -> None:
    make, data = KINDS[kind]
    make(tmp_path / "my pictures")
    made = run_cli("new", "my pictures", cwd=tmp_path)
    assert (made.code, made.err) == (0, "")
    assert made.out.splitlines()[-1] == "written to my-pictures.yaml; train it with: pixelgrow run my-pictures.yaml"
    recipe = load_recipe(tmp_path / "my-pictures.yaml")
    wanted = [f"{{{part.strip('{}')}}}" for part in data.split("}, {")]
    got = (recipe.data[0], recipe.heldout)
    for spec, of in zip(wanted, got, strict=True):
        raw = dict(pair.split(": ") for pair in spec.strip("{}").split(", "))
        assert {k: str(v) for k, v in of.model_dump(exclude_unset=True).items()} == raw
    assert [stage.name for stage in recipe.stages] == ["core", "grown64", "eval"]
    small = [f"stages.{stage}.{setting}" for stage in ("core", "grown64") for setting in SHORT]
    words = [w for s in (*small, "stages.eval.prompts=1", "stages.eval.steps=2") for w in ("--set", s)]
    with few_samples():
        ran = run_cli("run", "my-pictures.yaml", *words, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert all(record(tmp_path / "runs" / "my-pictures" / stage)["done"] for stage in ("core", "grown64", "eval"))
    prompts = (tmp_path / "runs/my-pictures/core/samples/prompts.txt").read_text(encoding="utf-8")
    assert prompts.startswith(f"row 1: the recipe's preview\n  {recipe.preview[0]}\n")
    if kind == "classes":
        assert recipe.text.classes == 2 and recipe.preview == ("a cat", "no")
    if kind == "captions":  # again: neither the recipe nor the run is touched
        again = run_cli("new", "my pictures", cwd=tmp_path)
        assert again.code == 0 and "written to my-pictures-2.yaml" in again.out
        assert load_recipe(tmp_path / "my-pictures-2.yaml").name == "my-pictures-2"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.mkdir(), "no images in it"),
        (lambda folder: captioned(folder, 1), "too few to hold some out; add images"),
        (
            lambda folder: captioned(folder, size=(15, 200)),
            "their smaller sides are 15 to 15 px, and the smallest core",
        ),
        (lambda folder: [file.unlink() for file in captioned(folder).glob("*.txt")], "12 images without captions; exp"),
        (lambda folder: None, "no such folder or file"),
        (lambda folder: folder.write_bytes(png(0)), "a single image is no source"),
    ],
    ids=["empty", "one", "small", "bare", "missing", "file"],
)
def test_what_cannot_be_trained_on_is_one_line(
    make: Callable[[Path], object], words: str, tmp_path: Path, run_cli: RunCli
) -> None:
    make(tmp_path / "x")
    made = run_cli("new", "x", cwd=tmp_path)
    assert (made.code, made.out, made.err.count("\n")) == (2, "", 1)
    assert words in made.err
    assert not list(tmp_path.glob("*.yaml"))


def test_nothing_is_overwritten_and_nothing_lies_among_the_images(tmp_path: Path, run_cli: RunCli) -> None:
    captioned(tmp_path / "x")
    (tmp_path / "x.yaml").write_text("mine", encoding="utf-8")
    assert "x.yaml exists: name another file with -o" in run_cli("new", "x", cwd=tmp_path).err
    assert (tmp_path / "x.yaml").read_text(encoding="utf-8") == "mine"
    assert "x.yaml would lie in ., where nothing is written" in run_cli("new", ".", cwd=tmp_path / "x").err
    assert run_cli("new", ".", "-o", "../y.yaml", cwd=tmp_path / "x").code == 0
    assert load_recipe(tmp_path / "y.yaml").data[0].source == str(tmp_path / "x")  # it is run from elsewhere
    assert "the built-in scenes have a recipe: demo" in run_cli("new", "scenes", cwd=tmp_path).err


def made_of(folder: Path, run_cli: RunCli) -> tuple[Recipe, str]:
    out = folder.with_name("made.yaml")
    made = run_cli("new", folder, "-o", out)
    assert made.code == 0, made.err
    return load_recipe(out), out.read_text(encoding="utf-8")


def test_objects_on_a_transparent_ground_are_shown_whole(tmp_path: Path, run_cli: RunCli) -> None:
    recipe, text = made_of(captioned(tmp_path / "stamps", 20, (40, 70), alpha=True), run_cli)
    assert recipe.data[0].fit == "pad"
    assert [stage.name for stage in recipe.stages] == ["core", "grown64", "eval"]  # of the longer side
    assert "transparent parts of 18 are white" in text
    square, _ = made_of(captioned(tmp_path / "a" / "square", 20, (64, 64), alpha=True), run_cli)
    photos, _ = made_of(captioned(tmp_path / "b" / "photos", 20, (40, 70)), run_cli)
    assert square.data[0].fit is photos.data[0].fit is None
    assert photos.stages[-1].name == "eval" and len(photos.stages) == 2


def test_long_captions_are_read_and_many_bad_files_allowed(tmp_path: Path, run_cli: RunCli) -> None:
    folder = captioned(tmp_path / "long", 20)
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"{i} {'word ' * 50}", encoding="utf-8")
    (folder / "0.png").write_bytes(png(0)[:200])
    recipe, text = made_of(folder, run_cli)
    assert recipe.text.max_tokens == 64
    assert "captions have 51 words, up to 51\n" in text
    limits = [stage.bad_limit for stage in recipe.stages if hasattr(stage, "bad_limit")]
    assert limits == [0.11, 0.11]
    assert len(recipe.preview) == 1  # captions this long are shown once


def test_the_recipe_says_what_it_does(tmp_path: Path, run_cli: RunCli) -> None:
    recipe, text = made_of(captioned(tmp_path / "x", 12), run_cli)
    assert text.splitlines()[0] == (
        "# Made by pixelgrow new for 12 images, to train about 6 min on 2 CPU cores with 8.0 GiB of memory."
    )
    assert (
        "  # A tiny core learns the image as a whole, at 32 px: about 5 min.\n"
        "  # It sees 10 of 12 images: 2 held out.\n" in text
    )
    assert recipe.preview[0] == 'a "thing": number 0 #0 \N{RED APPLE}'
    assert len(recipe.preview) == new.PROMPTS
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    "text", ['a "b"', "it's: #1", "\udcff/x", "\\n", "\x07\u2028", "null", "1e3", "~", "\N{RED APPLE}"]
)
def test_texts_survive(text: str) -> None:
    import yaml

    assert yaml.load(quoted(text), Loader) == text
    assert yaml.load(f"{{source: {flow(text)}, n: 1}}", Loader) == {"source": text, "n": 1}
    assert scalar("a/b-c.d") == flow("a/b-c.d") == "a/b-c.d"
