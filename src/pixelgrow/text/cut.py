"""Captions longer than an encoder reads: how many are cut, and which words it does not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 8  # words of an example


@dataclass(frozen=True)
class Cut:
    """`captions` of `total` distinct ones have more than `max_tokens` tokens; `unseen`: the words of the first that its
    encoder does not see."""

    captions: int = 0
    total: int = 0
    max_tokens: int = 0
    unseen: str = ""

    def line(self, what: str = "caption") -> str:
        """The cut in words, where there is one; `what` the captions are."""
        words = self.unseen.split()
        some = " ".join(words[:_SHOWN]) + (" ..." if len(words) > _SHOWN else "")
        some = some if len(some) <= 100 else f"{some[:97]}..."
        one = self.captions == 1
        return (
            f"{self.captions:,} of {self.total:,} {what}{'' if self.total == 1 else 's'} "
            f"{'is' if one else 'are'} longer than {self.max_tokens} tokens and {'is' if one else 'are'} cut; "
            f"the words{'' if one else ' of the first'} that the text encoder does not see: {some!r}"
        )


def cut_in(tokenizer: Any, texts: Sequence[str], max_tokens: int, total: int | None = None) -> Cut:
    """Which of some distinct `texts` a tokenizer of transformers cuts after `max_tokens`, its special tokens among
    them.

    `total`: the number of captions that `texts` were picked from, if others are known to be short.
    """
    total = len(texts) if total is None else total
    rows = [row for row, length in enumerate(_lengths(tokenizer, texts)) if length > max_tokens]
    return Cut(len(rows), total, max_tokens, _unseen(tokenizer, texts[rows[0]], max_tokens) if rows else "")


def clean(text: str) -> str:
    """A caption as tokenizers take it: a lone surrogate, as a badly decoded file leaves them, would stop them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    if not texts:
        return []
    found = tokenizer([clean(text) for text in texts], truncation=False, padding=False, verbose=False)
    return [len(ids) for ids in found["input_ids"]]


def _unseen(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The words of a long text from the first that does not fit whole; the letters, of a text without spaces."""
    words = text.split()
    parts, space = (words, " ") if len(words) > 1 else (list(text), "")
    low, high = 0, len(parts)  # so many parts fit; so many do not
    while high - low > 1:
        middle = (low + high) // 2
        if _lengths(tokenizer, [space.join(parts[:middle])])[0] > max_tokens:
            high = middle
        else:
            low = middle
    return space.join(parts[low:])
