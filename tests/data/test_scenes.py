"""Scenes: pure functions of their keys, legible, varied, and disjoint between the splits."""

import time
from collections import Counter

import numpy as np
import pytest

from pixelgrow.data.scenes.captions import NUMBERS, Group, Spec, noun
from pixelgrow.data.scenes.checker import accuracy
from pixelgrow.data.scenes.layout import GAP
from pixelgrow.data.scenes.seeing import look
from pixelgrow.data.scenes.source import (
    FEW_SHAPES,
    SIMPLE_COLOURS,
    SIMPLE_GROUNDS,
    SIMPLE_SHAPES,
    SPLITS,
    Scenes,
    split_of,
)
from pixelgrow.data.scenes.vocabulary import BACKGROUNDS, COLOURS, PATTERNS, RELATIONS, SHAPES, contrasting, oklab
from pixelgrow.errors import UserError

SAMPLE = range(1500)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes()


def test_an_image_is_a_pure_function_of_its_keys() -> None:
    one, two = Scenes(seed=3), Scenes(seed=3)
    forward = [one.scene(i).render(32, 32) for i in range(20)]
    backward = [two.scene(i).render(32, 32) for i in reversed(range(20))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert [one.text(i) for i in range(20)] != [Scenes(seed=4).text(i) for i in range(20)]


def test_captions_repeat_and_layouts_do_not() -> None:
    scenes = Scenes(captions=7)
    assert scenes.scene(2).spec == scenes.scene(9).spec
    assert scenes.text(2) == scenes.text(9) == scenes.scene(9).caption
    assert not np.array_equal(scenes.scene(2).render(32, 32), scenes.scene(9).render(32, 32))
    assert Scenes(captions=8).text(2) == scenes.text(2)  # a caption does not depend on how many there are


def test_splits_share_no_composition_and_no_caption() -> None:
    specs = {split: [Scenes(split=split).scene(i) for i in SAMPLE] for split in SPLITS}
    for split in SPLITS:
        assert all(split_of(s.spec) == split for s in specs[split])
    train, held_out = ({s.spec.canonical() for s in specs[split]} for split in SPLITS)
    assert not train & held_out
    assert not {s.caption for s in specs["train"]} & {s.caption for s in specs["heldout"]}


def test_inverse_wordings_are_one_composition() -> None:
    a, b = Group(1, "red", "circle"), Group(2, "blue", "star")
    assert Spec((a, b), "above", "white").canonical() == Spec((b, a), "below", "blue", "striped").canonical()
    assert Spec((a, b), "left of", "white").canonical() != Spec((a, b), "right of", "white").canonical()


def test_specifications_stay_within_the_contract(scenes: Scenes) -> None:
    seen: Counter[object] = Counter()
    for i in SAMPLE:
        spec = scenes.scene(i).spec
        assert 1 <= sum(g.count for g in spec.groups) <= 5
        assert len(spec.groups) == 1 + bool(spec.relation)
        assert len({g.colour for g in spec.groups}) == len(spec.groups)
        assert all(g.colour in contrasting(spec.background) for g in spec.groups)
        seen.update([("background", spec.background), ("pattern", spec.pattern), ("relation", spec.relation)])
        seen.update([k for g in spec.groups for k in (("colour", g.colour), ("shape", g.shape), ("count", g.count))])
    for kind, names in {
        "background": BACKGROUNDS, "pattern": PATTERNS, "relation": RELATIONS, "colour": COLOURS, "shape": SHAPES
    }.items():  # fmt: skip
        assert min(seen[kind, name] for name in names) > 60
    assert min(seen["count", n] for n in range(1, 6)) > 30  # five are rare


def test_captions_say_all_that_the_questions_are_about(scenes: Scenes) -> None:
    words = set()
    for i in SAMPLE:
        scene = scenes.scene(i)
        words.update(scene.caption.split())
        for g in scene.spec.groups:
            assert g.colour in scene.caption
            assert noun(g.shape, g.count) in scene.caption
            assert g.size in scene.caption
            if g.count > 2:
                assert NUMBERS[g.count] in scene.caption
        plain_white = scene.spec.background == "white" and scene.spec.pattern == "plain"
        assert ("background" in scene.caption) or plain_white
        assert len(scene.caption.split()) <= 24
        assert "  " not in scene.caption
        assert scene.caption == scene.caption.strip()
    assert {"single", "pair", "above", "under", "underneath", "top", "against", "in", "crosses"} <= words
    captions = [scenes.text(i) for i in SAMPLE]
    assert 0.1 < np.mean(["background" not in c for c in captions]) < 0.35
    assert len(set(captions)) > 0.95 * len(captions)


def test_a_relation_may_come_without_a_background(scenes: Scenes) -> None:
    forms = {c.split(" on ")[0] for c in (scenes.text(i) for i in range(4000)) if "background" not in c}
    assert any(f.startswith("a ") and " above two " in f for f in forms)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (32, 80), (16, 16), (256, 256)])
def test_any_size(scenes: Scenes, size: tuple[int, int]) -> None:
    for i in range(12):
        image = scenes.image(i, size, (0.5, 0.5))
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8


