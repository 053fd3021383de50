"""Reference files: what is written comes back; others are refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pixelgrow.errors import UserError
from pixelgrow.evaluation.reference import Reference, load_reference, save_reference
from pixelgrow.evaluation.statistics import Moments

DATA = {"fingerprint": "content1-" + "ab" * 20, "images": 20, "size": (64, 64)}
EXTRACTOR = {"name": "efficientnet-lite0", "weights": "0123456789abcdef" * 4, "side": 224, "filter": "bicubic"}


@pytest.fixture
def reference() -> Reference:
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    moments = Moments(5)
    moments.add(features)
    return Reference(moments, DATA, EXTRACTOR, features)


def test_comes_back_as_written(tmp_path: Path, reference: Reference) -> None:
    path = tmp_path / "new" / "r.safetensors"
    save_reference(path, reference)
    got = load_reference(path, data=DATA, extractor=EXTRACTOR)
    assert got.moments.count == 20 and torch.equal(got.moments.covariance, reference.moments.covariance)
    assert torch.equal(got.moments.mean, reference.moments.mean)
    assert got.features is not None and torch.equal(got.features, reference.features)  # type: ignore[arg-type]
    assert got.data == DATA | {"size": [64, 64]} and got.extractor == EXTRACTOR
    save_reference(path, Reference(reference.moments, DATA, EXTRACTOR))
    assert load_reference(path).features is None
    assert [p.name for p in path.parent.iterdir()] == ["r.safetensors"]


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (
            {"data": {"fingerprint": "content1-" + "cd" * 20}},
            "the images: fingerprint: got content1-aba, expected content1-cdc",
        ),
        ({"data": {"size": (32, 64)}}, r"the images: size: got \[64, 64\], expected \[32, 64\]"),
        (
            {"extractor": EXTRACTOR | {"name": "inception", "side": 299}},
            "the extractor: name: got 'efficientnet-lite0', expected 'inception'; side: got 224, expected 299",
        ),
        ({"extractor": {"antialias": True}}, "the extractor: antialias: got none, expected true"),
    ],
)
def test_another_is_refused(tmp_path: Path, reference: Reference, wanted: dict[str, Any], line: str) -> None:
    path = tmp_path / "r.safetensors"
    save_reference(path, reference)
    with pytest.raises(UserError) as got:
        load_reference(path, **wanted)
    assert re.fullmatch(
        f"reference {re.escape(str(path))} does not fit {line}; make it again, or name the reference that fits",
        str(got.value),
    )


def test_at_most_three_differences_are_named(tmp_path: Path, reference: Reference) -> None:
    path = tmp_path / "r.safetensors"
    save_reference(path, reference)
    with pytest.raises(UserError) as got:
        load_reference(path, extractor=dict.fromkeys("abcd", 1))
    assert "c: got none" in str(got.value) and "d: got none" not in str(got.value)


def test_what_is_no_reference_is_one_line(tmp_path: Path, reference: Reference) -> None:
    missing, cut, other = tmp_path / "m", tmp_path / "c", tmp_path / "o"
    save_reference(cut, reference)
    cut.write_bytes(cut.read_bytes()[:-100])
    save_file({"a": torch.zeros(2)}, other)
    for path, line in (
        (missing, f"there is no reference {missing}; make it from the real images, or name another"),
        (tmp_path, f"there is no reference {tmp_path}; make it from the real images, or name another"),
        (other, f"{other} holds no reference statistics; make them from the real images, or name another file"),
    ):
        with pytest.raises(UserError) as got:
            load_reference(path)
        assert str(got.value) == line
    with pytest.raises(UserError, match=r"reference .* is cut off \(.* bytes\): make it again$"):
        load_reference(cut)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, reference: Reference) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        save_reference(tmp_path / "file" / "r.safetensors", reference)
