"""How two JSON records differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A key that has another value, or none, in one of two records; nested keys have dots between them."""

    key: str
    a: Any
    b: Any

    def line(self, a: str, b: str) -> str:
        """In words, with the names of both: "guidance: was 2, now 4"."""
        return f"{self.key}: {a} {short(self.a)}, {b} {short(self.b)}"


def differences(a: Any, b: Any, key: str = "") -> list[Difference]:
    """What differs between two records, in their order."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{key}.{k}".lstrip("."))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{key}[{i}]")]
    return [] if a == b else [Difference(key, a, b)]


def short(value: Any) -> str:
    """A value in a message: hashes and long texts are cut, lists are shown by their first entries."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{len(value)} entries" if len(value) > 4 else ", ".join(map(short, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text[:12] if len(text) >= 32 and " " not in text else text if len(text) <= 60 else text[:57] + "..."
