"""The caption cache: what it stores, and that no kill, full disk or neighbour spoils it."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from pixelgrow.errors import UserError
from pixelgrow.models.cond import cond_of, joined
from pixelgrow.text import cache as text_cache
from pixelgrow.text.cache import TextCache
from pixelgrow.text.encoders import TextEncoder, load_encoder
from pixelgrow.writing import size_of
from text_models import TEXTS, save_t5

MANY = [f"{a} {b} {c}" for a in TEXTS[:4] for b in TEXTS[:4] for c in ("", "red", "blue stars", "far more words than")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cache") / "t5"
    save_t5(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slabs, batches and writes, as a long list of captions has them; and no wait for the disk."""
    monkeypatch.setattr(text_cache, "_SLAB", 24)
    monkeypatch.setattr(text_cache, "_FLUSH", 3)
    monkeypatch.setattr("pixelgrow.text.encoders._CPU_TOKENS", 48)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def filled(tmp_path: Path, model: str) -> TextCache:
    """A cache of MANY; encoded once, copied for each test."""
    store = Path(model).parent / "filled"
    if not store.exists():
        TextCache(store, model, 16).ensure(MANY)
    shutil.copytree(store, tmp_path / "filled")
    return TextCache(tmp_path / "filled", model, 16)


def _no_encoder(*_: Any) -> TextEncoder:
    raise AssertionError("the encoder was loaded")


def _stored(cache: TextCache) -> dict[str, bytes]:
    """The record of each caption of MANY, byte for byte."""
    entries = cache._entries[cache._find(MANY)]
    ends = cache._ends(entries)
    return {text: cache._records[e["start"] : end].tobytes() for text, e, end in zip(MANY, entries, ends, strict=True)}


def test_stored_conditions_are_the_encoders(tmp_path: Path, model: str) -> None:
    cache = TextCache(tmp_path, model, 16)
    assert (cache.dim, cache.pooled_dim, len(cache)) == (16, 16, 0)
    assert cache.ensure(TEXTS + TEXTS) == len(TEXTS) == len(cache)
    encoder = load_encoder(model, 16)
    assert cache.fingerprint == encoder.fingerprint
    for texts in (TEXTS, TEXTS[::-1], [TEXTS[1]], [TEXTS[3]] * 3):
        stored, fresh = cache.cond(texts), encoder.encode(texts)
        for name in ("tokens", "pooled"):
            one, other = getattr(stored, name), getattr(fresh, name)
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert stored.mask is not None and fresh.mask is not None
        assert torch.equal(stored.mask, fresh.mask)
        assert not stored.null.any()


def test_arrays_are_the_conditions_in_half_precision_and_go_to_other_processes(filled: TextCache) -> None:
    texts, copy = MANY[18:40:3], pickle.loads(pickle.dumps(filled))  # noqa: S301
    for width in (None, 16):
        arrays, whole = copy.arrays(texts, width), filled.cond(texts, width)
        assert (arrays["tokens"].dtype, arrays["pooled"].dtype) == (np.float16, np.float16)
        assert sum(array.nbytes for array in arrays.values()) <= filled.room(len(texts))
        made = cond_of({name: torch.from_numpy(array) for name, array in arrays.items()})
        for name in ("tokens", "mask", "pooled", "null"):
            assert torch.equal(getattr(made, name), getattr(whole, name))
    assert arrays["tokens"].shape[1] == 16
    assert filled.cond(["green green "]).tokens.shape[1] == 8  # type: ignore[union-attr]


def test_conditions_of_two_batches_are_those_of_one(filled: TextCache) -> None:
    for a, b in ((["green green "], MANY[:2]), (MANY[:2], ["green green "]), (MANY[3:5], MANY[9:10])):
        both, whole = joined(filled.cond(a), filled.cond(b)), filled.cond(a + b)
        for name in ("tokens", "mask", "pooled", "null"):
            assert torch.equal(getattr(both, name), getattr(whole, name))


def test_its_size_is_told_and_compared_with_the_disk_before_it_is_filled(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TextCache(tmp_path, model, 16)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"64 captions take about .* KiB, .* 9 B free"):
        patch.setattr(text_cache, "load_spec", _no_encoder)
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
        cache.ensure(MANY)
    with caplog.at_level("INFO"):
        cache.ensure(MANY)
    size = sum((cache.folder / name).stat().st_size for name in ("records.f16", "index.bin"))
    assert f"encoding {len(MANY)} captions with {model}, about {size_of(size)}" in caplog.text


