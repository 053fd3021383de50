"""What captions take, told before they are encoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixelgrow.plan.text import plan_text
from pixelgrow.recipe.data import TextSpec
from pixelgrow.recipe.read import read_recipe
from pixelgrow.report.tables import text_line
from pixelgrow.stages.foresight import foreseen
from pixelgrow.text.cache import TextCache
from pixelgrow.text.encoders import load_spec
from pixelgrow.text.spec import describe
from text_models import TEXTS, save_clip, save_t5


@pytest.mark.parametrize("whole", [False, True])
def test_size_and_work_are_those_of_encoding(tmp_path: Path, whole: bool) -> None:
    save_t5(tmp_path / "t5", whole=whole)
    name = str(tmp_path / "t5")
    cache = TextCache(tmp_path / "cache", name, 16)
    cache.ensure(TEXTS)
    plan = plan_text(TextSpec(encoder=name, max_tokens=16), len(TEXTS), TEXTS)
    assert plan is not None
    on_disk = sum((cache.folder / file).stat().st_size for file in ("records.f16", "index.bin"))
    assert len(TEXTS) * plan.size == pytest.approx(on_disk)
    encoder = load_spec(describe(name, 16))
    layers = {n: p.numel() for n, p in encoder.model.named_parameters() if "shared" not in n and "embed" not in n}
    assert plan.flops == pytest.approx(2 * sum(layers.values()) * plan.tokens, rel=0.05)
    assert plan.seconds(1e9) == pytest.approx(len(TEXTS) * plan.flops / 1e9)


def test_the_tower_of_images_takes_no_part(tmp_path: Path) -> None:
    plans = []
    for whole in (False, True):
        save_clip(tmp_path / str(whole), whole)
        plans.append(plan_text(TextSpec(encoder=str(tmp_path / str(whole)), max_tokens=16)))
    assert plans[0] is not None and plans[1] is not None
    assert plans[0].flops == plans[1].flops > 0 and plans[0].tokens == 16


def test_a_plan_looks_at_the_data(tmp_path: Path) -> None:
    save_t5(tmp_path / "t5")
    train = {"name": "core", "size": "tiny", "resolution": 16, "images": 8}
    given = {"name": "r", "data": {"source": "scenes", "n": 50, "captions": 20}, "stages": [{"train": train}]}
    text = {"encoder": str(tmp_path / "t5"), "max_tokens": 16}
    found = foreseen(read_recipe(given | {"text": text}, "test")).text
    assert found is not None and found.captions == 20 and 4 < found.tokens <= 16
    line = str(text_line(found, Path("runs/r/text"), 1e9))
    assert line.startswith("text: at most 20 captions to train on, of") and "KiB in runs/r/text, 0 s of enc" in line
    online = foreseen(read_recipe(given | {"text": text | {"online": True}}, "test")).text
    assert online is not None and "while training, and nothing is stored" in str(text_line(online, Path(), 1e9))
    unseen = plan_text(TextSpec(encoder=str(tmp_path / "t5"), max_tokens=16))
    assert unseen is not None and "captions of at most 16 tokens" in str(text_line(unseen, Path("x"), 1e9))
    assert plan_text(TextSpec(encoder="labels:3")) is None and plan_text(TextSpec(encoder="t5-of-the-hub")) is None
