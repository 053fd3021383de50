"""The checker: right on clean images at every size, robust to blur and noise, at chance on the wrong caption."""

import time
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from pixelgrow.data.scenes.checker import accuracy, check, score
from pixelgrow.data.scenes.questions import KINDS, Question
from pixelgrow.data.scenes.seeing import Seen, View, components, look
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.errors import UserError

Image = NDArray[np.uint8]
SCENES = [Scenes(split="heldout").scene(i) for i in range(300)]
ASKED = [s.questions for s in SCENES]


def blur(image: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        padded = np.pad(image, [(3, 3) if a == axis else (0, 0) for a in range(3)], mode="edge")
        parts = (t * np.take(padded, range(k, k + image.shape[axis]), axis) for k, t in enumerate(taps / taps.sum()))
        image = np.sum(list(parts), axis=0)
    return image


def spoil(image: Image, sigma: float, noise: float, seed: int) -> Image:
    spoilt = blur(image.astype(float), sigma) + np.random.default_rng(seed).normal(0, noise, image.shape)
    return np.clip(spoilt + 0.5, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "n"), [((32, 32), 300), ((64, 64), 300), ((128, 128), 150), ((256, 256), 100), ((64, 96), 100)]
)
def test_clean_images(size: tuple[int, int], n: int) -> None:
    found = score((s.render(*size) for s in SCENES[:n]), ASKED[:n])
    assert set(found) == {*KINDS, "all"}
    assert min(found.values()) >= 0.99, found


@pytest.mark.parametrize("size", [32, 64])
def test_blurred_noisy_images(size: int) -> None:
    spoilt = (spoil(s.render(size, size), 0.5, 8.0, i) for i, s in enumerate(SCENES[:150]))
    found = score(spoilt, ASKED[:150])
    assert min(found.values()) >= 0.95, found


def test_chance_on_shuffled_captions() -> None:
    images = [s.render(32, 32) for s in SCENES]
    shuffled = score(images, ASKED[1:] + ASKED[:1])
    views = [s.view() for s in SCENES]
    pairs = [(v, q) for i, v in enumerate(views) for j, q in enumerate(ASKED) if i != j]
    expected = accuracy((v for v, _ in pairs), [q for _, q in pairs])
    for kind in KINDS:
        assert shuffled[kind] == pytest.approx(expected[kind], abs=0.06)
    assert expected["background"] < 0.2
    assert expected["colour"] < 0.3
    assert expected["shape"] < 0.1
    assert expected["count"] < 0.1
    assert expected["relation"] < 0.05


def test_sees_the_truth() -> None:
    def key(o: Seen) -> tuple[str, int, int]:
        return o.colour, round(o.y * 4), round(o.x * 4)

    for scene in SCENES[:60]:
        seen, truth = look(scene.render(64, 64)), scene.view()
        assert seen.background == truth.background
        assert len(seen.objects) == len(truth.objects)
        for o in truth.objects:
            nearest = min(seen.objects, key=lambda s: (s.y - o.y) ** 2 + (s.x - o.x) ** 2)
            assert (nearest.colour, nearest.shape) == (o.colour, o.shape)
            assert abs(nearest.y - o.y) + abs(nearest.x - o.x) < 0.08  # a triangle's mass lies below its centre


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"background": "pink"}, "background"),
        ({"objects": (Seen("red", "square", 0.2, 0.5), Seen("blue", "star", 0.8, 0.5))}, "shape"),
        ({"objects": (Seen("red", "circle", 0.8, 0.5), Seen("blue", "star", 0.2, 0.5))}, "relation"),
        ({"objects": (Seen("green", "circle", 0.2, 0.5), Seen("blue", "star", 0.8, 0.5))}, "colour"),
        (
            {"objects": (*(Seen("red", "circle", 0.2, x) for x in (0.2, 0.8)), Seen("blue", "star", 0.8, 0.5))},
            "count",
        ),
    ],
)
def test_each_kind_notices_its_own_mistake(change: dict[str, object], kind: str) -> None:
    view = View("gray", (Seen("red", "circle", 0.2, 0.5), Seen("blue", "star", 0.8, 0.5)))
    asked = [
        Question("background", "", ("gray",)),
        Question("colour", "", ("red",)),
        Question("shape", "", ("red", "circle")),
        Question("count", "", ("red", 1)),
        Question("relation", "", ("red", "above", "blue")),
    ]
    assert set(accuracy([view], [asked]).values()) == {1.0}
    wrong = accuracy([replace(view, **change)], [asked])  # type: ignore[arg-type]
    assert wrong[kind] == 0.0
    assert wrong["all"] == 0.0
    if kind != "colour":  # nothing else follows from a missing colour
        assert [k for k in KINDS if wrong[k] == 0] == [kind]


def test_expected_no_is_a_right_answer_too() -> None:
    image = SCENES[0].render(64, 64)
    right = ASKED[0][0]
    assert check(image, [right, replace(right, expected=False)]) == [True, False]


def test_question_texts() -> None:
    texts = [q.text for asked in ASKED for q in asked]
    assert all(t.endswith("?") and "  " not in t for t in texts)
    assert all(q.expected for asked in ASKED for q in asked)
    assert all({q.kind for q in asked} >= {"background", "colour", "shape", "count"} for asked in ASKED)


def test_empty_images_answer_no() -> None:
    rng = np.random.default_rng(0)
    for image in (np.full((64, 64, 3), 128, np.uint8), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)):
        found = score([image] * 100, ASKED[:100])
        assert found["count"] < 0.2
        assert found["shape"] < 0.2
        assert found["relation"] < 0.1


def test_components_against_flood_fill() -> None:
    rng = np.random.default_rng(1)
    for density in (0.2, 0.5, 0.62, 0.9):
        mask = rng.random((23, 31)) < density
        labels = components(mask)
        assert np.array_equal(labels > 0, mask)
        filled = np.zeros(mask.shape, int)
        for start in zip(*np.nonzero(mask), strict=True):
            if filled[start]:
                continue
            stack, name = [start], filled.max() + 1
            while stack:
                y, x = stack.pop()
                if 0 <= y < 23 and 0 <= x < 31 and mask[y, x] and not filled[y, x]:
                    filled[y, x] = name
                    stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        pairs = set(zip(labels[mask].tolist(), filled[mask].tolist(), strict=True))
        assert len(pairs) == labels.max() == filled.max()


@pytest.mark.parametrize("bad", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3)), np.zeros((8, 64, 3), np.uint8)])
def test_wrong_images_are_refused(bad: NDArray[np.generic]) -> None:
    with pytest.raises(UserError, match="uint8"):
        look(bad)  # type: ignore[arg-type]


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="unequal"):
        score([SCENES[0].render(32, 32)], ASKED[:2])
    with pytest.raises(UserError, match="kind"):
        check(SCENES[0].render(32, 32), [Question("size", "", ("small",))])


def test_checking_is_fast() -> None:
    times = []
    for scene in SCENES[:80]:
        image, asked = scene.render(64, 64), scene.questions
        begin = time.process_time()
        check(image, asked)
        times.append(time.process_time() - begin)
    assert float(np.median(times)) < 0.010
