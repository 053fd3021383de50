"""Captions longer than an encoder reads: how many are cut, and which words are lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 8  # words of an example


@dataclass(frozen=True)
class Cut:
    """`captions` of `total` distinct captions have more than `max_tokens` tokens; `unseen`: the words that the encoder
    does not see of the first of them."""

    captions: int = 0
    total: int = 0
    max_tokens: int = 0
    unseen: str = ""

    def line(self, what: str = "caption") -> str:
        """A message about captions that are cut, if there are any; `what` they are called."""
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
    """Count the distinct `texts` of more than `max_tokens` tokens, special tokens included.

    tokenizer: of transformers. total: the number of captions that `texts` were picked from, if the others are short.
    """
    total = len(texts) if total is None else total
    rows = [row for row, length in enumerate(lengths_of(tokenizer, texts)) if length > max_tokens]
    return Cut(len(rows), total, max_tokens, _unseen(tokenizer, texts[rows[0]], max_tokens) if rows else "")


def clean(text: str) -> str:
    """A caption without lone surrogates, which badly decoded files leave and tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def lengths_of(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The numbers of tokens of some texts, special tokens included, as if nothing was cut."""
    if not texts:
        return []
    found = tokenizer([clean(text) for text in texts], truncation=False, padding=False, verbose=False)
    return [len(ids) for ids in found["input_ids"]]


def _unseen(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The words of a long text that do not fit, or its last letters if it has no spaces."""
    words = text.split()
    parts, space = (words, " ") if len(words) > 1 else (list(text), "")
    low, high = 0, len(parts)  # `low` parts fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if lengths_of(tokenizer, [space.join(parts[:middle])])[0] > max_tokens:
            high = middle
        else:
            low = middle
    return space.join(parts[low:])
