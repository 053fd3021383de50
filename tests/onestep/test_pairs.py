"""Pairs on disk: rows by number out of memory-mapped shards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pixelgrow.errors import UserError
from pixelgrow.onestep.pairs import FORMAT, INDEX, Ode, Pairs, psnr, shard_path, spread, write_shard

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


def test_psnr_is_that_of_a_range_of_two() -> None:
    a = torch.zeros(2, 3, 4, 4)
    assert psnr(a, a + 0.2) == pytest.approx(20)  # (2 / 0.2)^2 is 20 dB
    assert psnr(a, torch.cat([a[:1], a[1:] + 0.2])) == pytest.approx(20 + 10 * math.log10(2))


def test_moments_of_a_band_are_those_of_its_distribution() -> None:
    """A uniform one has kurtosis 1.8, a Gaussian one 3; one band, as an image of one pixel has no others."""
    u = (torch.arange(30_000) + 0.5) / 15_000 - 1
    (found,) = spread(0.5 + 2 * u.view(-1, 3, 1, 1)).values()
    assert found == pytest.approx({"mean": 0.5, "std": 2 / 3**0.5, "kurtosis": 1.8}, abs=1e-3)


def test_bands_of_latents_are_apart() -> None:
    """A pattern of one scale is in the band of that scale alone, with the deviation that noise of its power has."""
    g = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (2, 3, 8, 8), generator=g) * 2 - 1).double()
    detail = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    for k, name in ((1, "1 px"), (2, "2 px"), (4, "4 px")):
        latents = torch.kron(signs, detail.repeat_interleave(k, 0).repeat_interleave(k, 1))  # of a 2k x 2k pattern
        bands = spread(latents)
        assert list(bands) == [f"{2**i} px" for i in range(int(math.log2(16 * k)))] + [f"{16 * k} px and above"]
        for band, found in bands.items():
            assert found["std"] == pytest.approx(k * (4 / 3) ** 0.5 if band == name else 0, abs=1e-4)


def test_the_round_trip_is_measured_from_several_levels() -> None:
    """A first-order solver loses more the further it goes; the parts are of the steps above the lowest level."""
    ode = Ode("ddim", 8, 0.01, 10.0)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    found = ode.round_trip(lambda x, sigma: 0.25 / (0.25 + sigma**2) * x, x, parts=(0.25, 0.5, 1.0))
    levels, values = [float(s) for s in found], list(found.values())
    assert levels == pytest.approx([float(ode.sigmas[i]) for i in (5, 4, 0)], rel=5e-3)  # of 7 steps above sigma_min
    assert values == sorted(values, reverse=True) and values[-1] > 5
    assert all(v == round(v, 2) for v in values)


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux reports memory that is not of a file")
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


def test_pairs_are_of_a_teacher_and_of_data(tmp_path: Path) -> None:
    data = [{"fingerprint": "1", "source": "a"}, {"fingerprint": "2", "source": "b"}]
    written(tmp_path, [2], 4, teacher="t" * 64, keeps=["k" * 64], data=data)
    pairs = Pairs(tmp_path)
    for teachers in (["t" * 64], ["x", "k" * 64]):
        pairs.check(teachers, data)
    for teachers, words in ((["x" * 64], "comes from xxxxxxxxxxxx"), ([], "comes from no")):
        with pytest.raises(UserError, match=words):
            pairs.check(teachers, data)
    for other in (data[::-1], data[:1], [*data[:1], {"fingerprint": "3", "source": "c"}]):
        with pytest.raises(UserError, match=r"made of other data \(a, b, now "):
            pairs.check(["t" * 64], other)