def test_what_is_stored_needs_no_encoder(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    TextCache(tmp_path, model, 16).ensure(TEXTS)
    monkeypatch.setattr(text_cache, "load_spec", _no_encoder)
    again = TextCache(tmp_path, model, 16)
    assert again.ensure(TEXTS) == 0
    assert len(again.cond(TEXTS)) == len(TEXTS)
    assert TEXTS[0] in again
    assert "never seen" not in again


def test_the_encoder_is_dropped_afterwards(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(*args: Any) -> TextEncoder:
        encoder = real(*args)
        seen.append(weakref.ref(encoder.model))
        return encoder

    real = text_cache.load_spec
    monkeypatch.setattr(text_cache, "load_spec", load)
    TextCache(tmp_path, model, 16).ensure(TEXTS)
    assert len(seen) == 1
    assert seen[0]() is None


def test_encoders_and_lengths_do_not_mix(tmp_path: Path, model: str) -> None:
    TextCache(tmp_path, model, 16).ensure(TEXTS)
    assert len(TextCache(tmp_path, model, 8)) == 0
    other = tmp_path / "other"
    save_t5(other, "UMT5")
    assert len(TextCache(tmp_path, str(other), 16)) == 0


def test_an_unknown_caption_is_named(tmp_path: Path, model: str) -> None:
    cache = TextCache(tmp_path, model, 16)
    cache.ensure(TEXTS)
    with pytest.raises(KeyError, match="never seen"):
        cache.cond([TEXTS[0], "never seen"])


def test_progress_ends_at_the_total(tmp_path: Path, model: str) -> None:
    calls: list[tuple[int, int]] = []
    TextCache(tmp_path, model, 16).ensure(MANY, lambda done, total: calls.append((done, total)))
    assert calls == sorted(set(calls))
    assert calls[-1] == (len(MANY), len(MANY))


def test_labels_store_nothing(tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "cache", "labels:4")
    assert cache.ensure(["0", "3"]) == 0
    labels = cache.cond(["3", "1"]).labels
    assert labels is not None and labels.tolist() == [3, 1]
    with pytest.raises(UserError, match="from 0 to 3"):
        cache.ensure(["4"])
    assert not (tmp_path / "cache").exists()


def test_captions_that_share_half_a_hash(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = text_cache._keys

    def collide(texts: list[str]) -> Any:
        keys = real(texts).copy()
        keys["hi"] %= 3
        return keys

    monkeypatch.setattr(text_cache, "_keys", collide)
    cache = TextCache(tmp_path, model, 16)
    cache.ensure(MANY)
    found = cache._find([*MANY, "never seen"])
    assert sorted(found[:-1]) == list(range(len(MANY)))
    assert found[-1] == -1


# Interruptions


class _Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 20, 60])
def test_an_interrupted_call_repeated_leaves_the_same_bytes(
    tmp_path: Path, model: str, filled: TextCache, after: int
) -> None:
    def stop(done: int, _: int) -> None:
        if done >= after:
            raise _Stop

    cut = TextCache(tmp_path / "cut", model, 16)
    with pytest.raises(_Stop):
        cut.ensure(MANY, stop)
    before = len(cut)
    assert before < len(MANY)
    assert cut.ensure(MANY) == len(MANY) - before
    assert _stored(cut) == _stored(filled)


@pytest.mark.parametrize("index_cut", [0, 1, 32, 33, 200])
@pytest.mark.parametrize("records_cut", [0, 1, 3000])
def test_a_file_cut_anywhere_is_usable(filled: TextCache, model: str, index_cut: int, records_cut: int) -> None:
    """A power cut may keep any part of what was written."""
    whole = _stored(filled)
    for name, cut in (("index.bin", index_cut), ("records.f16", records_cut)):
        os.truncate(filled.folder / name, (filled.folder / name).stat().st_size - cut)
    again = TextCache(filled.folder.parent, model, 16)
    lost = len(MANY) - len(again)
    assert (lost > 0) == (index_cut + records_cut > 0)
    assert again.ensure(MANY) == lost
    assert _stored(again) == whole


def test_zeros_and_rubbish_at_the_ends_are_dropped(tmp_path: Path, model: str) -> None:
    cache = TextCache(tmp_path, model, 16)
    cache.ensure(MANY[:40])
    with (cache.folder / "index.bin").open("ab") as index, (cache.folder / "records.f16").open("ab") as records:
        index.write(bytes(96) + b"rubbish" * 30)
        records.write(bytes(5001))
    again = TextCache(tmp_path, model, 16)
    assert len(again) == 40
    again.ensure(MANY)
    whole = TextCache(tmp_path / "whole", model, 16)
    whole.ensure(MANY[:40])
    whole.ensure(MANY)
    assert _stored(again) == _stored(whole)


def test_sigkill(tmp_path: Path, model: str, filled: TextCache) -> None:
    code = (
        "import os, signal, sys\n"
        "from pixelgrow.text import cache, encoders\n"
        "cache._SLAB, cache._FLUSH, encoders._CPU_TOKENS = 24, 3, 48\n"
        "def stop(done, total):\n"
        "    if done > 30: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.TextCache(sys.argv[1], sys.argv[2], 16).ensure(sys.argv[3:], stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cut"), model, *MANY], check=False)
    assert done.returncode == -signal.SIGKILL
    cut = TextCache(tmp_path / "cut", model, 16)
    assert 0 < len(cut) < len(MANY)
    cut.ensure(MANY)
    assert _stored(cut) == _stored(filled)


