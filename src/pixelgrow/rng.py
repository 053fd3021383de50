"""Randomness as a pure function of its keys: (seed, purpose, sample index)."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = int | str


def seed_of(*keys: Key) -> int:
    """A 63-bit seed from integers and strings; the same on every machine and in every process."""
    digest = hashlib.blake2b("\0".join(str(k) for k in keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*keys: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `keys`."""
    return torch.Generator(device).manual_seed(seed_of(*keys))


def normal(
    shape: Sequence[int], seed: int, stream: str, index: Sequence[int] | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise (B, *shape), row b a function of (seed, stream, index[b]) alone."""
    return torch.stack(
        [torch.randn(*shape, generator=generator(seed, stream, int(i), device=device), device=device) for i in index]
    )


def uniform(seed: int, stream: str, index: Sequence[int] | Tensor) -> Tensor:
    """Uniform numbers (B,) float64 in [0, 1) on the CPU, entry b a function of (seed, stream, index[b]) alone."""
    return torch.tensor([seed_of(seed, stream, int(i)) / 2**63 for i in index], dtype=torch.float64)
