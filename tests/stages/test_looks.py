"""What people look at while a stage trains: the recipe's prompts, training captions beside their images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pixelgrow
from pixelgrow.data.buckets import square
from pixelgrow.errors import UserError
from pixelgrow.pictures import GAP, to_uint8
from pixelgrow.recipe.read import load_recipe, read_recipe
from pixelgrow.recipe.stages import MAX_PREVIEW, Recipe
from pixelgrow.run import run
from pixelgrow.stages import looks
from pixelgrow.stages.materials import Materials
from runs import WEIGHTS, class_recipe, few_samples, stopped_after

SHORT: dict[str, Any] = {"images": 16, "batch": 8, "sample_every": 8, "validate_every": 0, "snapshot_every": 0}
CAT, DOG = "a red circle and a cat", "a dog"


@pytest.fixture(scope="module", autouse=True)
def _few_samples() -> Iterator[None]:
    with few_samples():
        yield


def recipe_of(name: str, preview: list[str]) -> Recipe:
    """Scenes of two captions: the prompts of `preview` are as long as these, and would be encoded beside them."""
    data = {"source": "scenes", "n": 64, "captions": 2}
    stages = [
        {"train": {"name": "core", "size": "tiny", "resolution": 16, "save_every": 8, **SHORT}},
        {"grow": {"name": "grown", "to": 32, **SHORT}},
        {"pairs": {"name": "pairs", "from": "core", "n": 8, "batch": 8, "shard": 8, "steps": 2}},
        {"distill": {"name": "onestep", "pairs": "pairs", **SHORT}},
    ]
    held = {"source": "scenes", "split": "heldout", "n": 8, "captions": 8}
    raw = {"name": name, "text": {"max_tokens": 16}, "data": data, "heldout": held, "stages": stages}
    return read_recipe(raw | ({"preview": preview} if preview else {}), "test")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without `preview`, and one whose prompts change on the way."""
    root = tmp_path_factory.mktemp("runs")
    run(recipe_of("plain", []), root)
    with stopped_after(8):
        run(recipe_of("looked", [CAT]), root)
    run(recipe_of("looked", [CAT, DOG]), root)
    return root


def tiles(path: Path, side: int, columns: int) -> np.ndarray:
    """The images of a grid, (rows, columns, side, side, 3)."""
    with Image.open(path) as image:
        sheet = np.asarray(image)
    step = side + GAP
    rows = (sheet.shape[0] + GAP) // step
    cut = [
        [sheet[y : y + side, x : x + side] for x in range(0, columns * step, step)] for y in range(0, rows * step, step)
    ]
    return np.array(cut)


def test_prompts_change_no_weight(runs: Path) -> None:
    for stage in ("core", "grown", "onestep"):
        looked, plain = ((runs / name / stage / WEIGHTS).read_bytes() for name in ("looked", "plain"))
        assert looked == plain
    cache = [next((runs / name / "text").glob("*/records.f16")).read_bytes() for name in ("looked", "plain")]
    assert cache[0] == cache[1]


def test_a_grid_has_the_prompts_and_training_captions_beside_their_images(runs: Path) -> None:
    known = Materials(recipe_of("looked", []), runs / "looked")
    mixture = known.data.mixture(known.recipe.stages[0])  # type: ignore[arg-type]
    images = known.known(mixture, 3, square(16))
    assert [source.name for source, _ in images.origins] == [mixture.sources[0].name] * 3
    text = (runs / "looked" / "core" / "samples" / "prompts.txt").read_text(encoding="utf-8")
    captions = "".join(f"  {caption}\n" for caption in images.captions)
    assert text == (
        f"row 1: the recipe's preview\n  {CAT}\n  {DOG}\n"
        f"row 2: captions of training images\n{captions}row 3: these training images\n"
    )
    shown = tiles(runs / "looked" / "core" / "samples" / "000000016.png", 16, 3)
    assert len(shown) == 3 and (shown[0, 2] == 255).all()
    assert (shown[2] == to_uint8(images.pixels(range(3)))).all()
    plain = (runs / "plain" / "core" / "samples" / "prompts.txt").read_text(encoding="utf-8")
    assert plain.startswith("row 1: held-out captions\n") and plain.endswith(text[text.index("captions of") :])
    model = pixelgrow.load(runs / "looked" / "core")
    settings = {"seed": 0, "steps": 2, "guidance": looks.GRID_GUIDANCE}
    for row, prompts, first in ((0, [CAT, DOG], 0), (1, images.captions, 2)):
        wanted = model.sample(prompts, index=range(first, first + len(prompts)), **settings)
        assert np.abs(shown[row, : len(prompts)].astype(int) - np.stack(wanted)).max() <= 1