def test_a_full_disk_is_one_line_and_keeps_what_is_there(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TextCache(tmp_path, model, 16)
    cache.ensure(MANY[:10])
    before = _entries(cache)
    real, room = text_cache._write, [700]

    def write(stream: Any, data: memoryview) -> int:
        taken = min(len(data), room[0])
        room[0] -= taken
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(stream, data[:taken])

    monkeypatch.setattr(text_cache, "_write", write)
    with pytest.raises(UserError, match="the disk is full") as caught:
        cache.ensure(MANY)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(text_cache, "_write", real)
    again = TextCache(tmp_path, model, 16)
    assert _entries(again)[: len(before)] == before
    again.ensure(MANY)
    assert len(again) == len(MANY)


def _entries(cache: TextCache) -> list[Any]:
    return cache._entries.tolist()


def test_a_folder_that_cannot_be_made(tmp_path: Path, model: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        TextCache(tmp_path / "file", model, 16).ensure(TEXTS)


def test_numbers_beyond_float16_are_refused(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any) -> TextEncoder:
        encoder = real(*args)
        encoder.model.get_parameter("encoder.final_layer_norm.weight").fill_(1e6)
        return encoder

    real = text_cache.load_spec
    monkeypatch.setattr(text_cache, "load_spec", load)
    with pytest.raises(UserError, match="beyond float16"):
        TextCache(tmp_path, model, 16).ensure(TEXTS)


# Neighbours


def test_a_neighbours_work_is_seen(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = TextCache(tmp_path, model, 16), TextCache(tmp_path, model, 16)
    one.ensure(MANY)
    monkeypatch.setattr(text_cache, "load_spec", _no_encoder)
    assert len(other) == 0
    assert other.ensure(MANY) == 0
    assert _stored(other) == _stored(one)


def test_a_reader_keeps_reading_while_a_neighbour_writes(tmp_path: Path, model: str) -> None:
    reader, writer = TextCache(tmp_path, model, 16), TextCache(tmp_path, model, 16)
    reader.ensure(TEXTS)
    before = reader.cond(TEXTS).tokens
    writer.ensure(MANY)
    after = reader.cond(TEXTS).tokens
    assert before is not None and after is not None
    assert torch.equal(before, after)


def test_writers_wait_for_each_other(tmp_path: Path, model: str) -> None:
    cache = TextCache(tmp_path, model, 16)
    cache.ensure(TEXTS[:1])
    with FileLock(cache.folder / "lock"):
        thread = threading.Thread(target=cache.ensure, args=(TEXTS,))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert len(TextCache(tmp_path, model, 16)) == 1
    thread.join(30)
    assert len(cache) == len(TEXTS)


# Speed


def test_a_hundred_thousand_captions_open_and_read_quickly(tmp_path: Path, model: str) -> None:
    cache = TextCache(tmp_path, model, 16)
    cache.folder.mkdir(parents=True)
    texts = [f"caption {i}" for i in range(100_000)]
    rng = np.random.default_rng(0)
    with (
        text_cache._open(cache.folder / "records.f16") as records,
        text_cache._open(cache.folder / "index.bin") as index,
    ):
        writer = text_cache._Writer(records, index, 0, 0)
        for start in range(0, len(texts), 5000):
            part = texts[start : start + 5000]
            writer.add(part, 4, rng.normal(size=(len(part), 16 * 5)).astype(np.float16))
        writer.flush()
    began = time.perf_counter()
    cache = TextCache(tmp_path, model, 16)
    opened = time.perf_counter()
    cache.cond(texts[:64])
    read = time.perf_counter()
    assert len(cache) == len(texts)
    # Some 30 ms and 1 ms on an idle core; the bounds are for a busy machine.
    assert opened - began < 1
    assert read - opened < 0.1
