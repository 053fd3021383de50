"""Search on previews: judges, the best of many, and that a preview is what the image averages down to."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pixelgrow
from exact_models import exact_model
from onestep.test_features import save_both
from pixelgrow.data.scenes.checker import check
from pixelgrow.data.scenes.parsing import read
from pixelgrow.data.scenes.questions import questions
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.data.scenes.vocabulary import BACKGROUNDS, COLOURS
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.errors import UserError
from pixelgrow.growth import ungrown
from pixelgrow.model import Model
from pixelgrow.models.uvit import UViT
from pixelgrow.search import best_of, judge_named
from pixelgrow.search.judges import checker

FEW = {"steps": 3, "guidance": 2.0}


@pytest.fixture(scope="module")
def exact() -> Model:
    return exact_model()


def down(image: Image.Image, k: int) -> np.ndarray:
    pixels = np.asarray(image, np.float64)
    h, w, _ = pixels.shape
    return pixels.reshape(h // k, k, w // k, k, 3).mean((1, 3))


def test_an_image_averages_down_to_its_preview_within_a_grey_level(exact: Model) -> None:
    prompt = "a red circle above two blue stars"
    thumbnails = exact.preview([prompt] * 4, seed=5, **FEW)
    (large,) = exact.sample(prompt, index=[2], seed=5, **FEW)
    assert thumbnails[2].size == (32, 32) and large.size == (64, 64)
    assert np.abs(down(large, 2) - np.asarray(thumbnails[2], np.float64)).max() <= 1
    assert np.abs(down(large, 2) - np.asarray(thumbnails[1], np.float64)).max() > 20


def test_the_judge_chooses(exact: Model) -> None:
    seen: list[int] = []

    def darkest(images: Sequence[Image.Image], prompt: str) -> list[float]:
        seen.append(len(images))
        return [-float(np.asarray(i).mean()) for i in images]

    prompts = ["a red circle", "a blue star on a green background"]
    winners = best_of(exact, prompts, judge=darkest, of=5, keep=2, batch=3, seed=1, **FEW)
    assert seen == [5, 5] and [w.prompt for w in winners] == prompts
    previews = exact.preview([p for p in prompts for _ in range(5)], seed=1, **FEW)
    for number, winner in enumerate(winners):
        means = [np.asarray(i).mean() for i in previews[5 * number : 5 * number + 5]]
        assert [i - 5 * number for i in winner.index] == list(np.argsort(means)[:2])
        assert winner.scores == sorted(winner.scores, reverse=True)


def test_the_checker_as_a_judge_scores_by_questions_answered() -> None:
    scene = Scenes(n=4, captions=4).scene(0)
    right, wrong = Image.fromarray(scene.render(64, 64)), Image.new("RGB", (64, 64), "black")
    assert checker([right, wrong], scene.caption) == [1.0, 0.0]
    with pytest.raises(UserError, match="judge checker: cannot read the prompt 'a cat'"):
        checker([right], "a cat")


def two_squares(x: int, *, gap: float = 0, speck: float = 0) -> Image.Image:
    """A preview of two red squares on gray, the second at column `x`; faint reds fill column 14 and a speck above."""
    ground, ink = np.array(BACKGROUNDS["gray"], float), np.array(COLOURS["red"], float)
    pixels = np.tile(ground, (32, 32, 1))
    pixels[16:24, 6:14] = pixels[16:24, x : x + 8] = ink
    pixels[16:24, 14] += gap * (ink - ground)
    pixels[4:9, 20:25] += speck * (ink - ground)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def test_a_preview_that_other_edges_turn_wrong_loses_against_one_that_they_do_not(
    exact: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption = "two red squares on a gray background"  # 4 questions: background, colour, shape, count
    merges = two_squares(15, gap=0.25)  # softened it is one red rectangle: shape and count are wrong
    appears = two_squares(18, speck=0.28)  # sharpened it holds a third red object: the count is wrong
    robust = two_squares(15, gap=0.1, speck=0.25)  # nearly so: right in every look
    previews = [merges, appears, robust]
    spec = read(caption)
    assert spec and all(all(check(np.asarray(preview), questions(spec))) for preview in previews)
    assert checker(previews, caption) == pytest.approx([(4 + 2 + 4) / 12, (4 + 4 + 3) / 12, 1])
    monkeypatch.setattr(Model, "stream", lambda *_, **__: iter(previews))
    (winner,) = best_of(exact, caption, judge="checker", of=3, keep=3)
    assert winner.index == [2, 1, 0]


def test_judges_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("mine")
    module.score = lambda images, prompt: [1.0] * len(images)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)
    assert judge_named("mine:score")([Image.new("RGB", (8, 8))], "") == [1.0]
    assert judge_named("checker") is checker
    wrong = {"nowhere:score": "cannot be imported", "mine:other": "cannot be imported", "sys:path": "is no function"}
    for name, words in wrong.items():
        with pytest.raises(UserError, match=f"judge {name!r}: {words}"):
            judge_named(name)


def test_prompts_that_the_checker_cannot_read_are_refused_before_sampling(
    exact: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "_images", lambda *_: pytest.fail("sampled"))
    with pytest.raises(UserError, match="cannot read the prompt 'a cat'"):
        best_of(exact, ["a red circle", "a cat"], judge="checker", of=2, **FEW)


def test_mistakes_are_one_line(exact: Model) -> None:
    with pytest.raises(UserError, match="best of 4: got 5 to keep"):
        best_of(exact, "a red circle", judge="checker", of=4, keep=5)
    with pytest.raises(UserError, match="the judge gave 1 scores for 2 images"):
        best_of(exact, "a red circle", judge=lambda *_: [1.0], of=2, **FEW)
    plain = Model(Denoiser(UViT(ungrown(exact.denoiser).net.config)), exact.config)
    with pytest.raises(UserError, match="no preview: "):
        best_of(plain, "a red circle", judge="checker", of=2, **FEW)


def test_another_model_as_the_guide_leaves_no_preview_and_says_so(
    exact: Model, caplog: pytest.LogCaptureFixture
) -> None:
    guide = Model(exact.denoiser, exact.config)
    with pytest.raises(UserError, match="no preview: the guide is another model"):
        exact.preview("a red circle", guide=guide, **FEW)
    caplog.clear()
    with caplog.at_level("INFO"):
        exact.sample(["a red circle"] * 3, guide=guide, batch=1, **FEW)
        assert caplog.messages == ["the guide is another model: sampling at full resolution throughout"]
        exact.sample("a red circle", guide=exact.denoiser.base, **FEW)
        exact.sample("a red circle", **FEW)
    assert len(caplog.messages) == 1


def test_a_clip_is_a_judge(tmp_path: Path) -> None:
    save_both(tmp_path)
    judge = judge_named(str(tmp_path))
    scores = judge([Image.new("RGB", (32, 32), c) for c in ("red", "blue", "red")], "a red circle")
    assert len(scores) == 3 and scores[0] == pytest.approx(scores[2]) and all(-1 <= s <= 1 for s in scores)


def test_python_users_reach_it() -> None:
    assert pixelgrow.search.best_of is best_of
