"""Files on disk: whole or as they were, after a crash of the machine too."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pixelgrow import checkpoint
from pixelgrow.checkpoint import CheckpointConfig
from pixelgrow.onestep.pairs import write_shard
from pixelgrow.training import state
from pixelgrow.writing import read_json, write_json
from test_growth import shallow

TENSORS = {"a": torch.ones(3)}


def save_checkpoint(folder: Path) -> None:
    model = shallow(dtype=torch.float32)
    checkpoint.save(folder / "model", model, CheckpointConfig(network=model.net.config, diffusion=model.config))


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_json(folder / "stage.json", {"done": True}),
        lambda folder: state.write_tensors(folder / "a.safetensors", TENSORS),
        lambda folder: state.save(folder, 8, TENSORS, {}),
        lambda folder: write_shard(folder / "0.safetensors", TENSORS),
        save_checkpoint,
    ],
)
def test_what_takes_its_place_is_on_the_disk_and_so_is_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    synced: list[int] = []
    renamed: list[Path] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        fsync(fd)

    def checked(move: Callable[..., Any]) -> Callable[..., Any]:
        def rename(old: Path, new: Path) -> None:
            moved = [old, *Path(old).iterdir()] if Path(old).is_dir() else [old]
            assert {p.stat().st_ino for p in map(Path, moved)} <= set(synced)
            move(old, new)
            renamed.append(Path(new))
            synced.clear()

        return rename

    monkeypatch.setattr(os, "fsync", noted)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    write(tmp_path)
    assert len(renamed) == 1
    assert renamed[0].parent.stat().st_ino in synced


def test_a_damaged_json_file_is_as_good_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "é.json"
    assert read_json(path) is None and not caplog.text
    write_json(path, {"é": 1})
    assert read_json(path) == {"é": 1}
    for damaged in (b"", b'{"a": 1', b"\xff\xfe", b"3", b"[1]"):
        path.write_bytes(damaged)
        assert read_json(path) is None
    assert caplog.text.count("is damaged") == 5
