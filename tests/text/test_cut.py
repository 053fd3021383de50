"""Captions longer than an encoder reads: they are counted, and the words that it does not see are named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pixelgrow
from pixelgrow.text import cache
from pixelgrow.text.cache import TextCache
from pixelgrow.text.cut import Cut
from pixelgrow.text.encoders import load_encoder
from text_models import save_clip, save_t5

SHORT = "a red circle"
LONG = "a red circle above two blue stars and three small yellow squares on a dark background below them"
NAMES = {"minilm": None, "t5": save_t5, "clip": save_clip}


def encoder_of(name: str, folder: Path) -> str:
    save: Callable[[Path], Any] | None = NAMES[name]
    if save is None:
        return name
    save(folder)
    return str(folder)


@pytest.mark.parametrize("name", NAMES)
def test_the_unseen_words_are_those_that_change_nothing(name: str, tmp_path: Path) -> None:
    encoder = load_encoder(encoder_of(name, tmp_path), 12)
    cut = encoder.cut([SHORT, LONG, f"{LONG} and more"])
    assert (cut.captions, cut.total, cut.max_tokens) == (2, 3, 12)
    assert LONG.endswith(f" {cut.unseen}")
    seen = LONG.removesuffix(cut.unseen)
    first = cut.unseen.split()[0]
    assert encoder.cut([seen]).captions == 0
    assert encoder.cut([f"{seen}{first}"]).captions == 1
    one, other, whole = (encoder.encode([text]).pooled for text in (LONG, f"{LONG} and more", seen))
    assert one is not None and other is not None and whole is not None
    assert torch.equal(one, other)
    assert name != "minilm" or torch.equal(one, whole)  # a word is one token in this caption


def test_exactly_as_many_tokens_as_are_read_is_not_cut(tmp_path: Path) -> None:
    name = encoder_of("t5", tmp_path)
    assert load_encoder(name, 4).cut([SHORT]) == Cut(0, 1, 4, "")  # with the end token
    assert load_encoder(name, 3).cut([SHORT]) == Cut(1, 1, 3, "circle")


def test_a_text_without_spaces_and_labels() -> None:
    cut = load_encoder("minilm", 8).cut(["紅い丸の上に青い星が二つある"])
    assert cut.captions == 1
    assert cut.unseen and "紅い丸の上に青い星が二つある".endswith(cut.unseen)
    assert load_encoder("labels:3").cut(["0", "1"]) == Cut(total=2)


def test_a_very_long_text_is_said_by_us_alone(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    assert load_encoder("minilm", 8).cut(["word " * 600]).captions == 1
    logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_a_cache_counts_what_it_holds_without_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = encoder_of("t5", tmp_path / "t5")
    TextCache(tmp_path / "text", name, 12).ensure([SHORT, LONG])
    loaded: list[object] = []
    monkeypatch.setattr(cache, "load_spec", lambda *_: loaded.append("encoder"))
    real = cache.load_tokenizer
    monkeypatch.setattr(cache, "load_tokenizer", lambda spec: loaded.append("tokenizer") or real(spec))
    filled = TextCache(tmp_path / "text", name, 12)
    assert filled.cut([SHORT]) == Cut(total=1)
    assert not loaded
    assert filled.cut([SHORT, LONG]) == load_encoder(name, 12).cut([SHORT, LONG])
    assert loaded == ["tokenizer"]


def test_the_line() -> None:
    assert Cut(1, 1, 32, "b c").line("prompt") == (
        "1 of 1 prompt is longer than 32 tokens and is cut; the words that the text encoder does not see: 'b c'"
    )
    assert Cut(1200, 5000, 32, "a b c d e f g h i").line() == (
        "1,200 of 5,000 captions are longer than 32 tokens and are cut; the words of the first that the text encoder "
        "does not see: 'a b c d e f g h ...'"
    )
    assert len(Cut(1, 1, 32, "x" * 500).line()) < 220


def test_a_model_says_once_which_prompts_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    model = pixelgrow.load("tiny")
    long = " and ".join([SHORT] * 12)
    for _ in range(2):
        model.conditions([SHORT, long, long])
    (record,) = caplog.records
    assert record.getMessage().startswith("1 of 2 prompts is longer than 32 tokens and is cut; the words that")
    model.conditions([f"{long} indeed"])
    assert len(caplog.records) == 2
