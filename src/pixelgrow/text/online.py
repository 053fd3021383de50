"""Captions encoded while a network trains: no cache, and the encoder stays in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from pixelgrow.models.cond import Cond, to_device
from pixelgrow.text.cache import TextCache
from pixelgrow.text.cut import Cut
from pixelgrow.text.encoders import TextEncoder, load_spec
from pixelgrow.text.spec import describe


class OnlineText:
    """Encodes captions when they are asked for. In the place of a `TextCache`, whose encodings it gives unrounded.

    The encoder is loaded when it is first used.
    """

    def __init__(self, encoder_name: str, max_tokens: int = 32, device: torch.device | str = "cpu") -> None:
        """Raises UserError if the encoder cannot be found, or if there is none, as for class labels."""
        self.spec = describe(encoder_name, max_tokens)
        assert self.spec.classes is None
        self.dim, self.pooled_dim, self.fingerprint = self.spec.dim, self.spec.pooled_dim, self.spec.fingerprint
        self._device = device
        self._loaded: TextEncoder | None = None
        self._alone = threading.Lock()  # tokenizers are not for several threads

    @property
    def _encoder(self) -> TextEncoder:
        if self._loaded is None:
            self._loaded = load_spec(self.spec, self._device)
        return self._loaded

    def cond(self, texts: Sequence[str], width: int | None = None) -> Cond:
        """The conditions of `texts` on the device, float32; of captions that occur several times, encoded once.

        width: of the token axis; by default the longest's, rounded up to 8.
        """
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        with self._alone:
            found = self._encoder.together(list(rows), width)
        if len(rows) == len(texts):
            return found
        return found[to_device(torch.tensor([rows[text] for text in texts]), found.null.device)]

    def ensure(self, texts: Iterable[str], progress: Callable[[int, int], None] | None = None) -> int:
        """Nothing is stored."""
        return 0

    def reload(self) -> None:
        """Nothing is stored."""

    def cut(self, texts: Sequence[str]) -> Cut:
        """Count those of some distinct `texts` that are longer than `max_tokens`."""
        with self._alone:
            return self._encoder.cut(texts)


@dataclass(frozen=True)
class OfWidth:
    """Captions with a token axis of one length, so that a compiled network has one shape of text."""

    text: TextCache | OnlineText
    width: int

    def cond(self, texts: Sequence[str]) -> Cond:
        return self.text.cond(texts, self.width)

    def arrays(self, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
        assert isinstance(self.text, TextCache)
        return self.text.arrays(texts, self.width)

    def room(self, count: int) -> int:
        assert isinstance(self.text, TextCache)
        return self.text.room(count)
