"""What the Frechet distance by EfficientNet-Lite0 must order, on few images: real ones, blurred, JPEG, noise."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from pixelgrow.evaluation.features import Extractor, Features, load_extractor
from pixelgrow.evaluation.measures import EXTRACTOR

ROOT = Path(__file__).parents[2]


class Narrow:
    """The first 64 features of an extractor: of few images, a distance of all of them is mostly bias."""

    name, width, identity = "narrow", 64, ""

    def __init__(self, whole: Extractor) -> None:
        self.whole = whole

    def describe(self) -> dict[str, object]:
        return {}

    def __call__(self, images: Tensor) -> Features:
        return Features(self.whole(images).features[:, : self.width], None)


@pytest.mark.parametrize(("kind", "half"), [("scenes", 24), ("photographs", 12)])
def test_distances_rise_with_every_distortion(kind: str, half: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import distances

    images = {"scenes": distances.scenes, "photographs": distances.photographs}[kind](2 * half)
    found = distances.distances(Narrow(load_extractor(EXTRACTOR)), images, half)
    assert distances.faults(found) == []
    assert [len(v) for v in found.values()] == [1, 3, 3, 3]


def test_a_fault_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.distances import faults

    good = {"none": [1.0], "blur": [2.0, 3.0, 4.0], "jpeg": [3.0, 4.0, 5.0], "noise": [5.5, 5.6, 6.0]}
    assert faults(good) == []
    assert faults(good | {"blur": [2.0, 2.0, 4.0]}) == ["blur does not rise"]
    assert faults(good | {"blur": [2.0, 4.2, 4.3]}) == ["strength 2 is not in order"]
    assert faults(good | {"noise": [4.5, 5.5, 6.5]}) == ["the strongest JPEG is not between blur and noise"]
    assert "blur does not rise" in faults(good | {"none": [2.5]})


def test_deleted_classes_move_recall_alone_and_duplicates_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.photographs import PICTURES

    from bench import distances

    found = distances.sets(load_extractor(EXTRACTOR), distances.photographs(120), 60, len(PICTURES))
    assert distances.set_faults(found) == []
    whole, deleted, copied = found.values()
    swapped = {"whole": whole, "deleted": copied, "copied": deleted}
    assert len(distances.set_faults(swapped)) == 2
