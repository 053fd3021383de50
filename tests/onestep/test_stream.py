"""Real images and their pairs: whose image, whose caption, at which position."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.test_loader import Letters, Shades
from onestep.test_pairs import written
from pixelgrow.data.loader import Loader
from pixelgrow.data.sources.base import Wording
from pixelgrow.errors import UserError
from pixelgrow.onestep.distill import DistillBatch
from pixelgrow.onestep.pairs import Pairs, reduced
from pixelgrow.onestep.stream import PairStream, caption


def pairs_of(folder: Path, origins: list[list[int]], *, side: int = 4, **facts: Any) -> tuple[Pairs, dict[str, Any]]:
    """Pairs with the given origins (source, sample, mirrored[, caption]), and their rows."""
    folder.mkdir(exist_ok=True)
    whole = written(folder, [len(origins)], side, origin=torch.tensor(origins), **facts)
    return Pairs(folder), whole


def loader(*sources: Any, size: tuple[int, int] = (4, 4), workers: int = 0) -> Loader:
    return Loader(list(sources), size=size, batch=3, seed=2, workers=workers, bad_limit=1)


def first(stream: PairStream, batches: int, start: int = 0) -> list[DistillBatch]:
    made = stream.batches(start)
    taken = list(itertools.islice(made, batches))
    made.close()
    return taken


INVERTED: dict[str, Any] = {"direction": "invert", "solver": {"guidance": 1.0}}


def test_each_real_image_has_a_pair_with_its_own_image_and_caption(tmp_path: Path) -> None:
    sources = Shades(9, name="a"), Shades(5, name="b")
    origins = [[0, 7, 0], [1, 2, 1], [0, 1, 1], [1, 4, 0]]
    pairs, whole = pairs_of(tmp_path, origins, **INVERTED)
    stream = PairStream(loader(*sources), pairs, 4)
    batches, real = first(stream, 8), loader(*sources).batches()
    numbers = []
    for batch in batches:
        want = next(real)
        assert torch.equal(batch.image, want.image) and batch.text == want.text and torch.equal(batch.index, want.index)
        assert batch.guidance is None
        for row in range(3):
            at = [torch.equal(batch.latent[row], latent.float()) for latent in whole["latent"]].index(True)
            source, item, mirrored = origins[at]
            image = sources[source].image(item, (4, 4), (0.5, 0.5))
            assert batch.target_text[row] == sources[source].text(item)
            assert np.array_equal(batch.target[row].permute(1, 2, 0), image[:, ::-1] if mirrored else image)
            numbers.append(at)
    for epoch in range(0, 24, 4):
        assert sorted(numbers[epoch : epoch + 4]) == [0, 1, 2, 3]  # each pair once in an epoch
    assert list(stream.texts()) == [sources[source].text(item) for source, item, _ in origins]
    late = first(stream, 2, start=6)
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(late, batches[2:4], strict=True))
    assert late[0].index.tolist() == [6, 7, 8]
    real.close()
    encoded = loader(*sources, workers=2)
    encoded.text = Letters()
    by_workers = first(PairStream(encoded, pairs, 4), 8)
    for one, other in zip(batches, by_workers, strict=True):
        assert one.target_text == other.target_text and one.text == other.text
        assert all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("image", "target", "latent", "caption"))
        assert other.cond is not None and other.target_cond is not None
        for found, texts in ((other.cond, one.text), (other.target_cond, one.target_text)):
            arrays = Letters().arrays(texts)
            assert torch.equal(found.tokens, torch.from_numpy(arrays["tokens"]).float())  # type: ignore[arg-type]


def test_sampled_pairs_have_their_images_weights_and_captions(tmp_path: Path) -> None:
    class Several(Shades):
        several = True

        def wordings(self, i: int) -> tuple[Wording, ...]:
            return Wording(f"{i} first"), Wording(f"{i} second")

    source = Several(9)
    origins = [[0, 7, 0, 1], [0, 7, 0, 0], [0, 2, 0, 1]]
    pairs, whole = pairs_of(tmp_path, origins, side=8)
    stream = PairStream(loader(source, size=(8, 8)), pairs, 4)
    batch = first(stream, 1)[0]
    texts = ["7 second", "7 first", "2 second"]
    assert list(stream.texts()) == texts == [caption([source], torch.tensor(o)) for o in origins]
    at = [texts.index(text) for text in batch.target_text]
    assert batch.guidance is not None and torch.equal(batch.guidance, whole["guidance"][at])
    assert torch.equal(batch.target, whole["image"][at])
    assert torch.equal(batch.latent, reduced(whole["latent"][at].float(), 4)) and batch.latent.shape[-1] == 4
    assert batch.caption is not None and [t.split()[1] for t in batch.text] == [
        ("first", "second")[i] for i in batch.caption.tolist()
    ]


def test_pairs_of_images_that_are_too_small_are_left_out(tmp_path: Path) -> None:
    class Growing(Shades):
        def size(self, i: int) -> tuple[int, int]:
            return (i, 2 * i)

    sources = Growing(40, name="a"), Growing(40, name="b")
    pairs, _ = pairs_of(tmp_path, [[0, 15, 0], [0, 16, 0], [1, 30, 1], [1, 3, 0]], **INVERTED)
    stream = PairStream(loader(*sources, size=(16, 16)), pairs, 4)
    assert np.array_equal(stream.usable, [1, 2]) and list(stream.texts()) == ["a 16", "b 30"]
    assert set(first(stream, 1)[0].target_text) <= {"a 16", "b 30"}
    with pytest.raises(UserError, match=r"none of the 4 pairs .* at least 39x39 pixels"):
        PairStream(loader(*sources, size=(39, 39)), pairs, 4)


def test_sampled_pairs_are_of_one_size(tmp_path: Path) -> None:
    pairs, _ = pairs_of(tmp_path, [[0, 1, 0]])
    with pytest.raises(UserError, match=r"at 4x4, this stage needs .* of 8x4"):
        PairStream(loader(Shades(9), size=(8, 4)), pairs, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_gone_is_one_line(tmp_path: Path, workers: int) -> None:
    pairs, _ = pairs_of(tmp_path, [[0, 1, 0]], **INVERTED)
    source = Shades(9, broken=frozenset({1}), name="broken")
    with pytest.raises(UserError, match=r"broken: 1\.png.*cannot be decoded any more"):
        first(PairStream(loader(source, workers=workers), pairs, 4), 1)
