"""Models of a folder or the hub, by text encoders: fingerprints, shards and names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pixelgrow.errors import UserError
from pixelgrow.text.encoders import load_encoder
from pixelgrow.text.spec import describe
from text_models import save_t5


def test_fingerprint_is_of_content_not_of_place(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    save_t5(here)
    shutil.copytree(here, there)
    before = describe(str(here), 16).fingerprint
    assert describe(str(there), 16).fingerprint == before
    assert describe(str(here), 17).fingerprint != before

    weights = load_file(there / "model.safetensors")
    key = sorted(weights)[-1]
    weights[key] = weights[key] + 1e-3
    save_file(weights, there / "model.safetensors", metadata={"format": "pt"})
    assert describe(str(there), 16).fingerprint != before

    tokenizer = json.loads((here / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (here / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert describe(str(here), 16).fingerprint != before


def test_fingerprint_of_a_large_file_samples_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixelgrow.external.hub._WHOLE", 1000)
    monkeypatch.setattr("pixelgrow.external.hub._BLOCK", 64)
    monkeypatch.setattr("pixelgrow.external.hub._BLOCKS", 8)
    save_t5(tmp_path)
    before = describe(str(tmp_path), 16).fingerprint
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert describe(str(tmp_path), 16).fingerprint != before


def test_shards_are_all_needed(tmp_path: Path) -> None:
    save_t5(tmp_path, shard="2KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_encoder(str(tmp_path), 16).dim == 16
    shards[-1].unlink()
    with pytest.raises(UserError, match=shards[-1].name):
        describe(str(tmp_path), 16)


def test_a_downloaded_model_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--some--t5", "a" * 40
    save_t5(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert load_encoder("some/t5", 16).dim == 16
    assert describe(f"some/t5@{commit}", 16).fingerprint == describe("some/t5", 16).fingerprint

    (repo / "snapshots" / commit / "model.safetensors").unlink()  # a download that was cut off
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        describe("some/t5", 16)
