"""`stage.json`: which changes are refused, and a damaged one costs no finished work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pixelgrow.errors import UserError
from pixelgrow.model import RECORD
from pixelgrow.stages.record import Record

SETTINGS: dict[str, Any] = {
    "from": "runs/a/core/checkpoint",
    "losses": {"distance": "models/dino", "discriminator": "teacher", "similarity": {"model": "clip"}},
    "text": {"encoder": "models/t5", "max_tokens": 8, "fingerprint": "11"},
    "latent": {"autoencoder": "models/vae", "fingerprint": "22"},
    "heldout": [{"source": "held", "fingerprint": "33"}],
    "data": [{"source": "set", "fingerprint": "44", "weight": None}],
    "networks": {"distance": "models/dino 55", "similarity": "clip 66"},
}
PARENTS = {"runs/a/core/checkpoint": "77", "pairs": "88"}


def changed(settings: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The settings with another value at a dotted path."""
    head, _, rest = path.partition(".")
    return {**settings, head: changed(settings[head], rest, value) if rest else value}


@pytest.fixture
def record(tmp_path: Path) -> Record:
    made = Record(tmp_path / "core")
    made.begin(SETTINGS, PARENTS)
    return Record(tmp_path / "core")


def test_paths_of_what_is_known_by_its_content_may_change(record: Record) -> None:
    now = SETTINGS
    for path, value in (
        ("from", "./elsewhere/core"),
        ("losses.distance", "/moved/dino"),
        ("losses.similarity.model", "/moved/clip"),
        ("text.encoder", "/moved/t5"),
        ("latent.autoencoder", "/moved/vae"),
        ("heldout", [{"source": "/moved/held", "fingerprint": "33"}]),
        ("data", [{"source": "/moved/set", "fingerprint": "44", "weight": None}]),
        ("networks", {"distance": "/moved/dino 55", "similarity": "/moved/clip 66"}),
    ):
        now = changed(now, path, value)
        record.check(now, PARENTS)
    record.check(now, {"./elsewhere/core": "77", "pairs": "88"})


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("from", "core", r"from changed since it was begun \(was runs/a/core/checkpoint, now core\)"),
        ("losses.discriminator", "models/dino", "losses.discriminator changed"),
        ("losses.distance", "teacher", "losses.distance changed"),
        ("text", {"encoder": "minilm", "max_tokens": 8, "fingerprint": "12"}, "text.encoder changed"),
        ("latent.fingerprint", "23", "latent.fingerprint changed"),
        ("data", [{"source": "set", "fingerprint": "45", "weight": None}], r"data\[0\].fingerprint changed"),
        ("networks.distance", "models/dino 56", "networks.distance changed"),
    ],
)
def test_what_is_another_is_refused(record: Record, path: str, value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        record.check(changed(SETTINGS, path, value), PARENTS)


def test_another_parent_is_refused_by_its_hash(record: Record) -> None:
    with pytest.raises(UserError, match=r"its parent ./elsewhere/core changed since it was begun: "):
        record.check(changed(SETTINGS, "from", "./elsewhere/core"), {"./elsewhere/core": "78", "pairs": "88"})
    with pytest.raises(UserError, match="its parent pairs changed"):
        record.check(SETTINGS, PARENTS | {"pairs": "89"})


# --- damage -----------------------------------------------------------------------------------------------------------


def cut(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[:20])


def finished(folder: Path) -> Record:
    record = Record(folder / "core")
    record.begin({"images": 8}, {})
    record.finish(result={"loss": 0.5})
    return record


def test_a_damaged_record_is_read_from_its_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = finished(tmp_path)
    for path in (record.path, record.copy):
        cut(path)
        assert Record(tmp_path / "core").values == record.values
        assert "stage.json is damaged" in caplog.text or path == record.copy
        record.write(record.values)


def test_no_advice_deletes_a_finished_checkpoint(tmp_path: Path) -> None:
    record = finished(tmp_path)
    (tmp_path / "core" / "checkpoint").mkdir()
    cut(record.path, record.copy)
    with pytest.raises(
        UserError, match=r"core/checkpoint can still be used: move it elsewhere .* then delete"
    ) as error:
        Record(tmp_path / "core")
    assert "\n" not in str(error.value)


def test_a_stage_without_its_record_has_not_begun(tmp_path: Path) -> None:
    (finished(tmp_path).folder / RECORD).unlink()
    assert Record(tmp_path / "core").values == {}