def test_one_scene_at_every_resolution(scenes: Scenes) -> None:
    for i in range(20):
        small = scenes.scene(i).render(32, 32).astype(float)
        pooled = scenes.scene(i).render(128, 128).astype(float).reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(small - pooled).mean() < 2.0


def test_objects_stay_inside_and_apart(scenes: Scenes) -> None:
    for i in range(400):
        scene = scenes.scene(i)
        bare = np.concatenate(
            [scene.render(64, 64)[[0, -1]].reshape(-1, 3), scene.render(64, 64)[:, [0, -1]].reshape(-1, 3)]
        )
        inks = np.array([COLOURS[g.colour] for g in scene.spec.groups], float)
        assert np.linalg.norm(bare[:, None] - inks, axis=-1).min() > 60
        seen = scene.view().objects
        for a, one in enumerate(seen):
            for two in seen[a + 1 :]:
                assert max(abs(one.y - two.y), abs(one.x - two.x)) > 0.2 + GAP / 2


def test_relations_hold_object_by_object(scenes: Scenes) -> None:
    for i in range(400):
        spec, objects = scenes.scene(i).spec, scenes.scene(i).view().objects
        if not spec.relation:
            continue
        first = [o for o in objects if o.colour == spec.groups[0].colour]
        second = [o for o in objects if o.colour == spec.groups[1].colour]
        axis = "y" if spec.relation in ("above", "below") else "x"
        if spec.relation in ("below", "right of"):
            first, second = second, first
        assert max(getattr(o, axis) for o in first) < min(getattr(o, axis) for o in second)


def test_the_simple_world_has_few_words_on_plain_grounds_and_is_legible() -> None:
    simple = Scenes(world="simple", split="heldout")
    specs = [simple.scene(i).spec for i in range(300)]
    assert {s.background for s in specs} == set(SIMPLE_GROUNDS) and {s.pattern for s in specs} == {"plain"}
    assert {g.shape for s in specs for g in s.groups} == set(SIMPLE_SHAPES)
    assert {g.colour for s in specs for g in s.groups} == set(SIMPLE_COLOURS)
    assert {sum(g.count for g in s.groups) for s in specs} == {1, 2, 3} and {
        g.size for s in specs for g in s.groups
    } == {""}
    assert all(split_of(s) == "heldout" for s in specs)
    views = [look(simple.scene(i).render(32, 32)) for i in range(100)]
    assert accuracy(views, [simple.scene(i).questions for i in range(100)])["all"] == 1
    assert simple.fingerprint != Scenes(split="heldout").fingerprint


def test_the_world_of_few_has_two_large_objects_at_most_which_16_pixels_show() -> None:
    few, simple = Scenes(world="few", split="heldout"), Scenes(world="simple", split="heldout")
    scenes = [few.scene(i) for i in range(300)]
    assert {tuple(g.count for g in s.spec.groups) for s in scenes} == {(1,), (2,), (1, 1)}
    assert {g.shape for s in scenes for g in s.spec.groups} == set(FEW_SHAPES)
    assert all(split_of(s.spec) == "heldout" and "large" not in s.caption for s in scenes)
    views = [look(s.render(16, 16)) for s in scenes[:100]]
    assert accuracy(views, [s.questions for s in scenes[:100]])["all"] >= 0.98

    def largest(source: Scenes) -> float:  # share of the side that a circle or a square of one object takes
        images = (source.scene(i) for i in range(300))
        alone = [s.render(64, 64) for s in images if [g.count for g in s.spec.groups] == [1]]
        return float(np.mean([(np.abs(x - x[0, 0].astype(float)).max(-1) > 60).any(0).mean() for x in alone]))

    assert largest(few) > 1.2 * largest(simple)
    assert len({few.fingerprint, simple.fingerprint, Scenes(split="heldout").fingerprint}) == 3


def test_colours_are_distinct() -> None:
    for palette in (COLOURS, BACKGROUNDS):
        lab = oklab(np.array(list(palette.values())))
        away = np.linalg.norm(lab[:, None] - lab, axis=-1) + np.eye(len(lab))
        assert away.min() > 0.12


def test_source_facts(scenes: Scenes) -> None:
    assert len(Scenes(n=10)) == 10
    assert scenes.size(0) == (1024, 1024)
    assert scenes.key(5) == "train/5"
    assert Scenes().fingerprint == scenes.fingerprint != Scenes(seed=1).fingerprint
    with pytest.raises(IndexError):
        Scenes(n=10).scene(10)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"n": 0}, "n=0"),
        ({"captions": 0}, "captions=0"),
        ({"split": "test"}, "test"),
        ({"world": "flat"}, "flat"),
    ],
)
def test_user_errors(bad: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Scenes(**bad)  # type: ignore[arg-type]


def test_too_small(scenes: Scenes) -> None:
    with pytest.raises(UserError, match="16"):
        scenes.scene(0).render(8, 8)


def test_rendering_is_fast(scenes: Scenes) -> None:
    best = []
    for size in (32, 64):
        times = []
        for i in range(150):
            begin = time.process_time()
            scenes.scene(i).render(size, size)
            times.append(time.process_time() - begin)
        best.append(float(np.median(times)) * 1e3)
    assert best[0] < 1.0  # ms an image at 32 px
    assert best[1] < 3.0
