"""Captions that are encoded while a network trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixelgrow.text import encoders, online
from pixelgrow.text.cache import TextCache
from pixelgrow.text.encoders import load_encoder
from pixelgrow.text.online import OfWidth, OnlineText
from text_models import TEXTS, save_t5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("online") / "t5"
    save_t5(folder)
    return str(folder)


def test_a_caption_is_encoded_once_however_often_it_occurs(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = encoders.TextEncoder._encode

    def encode(self, ids, mask):  # type: ignore[no-untyped-def]
        seen.append(len(ids))
        return real(self, ids, mask)

    monkeypatch.setattr(encoders.TextEncoder, "_encode", encode)
    text = OnlineText(model, 16)
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2], TEXTS[1]]
    found = text.cond(texts)
    assert seen == [3]
    want = load_encoder(model, 16).encode(texts)
    torch.testing.assert_close(found.tokens, want.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooled, want.pooled, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.mask, want.mask)  # type: ignore[arg-type]
    assert found.tokens is not None and not found.tokens.requires_grad and not found.tokens.is_inference()


def test_it_is_encoded_in_float32_whatever_training_computes_in(model: str) -> None:
    text = OnlineText(model, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = text.cond(TEXTS[:2])
    assert torch.equal(inside.tokens, text.cond(TEXTS[:2]).tokens)  # type: ignore[arg-type]


def test_the_encoder_is_loaded_when_it_is_used_and_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    real = online.load_spec
    monkeypatch.setattr(online, "load_spec", lambda *args: loaded.append(args) or real(*args))
    text = OnlineText(model, 16)
    assert text.ensure(TEXTS) == 0 and not loaded
    text.cond(TEXTS[:1])
    text.cond(TEXTS[1:3])
    assert text.cut(TEXTS).captions == 1 and len(loaded) == 1


def test_captions_of_one_width(model: str, tmp_path: Path) -> None:
    cache = TextCache(tmp_path, model, 16)
    cache.ensure(TEXTS)
    for text in (OfWidth(cache, 16), OfWidth(OnlineText(model, 16), 16)):
        shapes = {text.cond([one]).tokens.shape for one in TEXTS}  # type: ignore[union-attr]
        assert shapes == {(1, 16, 16)}
    assert OfWidth(cache, 16).arrays(TEXTS[1:2])["tokens"].shape == (1, 16, 16)
