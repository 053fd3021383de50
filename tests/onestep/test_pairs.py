"""Pairs on disk: rows by number out of memory-mapped shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pixelgrow.errors import UserError
from pixelgrow.onestep.pairs import FORMAT, INDEX, Pairs, shard_path, write_shard

STATUS = Path("/proc/self/status")


def written(
    folder: Path, sizes: list[int], side: int, origin: torch.Tensor | None = None, **facts: object
) -> dict[str, torch.Tensor]:
    """A folder of sampled pairs in shards of `sizes`; returns all of their rows."""
    n = sum(sizes)
    whole = {
        "latent": torch.randn(n, 3, side, side).half(),
        "image": torch.rand(n, 3, side, side).half(),
        "origin": torch.arange(3 * n).view(n, 3) if origin is None else origin,
        "guidance": torch.rand(n),
    }
    parts = {name: rows.split(sizes) for name, rows in whole.items()}
    for i in range(len(sizes)):
        write_shard(shard_path(folder, i), {name: rows[i].clone() for name, rows in parts.items()})
    known = {"format": FORMAT, "direction": "sample", "pairs": n, "shards": len(sizes)}
    (folder / INDEX).write_text(json.dumps(known | {"solver": {"guidance": "captions"}} | facts), encoding="utf-8")
    return whole


def test_rows_are_read_by_number_across_shards(tmp_path: Path) -> None:
    whole = written(tmp_path, [4, 1, 3], 4)
    pairs = Pairs(tmp_path)
    assert pairs.images is not None and pairs.guidance is not None
    for numbers in ([7, 0, 4, 4, 3, 5], range(2, 8)):
        assert torch.equal(pairs.latents[numbers], whole["latent"][list(numbers)])
        assert torch.equal(pairs.images[numbers], whole["image"][list(numbers)])
    assert torch.equal(pairs.origins, whole["origin"]) and torch.equal(pairs.guidance, whole["guidance"])
    few = Pairs(tmp_path, fraction=0.25)
    assert len(few) == len(few.origins) == 2 and few.latents.shape == (2, 3, 4, 4)
    shard_path(tmp_path, 2).unlink()  # which the first half does not need
    assert len(Pairs(tmp_path, fraction=0.5)) == 4
    with pytest.raises(UserError, match=r"00002\.safetensors is missing: delete .*stage\.json"):
        Pairs(tmp_path)


@pytest.mark.skipif(not STATUS.exists(), reason="memory that is no file's is told by Linux alone")
def test_pairs_stay_on_disk(tmp_path: Path) -> None:
    def private() -> int:
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    whole = written(tmp_path, [64] * 4, 128)
    size = whole["latent"].nbytes + whole["image"].nbytes
    assert size > 48e6
    numbers = [int(n) for n in torch.randperm(256)]
    wanted = {n: float(whole["latent"][n].float().sum() + whole["image"][n].float().sum()) for n in numbers}
    del whole
    before = private()
    pairs = Pairs(tmp_path)
    assert pairs.images is not None
    for start in range(0, 256, 4):
        some = numbers[start : start + 4]
        for n, latent, image in zip(some, pairs.latents[some], pairs.images[some], strict=True):
            assert float(latent.float().sum() + image.float().sum()) == wanted[n]
    assert private() - before < size / 4


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"direction": "draw"}, "got direction 'draw', expected invert or sample"),  # as it was called before 0.1
        ({"format": 2}, "got format 2, expected 1; make the pairs again"),
        ({"shards": "x"}, r"is damaged .ValueError.; delete .*stage\.json and run the recipe again: shards that are"),
    ],
)
def test_pairs_that_another_version_wrote_are_refused(tmp_path: Path, facts: dict[str, object], words: str) -> None:
    written(tmp_path, [2], 4, **facts)
    with pytest.raises(UserError, match=words):
        Pairs(tmp_path)
