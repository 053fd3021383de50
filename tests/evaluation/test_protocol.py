"""An evaluation: its numbers are the metrics' own, it goes on where it was cut off, and twice gives the same."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from external.test_vision import save_both
from extractors import Pixels
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.intervals import over_prompts
from pixelgrow.evaluation.features import Features, load_extractor
from pixelgrow.evaluation.images import Conditions, Made
from pixelgrow.evaluation.judges import SceneJudge
from pixelgrow.evaluation.measures import Against, Seen, row, rows_of_features
from pixelgrow.evaluation.metrics import (
    clip_score,
    extrapolated,
    frechet,
    frechet_interval,
    inception_score,
    interval,
)
from pixelgrow.evaluation.neighbours import neighbours
from pixelgrow.evaluation.protocol import Plan, Result, check, evaluate
from pixelgrow.evaluation.real import Real, open_real
from pixelgrow.evaluation.reference import Reference, load_reference, save_reference
from pixelgrow.evaluation.shards import Shards
from pixelgrow.evaluation.statistics import Marginals, Moments
from pixelgrow.external.vision import load_clip
from pixelgrow.rng import generator
from text_models import TEXTS

SIDE = 8


@dataclass
class Noise:
    """Images of noise, each a function of its number and the seed."""

    name: str = "noise"
    size: tuple[int, int] = (SIDE, SIDE)
    conditions: Conditions = "text"
    prompts: Sequence[str] | None = None
    calls: list[tuple[int, list[int]]] = field(default_factory=list)
    fails_at: int = 10**9
    most: int = 160
    live: list[weakref.ref[Tensor]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        return {"kind": "noise", "sampling": {"most": self.most}, "parameters": {"network": 7}}

    def make(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Made:
        assert not [t for t in self.live if t() is not None], "earlier images are still held"
        self.calls.append((seed, list(numbers)))
        if self.fails_at in numbers:
            raise KeyboardInterrupt
        images = self.images(numbers, seed)
        self.live.append(weakref.ref(images))
        return Made(images, 3, {"count": torch.tensor(float(len(numbers)))})

    def images(self, numbers: Sequence[int], seed: int) -> Tensor:
        shape = (3, *self.size)
        rows = [torch.randint(0, self.most, shape, generator=generator(seed, i), dtype=torch.uint8) for i in numbers]
        return torch.stack(rows)


class Drawn:
    """A source of random captioned images; number 5 cannot be read if `torn`."""

    name, fingerprint = "drawn", "of drawn"

    def __init__(self, count: int = 24) -> None:
        rng = np.random.default_rng(1)
        self.pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def text(self, i: int) -> str:
        return f"caption {i}"

    def image(self, i: int, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
        return self.pixels[i]


def real_images(count: int = 24) -> Real:
    source: Any = Drawn(count)
    texts = [source.text(i) for i in range(count)]
    return Real("drawn", "of drawn", [(source, i) for i in range(count)], (SIDE, SIDE), texts)


def plan_of(*metrics: str, seeds: int = 1, n: int = 20, **more: Any) -> Plan:
    real = real_images()
    return Plan(metrics, range(seeds), real.prompts[:n], [Pixels()], real=real, **{"batch": 6} | more)


def run(candidate: Noise, plan: Plan, folder: Path, **more: Any) -> Result:
    return evaluate(candidate, plan, Shards(folder, plan.describe(candidate)), **more)


def rows_of(result: Result) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result.values["metrics"]}


def test_the_numbers_are_those_of_the_metrics(tmp_path: Path) -> None:
    names = ("fd", "precision", "recall", "density", "coverage", "is", "mmd", "cmmd", "retrieval")
    noise = Noise()
    result = run(noise, plan_of(*names, seeds=2), tmp_path)
    real = Pixels()(torch.from_numpy(Drawn().pixels).permute(0, 3, 1, 2)).features
    seen = [Pixels()(noise.images(range(20), seed)) for seed in range(2)]
    found = rows_of(result)
    moments = []
    for features in (real, *(s.features for s in seen)):
        moments.append(Moments(12))
        moments[-1].add(features)
    distances = [frechet(m, moments[0]) for m in moments[1:]]
    row = found["FD-20 (pixels)"]
    assert row["values"] == pytest.approx(distances, rel=1e-9) and distances[0] != distances[1]
    expected = interval(distances)
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((expected.mean, expected.low, expected.high))
    assert (row["better"], row["interval"], row["extractor"]) == ("lower", "seeds", "pixels")
    near = [neighbours(real, s.features) for s in seen]
    for name in ("precision", "recall", "density", "coverage"):
        assert found[f"{name}-20 (pixels)"]["values"] == [getattr(n, name) for n in near]
    marginals = Marginals(20, 3)
    assert seen[0].logits is not None
    marginals.add(range(20), seen[0].logits)
    assert found["IS-20 (pixels)"]["values"][0] == pytest.approx(inception_score(marginals).mean)
    top = found["retrieval top-1-20 (pixels)"]
    assert top["chance"] == pytest.approx(1 / 24) and top["interval"] == "captions" and top["candidates"] == 24
    assert 0 <= top["low"] <= top["mean"] <= top["high"] <= 1
    assert result.values["cost"] == {"nfe": 3, "parameters": {"network": 7}}
    assert result.shown.equal(noise.images(range(20), 0)) and float(result.sums["count"]) == 40


def test_intervals_of_one_seed_are_over_its_images(tmp_path: Path) -> None:
    found = rows_of(run(Noise(), plan_of("fd", "precision", "recall", "mmd"), tmp_path))
    row = found["MMD-20 (pixels)"]
    assert (row["low"], row["high"], row["interval"], len(row["values"])) == (None, None, None, 1)
    distance, features = found["FD-20 (pixels)"], Pixels()(Noise().images(range(20), 0)).features
    parts = [Moments(12) for _ in range(10)]
    for i, one in enumerate(features):
        parts[i % 10].add(one[None])
    real = Moments(12)
    real.add(Pixels()(torch.from_numpy(Drawn().pixels).permute(0, 3, 1, 2)).features)
    expected = frechet_interval(parts, real)
    assert (distance["mean"], distance["low"], distance["high"]) == pytest.approx(
        (expected.mean, expected.low, expected.high), rel=1e-6
    )
    precision, recall = found["precision-20 (pixels)"], found["recall-20 (pixels)"]
    for shown, images in ((precision, 20), (recall, 24)):
        inside = round(shown["mean"] * images)
        share = over_prompts([1.0] * inside + [0.0] * (images - inside))
        assert (shown["low"], shown["high"], shown["interval"]) == (share.low, share.high, "images")


def test_intervals_over_seeds_end_where_the_metric_does() -> None:
    made = row("precision", "precision-9", [0.1, 0.9])
    assert (made["low"], made["high"]) == (0, 1)
    below = row("fd-infinity", "FD-infinity-9", [-0.06, -0.065, -0.058])
    assert below["low"] < below["mean"] < below["high"] < 0
    assert row("mmd", "MMD-9", [0.1, 0.9])["low"] < 0 and row("fd", "FD-9", [1.0, 90.0])["low"] == 0


def test_the_ratio_is_over_all_extractors(tmp_path: Path) -> None:
    class Halves(Pixels):
        name = "halves"

        def __call__(self, images: Tensor) -> Features:
            return super().__call__(images[:, :, :4])

    items = [(source, i) for source, i in real_images(30).items[6:]]
    train = replace(real_images(), fingerprint="of others", items=items)
    plan = replace(plan_of("fd-ratio", "fd"), extractors=[Pixels(), Halves()], train=train)
    found = rows_of(run(Noise(), plan, tmp_path))
    images = [Noise().images(range(20), 0), plan.real.images(range(24))[0], train.images(range(24))[0]]  # type: ignore[union-attr]
    ratios = []
    for extractor in (Pixels(), Halves()):
        moments = [Moments(12) for _ in images]
        for m, x in zip(moments, images, strict=True):
            m.add(extractor(x).features)
        ratios.append(frechet(moments[0], moments[2]) / frechet(moments[1], moments[2]))
    assert found["FD-ratio-20 (pixels, halves)"]["mean"] == pytest.approx(sum(ratios) / 2)
    with pytest.raises(UserError, match="drawn is both the training and the real images, which are 0 apart"):
        check(replace(plan, train=plan.real), Noise())
    copied = replace(real_images(), fingerprint="of a copy")
    with pytest.raises(UserError, match="held-out and training images are 0 apart by pixels"):
        run(Noise(), replace(plan, train=copied), tmp_path / "copied")
    assert "FD-20 (halves)" in found and found["FD-ratio-20 (pixels, halves)"]["heldout"].keys() == {"pixels", "halves"}


def test_clipscore_is_of_images_and_their_prompts(tmp_path: Path) -> None:
    folder = str(save_both(tmp_path / "clip"))
    prompts = [TEXTS[i % 2] for i in range(12)]
    plan = Plan(("clipscore",), [0], prompts, [load_extractor(folder)], batch=5)
    found = rows_of(run(Noise(), plan, tmp_path / "part"))[f"CLIPScore-12 ({folder})"]["mean"]
    clip, images = load_clip(folder), Noise().images(range(12), 0)
    with torch.no_grad():
        seen = clip.images(images.float() / 127.5 - 1)
    expected = clip_score(seen, clip.texts(prompts)).mean().item()
    assert found == pytest.approx(expected, rel=1e-3)


def test_seconds_are_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("pixelgrow.evaluation.protocol.time.perf_counter", lambda: float(next(ticks)))
    measured = run(Noise(), plan_of("fd", seeds=2, batch=5), tmp_path).values["measured"]
    assert measured["seconds_per_image"] == pytest.approx(1 / 5)  # a second for each batch


def test_features_of_a_seed_are_let_go(tmp_path: Path) -> None:
    plan, shards = plan_of("mmd"), Shards(tmp_path, {})
    evaluate(Noise(), plan, shards)
    seen = [Seen(lambda: shards.each("seed-0", 20), "pixels", 20)]
    moments = Moments(12)
    moments.add(seen[0].features)
    rows_of_features(["mmd"], seen, Against(Reference(moments, {}, {}, seen[0].features)), [], "pixels")
    assert "features" not in vars(seen[0])


def test_extrapolation_takes_all_features(tmp_path: Path) -> None:
    real, noise = real_images(60), Noise()
    plan = Plan(("fd-infinity",), [0], real.prompts[:50], [Pixels()], real=real, batch=50)
    found = rows_of(run(noise, plan, tmp_path))["FD-infinity-50 (pixels)"]["mean"]
    moments = Moments(12)
    moments.add(Pixels()(torch.from_numpy(Drawn(60).pixels).permute(0, 3, 1, 2)).features)
    assert found == pytest.approx(extrapolated(Pixels()(noise.images(range(50), 0)).features, moments).value)


def without_times(result: Result) -> str:
    return json.dumps({k: v for k, v in result.values.items() if k != "measured"})


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    plan = plan_of("fd", "precision", "recall", seeds=2)
    whole = run(Noise(), plan, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Noise(fails_at=13), plan, tmp_path / "cut")
    again = Noise()
    resumed = run(again, plan, tmp_path / "cut")
    assert again.calls[0] == (0, list(range(12, 18)))  # not what was there already
    assert without_times(resumed) == without_times(whole)
    assert without_times(run(Noise(), plan, tmp_path / "twice")) == without_times(whole)
    done = Noise()
    assert without_times(run(done, plan, tmp_path / "whole")) == without_times(whole) and done.calls == []
    other = run(Noise(), replace(plan, batch=7), tmp_path / "other")
    for a, b in zip(other.values["metrics"], whole.values["metrics"], strict=True):
        assert a["values"] == pytest.approx(b["values"], rel=1e-8)


def test_more_seeds_keep_those_that_are_done(tmp_path: Path) -> None:
    run(Noise(), plan_of("fd"), tmp_path)
    more = Noise()
    run(more, plan_of("fd", "recall", seeds=2), tmp_path)
    assert {seed for seed, _ in more.calls} == {1}
    with pytest.raises(UserError, match=r"candidates\[0\].sampling.most: was 160, now 99"):
        run(Noise(most=99), plan_of("fd"), tmp_path)


def test_metrics_that_keep_other_things_do_not_go_on_from_what_there_is(tmp_path: Path) -> None:
    run(Noise(), plan_of("fd"), tmp_path)
    with pytest.raises(UserError, match="logits: was False, now True"):
        run(Noise(), plan_of("fd", "is"), tmp_path)
    prompts = open_real("scenes", (SIDE, SIDE), 12).prompts

    def judged(*metrics: str) -> dict[str, Any]:
        return Plan(metrics, [0], prompts, judge=SceneJudge(metrics, prompts)).describe()

    assert judged("scenes") != judged("scenes", "counting")
    assert plan_of("fd").describe() != plan_of("fd", "clipscore").describe()


def test_a_reference_is_written_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "reference.safetensors"
    plan = plan_of("fd", "precision", "retrieval", reference=file)
    first = run(Noise(), plan, tmp_path / "1")
    assert file.exists()
    monkeypatch.setattr(Drawn, "image", lambda *_: pytest.fail("the real images were read again"))
    second = run(Noise(), plan, tmp_path / "2")
    assert second.values["metrics"] == first.values["metrics"] and second.values["real"] == first.values["real"]
    fewer = replace(plan_of("fd", "retrieval", n=12, reference=file), real=real_images(14))
    found = run(Noise(), fewer, tmp_path / "3")
    assert found.values["real"]["images"] == 24  # the reference's; the nearest is sought among those with captions here
    assert rows_of(found)["retrieval top-1-12 (pixels)"]["candidates"] == 14
    moved = replace(plan.real or real_images(), name="elsewhere/drawn")
    monkeypatch.setattr(Pixels, "describe", lambda self: {"name": "a folder", "width": 12, "classes": 3})
    assert run(Noise(), replace(plan, real=moved), tmp_path / "7").values["metrics"] == first.values["metrics"]
    changed = replace(plan.real or real_images(), fingerprint="other")
    with pytest.raises(UserError, match="does not fit the images: fingerprint: got 'of drawn', expected 'other'"):
        run(Noise(), replace(plan, real=changed), tmp_path / "4")
    more = replace(plan, real=real_images(25))
    with pytest.raises(UserError, match="is of 24 real images, expected at least 25: delete it"):
        check(more, Noise())
    assert (replace(fewer, reference=None).real_images(), fewer.real_images()) == (14, 24)
    assert replace(fewer, reference=None).describe() == fewer.describe()  # what is kept of the images is the same
    bare = tmp_path / "bare.safetensors"
    whole = load_reference(file)
    save_reference(bare, replace(whole, features=None))
    assert run(Noise(), replace(plan, metrics=("fd",), reference=bare), tmp_path / "6").values["metrics"]
    with pytest.raises(UserError, match="has moments, no features"):
        check(replace(plan, reference=bare), Noise())
    monkeypatch.setattr(Pixels, "describe", lambda self: {"name": "pixels", "width": 12, "classes": 4})
    with pytest.raises(UserError, match="does not fit the extractor: classes: got 3, expected 4"):
        run(Noise(), plan, tmp_path / "5")


def test_real_images_that_cannot_be_read_are_counted_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(14):
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"caption {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(whole[: len(whole) // 2])
    real = open_real(str(folder), (SIDE, SIDE), 14)
    plan = Plan(("fd", "retrieval"), [0], real.prompts, [Pixels()], real=real, reference=tmp_path / "reference")
    result = run(Noise(), plan, tmp_path / "part")
    again = run(Noise(), plan, tmp_path / "again")  # reads the reference
    assert again.values["bad_files"] == result.values["bad_files"] and again.values["real"] == result.values["real"]
    assert result.values["real"]["images"] == 13 and rows_of(result)["retrieval top-1-13 (pixels)"]["candidates"] == 13
    assert len(result.values["bad_files"]) == 1 and result.values["bad_files"][0].startswith("03.png: ")


class OfScenes(Noise):
    """Renderings of held-out scenes; of the captions of the next ones, with `shifted`."""

    shifted = 0

    def images(self, numbers: Sequence[int], seed: int) -> Tensor:
        source = Scenes(n=100, captions=100, split="heldout")
        pixels = [source.image((i + self.shifted) % 100, self.size) for i in numbers]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def test_scenes_are_checked_with_intervals_over_prompts(tmp_path: Path) -> None:
    prompts = open_real("scenes", (64, 64), 30).prompts
    plan = Plan(("scenes", "counting"), range(2), prompts, judge=SceneJudge(["scenes", "counting"], prompts))
    right, wrong = OfScenes(size=(64, 64)), OfScenes(size=(64, 64))
    wrong.shifted = 1
    found = rows_of(run(right, plan, tmp_path / "right"))
    assert {"scenes-30", "scenes: colour-30", "scenes: relation-30", "counting-30"} <= found.keys()
    assert all(found[name]["mean"] == 1 for name in ("scenes-30", "scenes: shape-30", "counting-30"))
    assert found["scenes-30"]["interval"] == "prompts" and 0.8 < found["scenes-30"]["low"] < 1
    assert found["scenes: colour-30"]["measure"] == "colour"
    chance = rows_of(run(wrong, plan, tmp_path / "wrong"))["scenes-30"]
    assert (
        chance["mean"] < 0.2
        and chance["values"][0] == chance["values"][1]
        and chance["high"] < found["scenes-30"]["low"]
    )


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        (plan_of("fd", n=2), "got 2 images to evaluate, expected at least 10 for fd"),
        (plan_of("fd", n=1), "got 1 image to evaluate"),
        (replace(plan_of("fd"), real=None), "metric fd: name real images with --data"),
        (plan_of("fd-ratio"), "metric fd-ratio: name training images with --train"),
        (replace(plan_of("fd"), real=real_images(3)), "drawn: got 3 real images, expected at least 10"),
        (replace(plan_of("retrieval"), prompts=[""] * 20), "metric retrieval: noise has images without prompts"),
        (replace(plan_of("fd"), extractors=[], reference=Path("x")), "--reference x: got 0 extractors"),
        (plan_of("is", reference=Path("x")), "--reference x: no metric compares with real images; drop it"),
        (plan_of("kid"), "metric kid: got 20 images, expected at least 1,000: evaluate more, or take mmd"),
        (
            replace(plan_of("kid"), prompts=[f"caption {i % 24}" for i in range(1000)]),
            "metric kid: got 24 images, expected at least 1,000",
        ),
        (plan_of("fd-infinity"), "metric fd-infinity: got 20 images, expected at least 40: evaluate more, or drop it"),
        (
            replace(plan_of("retrieval"), prompts=["a", "b"] * 10),
            "noise has the caption 'a', which none of the 24 real",
        ),
    ],
)
def test_what_a_plan_lacks(plan: Plan, line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        check(plan, Noise())
    assert "\n" not in str(error.value)


def test_what_is_no_classifier_has_no_inception_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pixels, "describe", lambda self: {"classes": 0})
    with pytest.raises(UserError, match="metric is: pixels is no classifier"):
        check(plan_of("is"), Noise())


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    noise = Noise()
    plan = plan_of("fd")
    noise.size = (SIDE, SIDE)
    made = noise.images(range(6), 0)
    noise.images = lambda numbers, seed: made[:, :, :4]  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"got images of shape \(6, 3, 4, 8\).* all images must have one size"):
        run(noise, plan, tmp_path)


def test_progress_names_each_part(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    run(Noise(), plan_of("fd", seeds=2), tmp_path, progress=lambda *now: said.append(now))
    assert ("real images", 24, 24) in said and ("seed 1", 0, 20) in said and said[-1] == ("seed 1", 20, 20)
