"""What captions take, told before they are encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pixelgrow.plan.text import plan_text
from pixelgrow.recipe.read import Recipe, load_recipe, read_recipe
from pixelgrow.report.tables import text_line
from pixelgrow.stages.foresight import foreseen
from pixelgrow.text.cache import TextCache
from pixelgrow.text.encoders import load_spec
from pixelgrow.text.spec import describe
from text_models import TEXTS, save_clip, save_t5


def recipe(encoder: str, **text: Any) -> Recipe:
    train = {"name": "core", "size": "tiny", "resolution": 16, "images": 8}
    given = {"name": "r", "data": {"source": "scenes", "n": 50, "captions": 20}, "stages": [{"train": train}]}
    return read_recipe(given | {"text": {"encoder": encoder, "max_tokens": 16, **text}}, "test")


@pytest.mark.parametrize("whole", [False, True])
def test_size_and_work_are_those_of_encoding(tmp_path: Path, whole: bool) -> None:
    save_t5(tmp_path / "t5", whole=whole)
    name = str(tmp_path / "t5")
    cache = TextCache(tmp_path / "cache", name, 16)
    cache.ensure(TEXTS)
    plan = plan_text(recipe(name), len(TEXTS), TEXTS)
    assert plan is not None
    on_disk = sum((cache.folder / file).stat().st_size for file in ("records.f16", "index.bin"))
    assert len(TEXTS) * plan.size == pytest.approx(on_disk)
    encoder = load_spec(describe(name, 16))
    layers = {n: p.numel() for n, p in encoder.model.named_parameters() if "shared" not in n and "embed" not in n}
    assert plan.flops is not None and plan.flops == pytest.approx(2 * sum(layers.values()) * plan.tokens, rel=0.05)
    assert plan.seconds(1e9) == pytest.approx(len(TEXTS) * plan.flops / 1e9)


def test_the_tower_of_images_takes_no_part(tmp_path: Path) -> None:
    plans = []
    for whole in (False, True):
        save_clip(tmp_path / str(whole), whole)
        plans.append(plan_text(recipe(str(tmp_path / str(whole)))))
    assert plans[0] is not None and plans[1] is not None and plans[0].flops
    assert plans[0].flops == plans[1].flops and plans[0].tokens == 16


def test_a_plan_looks_at_the_data(tmp_path: Path) -> None:
    save_t5(tmp_path / "t5")
    name = str(tmp_path / "t5")
    found = foreseen(recipe(name)).text
    assert found is not None and found.captions == 20 and 4 < found.tokens <= 16
    line = str(text_line(found, Path("runs/r/text"), 1e9))
    assert line.startswith(f"text: at most 20 captions to train on, of {found.tokens:.3g} tokens, encoded once (")
    assert line.endswith("KiB in runs/r/text, 0 s of encoding")
    online = foreseen(recipe(name, online=True)).text
    assert online is not None and str(text_line(online, Path(), 1e9)).endswith("FLOP each), and nothing is stored")


def test_an_encoder_that_is_not_here_has_its_size_told() -> None:
    online = plan_text(load_recipe("huge"))  # of a published shape: 4.6 G parameters of matrices, in bfloat16
    assert online is not None and online.resident == pytest.approx(2 * 4.63e9, rel=0.001)
    huge = load_recipe("huge", ["text.online=false", "text.encoder=google/t5-v1_1-other"])
    plan = plan_text(huge, 12_400_000)
    assert plan is not None and plan.seconds(1e15) is None
    line = str(text_line(plan, Path("x"), 1e15))
    assert line == "text: at most 12,400,000 captions to train on, of at most 128 tokens, encoded once: 11.9 TiB in x"
    assert "1.0 MiB each in x" in str(text_line(plan_text(huge), Path("x"), 1e15))  # type: ignore[arg-type]
    assert plan_text(recipe("labels:3")) is None
