"""What stages write down: durable, with a copy, and a damaged file costs no finished work."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixelgrow.errors import UserError
from pixelgrow.model import RECORD
from pixelgrow.stages.record import Record


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


def test_a_record_that_is_gone_is_of_no_stage(tmp_path: Path) -> None:
    (finished(tmp_path).folder / RECORD).unlink()
    assert Record(tmp_path / "core").values == {}
