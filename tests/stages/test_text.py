"""Text in a run: a cache of its own, a cache that recipes share, captions encoded while stages train."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pixelgrow.recipe.read import Recipe, read_recipe
from pixelgrow.run import run
from pixelgrow.stages.materials import LOOKED_AT, Materials
from pixelgrow.text import cache as text_cache
from pixelgrow.text.online import OfWidth, OnlineText
from runs import WEIGHTS, few_samples
from text_models import save_t5


@pytest.fixture(scope="module", autouse=True)
def _few_samples() -> Iterator[None]:
    with few_samples():
        yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder") / "t5"
    save_t5(folder)
    return str(folder)


def recipe(name: str, encoder: str, distil: bool = True, **text: Any) -> Recipe:
    small = {"batch": 4, "sample_every": 0, "snapshot_every": 0, "validate_every": 0, "ema": [0.1]}
    train = {"name": "core", "size": "tiny", "resolution": 16, "images": 8, "accumulate": 2, "workers": 1, **small}
    pairs = {"name": "pairs", "from": "core", "n": 4, "steps": 2, "batch": 4, "shard": 4, "direction": "sample"}
    distill = {"name": "one", "from": "core", "pairs": "pairs", "images": 4, "workers": 1, **small}
    stages: list[dict[str, Any]] = [{"train": train}]
    stages += [{"pairs": pairs}, {"distill": distill}] if distil else []
    return read_recipe(
        {
            "name": name,
            "text": {"encoder": encoder, "max_tokens": 16, **text},
            "data": {"source": "scenes", "n": 40, "captions": 20},
            "stages": stages,
        },
        "test",
    )


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, encoder: str) -> Path:
    """A run with a text cache elsewhere than in its folder."""
    root = tmp_path_factory.mktemp("runs")
    run(recipe("first", encoder, cache=str(root / "shared")), root)
    return root / "first"


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [v for row in rows for k, v in row.items() if k.endswith("loss")]


def test_captions_encoded_online_train_as_those_of_a_cache(cached: Path, encoder: str, tmp_path: Path) -> None:
    run(recipe("online", encoder, online=True), tmp_path)
    assert not (tmp_path / "online" / "text").exists()
    for stage in ("core", "one"):
        mine, theirs = losses(tmp_path / "online" / stage), losses(cached / stage)
        assert len(mine) >= 2 and mine == pytest.approx(theirs, rel=1e-3)
        one, other = (load_file(root / stage / WEIGHTS) for root in (tmp_path / "online", cached))
        assert one.keys() == other.keys()
        differ = torch.cat([(one[name].float() - other[name].float()).abs().flatten() for name in one])
        assert 0 < float(differ.mean()) < 1e-4  # a cache rounds to half precision
    mean = "core.text_mean"
    one, other = (load_file(root / "core" / WEIGHTS)[mean] for root in (tmp_path / "online", cached))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_recipes_share_a_cache(cached: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not (cached / "text").exists()
    monkeypatch.setattr(text_cache, "load_spec", lambda *_: pytest.fail("captions were encoded again"))
    run(recipe("second", encoder, distil=False, cache=str(cached.parent / "shared")), tmp_path)
    assert not (tmp_path / "second" / "text").exists()
    assert (tmp_path / "second" / "core" / WEIGHTS).read_bytes() == (cached / "core" / WEIGHTS).read_bytes()


def test_captions_encoded_online_are_not_all_read(encoder: str, tmp_path: Path) -> None:
    materials = Materials(recipe("online", encoder, online=True), tmp_path)
    read = 0

    def captions() -> Iterator[str]:
        nonlocal read
        for read in count(1):
            yield f"a red circle {read}"

    assert len(materials.encode("core", captions())) == LOOKED_AT == read
    assert isinstance(materials.text, OnlineText)


def test_a_compiled_stage_sees_captions_of_one_length(encoder: str, tmp_path: Path) -> None:
    made = recipe("width", encoder, distil=False)
    materials = Materials(made, tmp_path)
    settings = made.stages[0].training()  # type: ignore[union-attr]
    assert materials.conditions(settings) is materials.text
    found = materials.conditions(settings.model_copy(update={"compile": True}))
    assert isinstance(found, OfWidth) and found.width == 16
    materials.text.ensure(["a red circle"])
    assert found.arrays(["a red circle"])["tokens"].shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"online": True, "cache": "x"}, "got online: true and cache: x"),
        ({"classes": 3, "online": True}, "got online: true and classes: 3"),
        ({"classes": 3, "cache": "x"}, "got cache: x, but class labels are not encoded"),
    ],
)
def test_settings_that_make_no_sense(text: dict[str, Any], message: str) -> None:
    given = {"name": "odd", "text": text, "data": {"source": "scenes"}, "stages": [{"evaluate": {"name": "e"}}]}
    with pytest.raises(ValueError, match=message):
        read_recipe(given, "test")