def test_a_growth_is_shown_before_and_after_on_the_same_prompts(runs: Path) -> None:
    step = 32 + GAP
    for name, count in (("looked", 2), ("plain", looks.GRID)):
        with Image.open(runs / name / "grown" / "after.png") as sheet:
            assert sheet.size == (count * step - GAP, 32)
    assert CAT in (runs / "looked" / "report.html").read_text(encoding="utf-8")


def test_a_generator_is_shown_beside_its_teacher(runs: Path) -> None:
    folder = runs / "looked" / "onestep" / "samples"
    heads = [line for line in (folder / "prompts.txt").read_text(encoding="utf-8").splitlines() if line[0] == "r"]
    kinds = ("by the teacher", "by the generator from the same latents")
    assert heads == [
        *(f"row {i + 1}: the recipe's preview, {kind}" for i, kind in enumerate(kinds)),
        *(f"row {i + 3}: captions of training images, {kind}" for i, kind in enumerate(kinds)),
        "row 5: these training images",
        "row 6: held-out images, reconstructed by the generator",
        "row 7: these held-out images",
    ]
    shown = tiles(folder / "000000016.png", 16, 8)
    for name, rows, guidance in (("core", (0, 2), 1.0), ("onestep", (1, 3), None)):
        model = pixelgrow.load(runs / "looked" / name)
        settings: dict[str, Any] = {} if guidance is None else {"steps": 2, "guidance": guidance}
        made = model.sample([CAT, DOG], seed=0, **settings)
        assert np.abs(shown[rows[0], :2].astype(int) - np.stack(made)).max() <= 1
    grid = runs / "plain" / "onestep" / "samples" / "000000016.png"
    assert (tiles(grid, 16, 8)[-2:] == shown[-2:]).all()


def test_prompts_of_classes_are_their_names_or_numbers(tmp_path: Path) -> None:
    recipe = class_recipe(tmp_path, {"classes": 2}, sample_every=8).model_copy(update={"preview": ("light", "0")})
    run(recipe, tmp_path)
    lines = (tmp_path / "c" / "core" / "samples" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["row 1: the recipe's preview", "  light", "  0"]
    assert set(lines[4:7]) <= {"  dark", "  light"}
    other = recipe.model_copy(update={"preview": ("grey",), "name": "d"})
    with pytest.raises(UserError, match="class 'grey' is unknown: expected one of dark, light"):
        run(other, tmp_path)
    assert not (tmp_path / "d" / "core").exists()


def test_a_prompt_that_is_cut_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    materials = Materials(recipe_of("x", ["cat " * 20, DOG]), tmp_path / "x")
    for _ in range(2):
        assert len(materials.preview_cond()) == 2
    assert [m.partition(";")[0] for m in caplog.messages if "cut" in m] == [
        "preview: 1 of 2 prompts is longer than 16 tokens and is cut"
    ]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("preview=a cat, sitting: #1", ("a cat, sitting: #1",)),
        ('preview=["a cat", "a dog"]', ("a cat", "a dog")),
        ("preview=7", ("7",)),
        ("preview=[7, a dog]", ("7", "a dog")),
        ("preview=[]", ()),
    ],
)
def test_prompts_on_the_command_line(given: str, prompts: tuple[str, ...]) -> None:
    assert load_recipe("smoke", [given]).preview == prompts


@pytest.mark.parametrize("given", ["preview=[1.5]", "preview={a: b}", f"preview={['x'] * (MAX_PREVIEW + 1)}"])
def test_what_is_no_list_of_prompts_is_one_line(given: str) -> None:
    with pytest.raises(UserError, match=r"^smoke: preview") as error:
        load_recipe("smoke", [given])
    assert "\n" not in str(error.value)


def test_training_images_that_cannot_be_decoded_are_passed_over(tmp_path: Path) -> None:
    recipe = class_recipe(tmp_path, {"classes": 2})
    materials = Materials(recipe, tmp_path / "c")
    mixture = materials.data.mixture(recipe.stages[0])  # type: ignore[arg-type]
    order = [source.key(i) for source, i in materials.data.training_order(mixture, square(16))]
    held = {source.key(i) for source, i in materials.data.heldout_order(square(16))}
    assert len(order) == 12 and not held & set(order)
    for key in order[:10]:
        file = tmp_path / "images" / key
        file.write_bytes(file.read_bytes()[:-40])
    found = materials.known(mixture, 8, square(16))
    assert [source.key(i) for source, i in found.origins] == order[10:]
    for key in order[10:]:
        file = tmp_path / "images" / key
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="can be decoded; pixelgrow data shows why"):
        materials.known(mixture, 8, square(16))
