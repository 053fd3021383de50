"""The stream that a one-step generator trains on: real images, each with a pair of an image and its latent."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pixelgrow.data.feed import Packet
from pixelgrow.data.images import BadImage
from pixelgrow.data.loader import Loader
from pixelgrow.data.order import Order
from pixelgrow.data.sources.base import Source, large_enough, wordings_of
from pixelgrow.errors import UserError
from pixelgrow.models.cond import cond_of
from pixelgrow.onestep.distill import DistillBatch
from pixelgrow.onestep.pairs import Pairs, reduced
from pixelgrow.rng import seed_of


class PairStream:
    """An endless, exactly resumable stream of `DistillBatch`es: the images of `loader`, and a pair for each.

    Pairs have an order of their own. The image of an inverted pair is read from its file again at `loader.size`, with
    the centre crop that was inverted; so a grown generator learns details that the teacher never saw. Pairs whose
    file is smaller are left out. `side`: of the generator's latents; those of a larger teacher are `reduced` to it.
    Raises UserError if no pair is left, or if sampled pairs are of another size.
    """

    def __init__(self, loader: Loader, pairs: Pairs, side: int) -> None:
        self.loader, self.pairs, self.side, self.sources = loader, pairs, side, loader.sources
        if pairs.images is None:
            self.usable = np.flatnonzero(_fits(pairs.origins, self.sources, loader.size))
        elif pairs.images.shape[-2:] == loader.size:
            self.usable = np.arange(len(pairs))
        else:
            h, w = pairs.images.shape[-2:]
            raise UserError(
                f"the teacher sampled the pairs at {h}x{w}, this stage needs images of "
                f"{loader.size[0]}x{loader.size[1]}: take inverted pairs, or pairs sampled by a teacher of that size"
            )
        if not len(self.usable):
            raise UserError(
                f"none of the {len(pairs)} pairs has an image of at least {loader.size[0]}x{loader.size[1]} pixels: "
                "make pairs of larger images (data: in the pairs stage)"
            )
        self.order = Order([len(self.usable)], seed=seed_of(loader.seed, "pairs"))

    def texts(self) -> Iterator[str]:
        """The captions of the pairs, read one by one."""
        return (caption(self.sources, self.pairs.origins[n]) for n in self.usable)

    def batches(self, start: int = 0, step: int | None = None) -> Generator[DistillBatch, None, None]:
        """Batches without end; see `Loader.batches`. Close it to stop the loader's workers."""
        size = self.loader.batch
        for tensors, said, at in self.loader.stream(self.packet, self.room, start, step):
            yield DistillBatch(
                image=tensors["image"],
                text=said.text,
                index=torch.arange(at, at + size),
                latent=reduced(tensors["latent"].float(), self.side),
                target=tensors["target"],
                target_text=said.target_text,
                guidance=tensors.get("guidance"),
                caption=torch.tensor(said.caption),
                cond=cond_of(tensors) if self.loader.text else None,
                target_cond=cond_of(named(tensors, "target_")) if self.loader.text else None,
            )

    def packet(self, start: int) -> Packet:
        """The batch at position `start`, as a worker sends it."""
        packet = self.loader.packet(start)
        if isinstance(packet.rest, UserError):
            return packet
        numbers = [int(self.usable[self.order.at(i).item]) for i in range(start, start + self.loader.batch)]
        try:
            arrays = {**packet.arrays, **self.arrays(numbers)}
        except UserError as error:
            return Packet({}, error)
        texts = tuple(caption(self.sources, self.pairs.origins[n]) for n in numbers)
        if self.loader.text:
            arrays |= {f"target_{name}": array for name, array in self.loader.text.arrays(texts).items()}
        return Packet(arrays, replace(packet.rest, target_text=texts))

    @property
    def room(self) -> int:
        """Bytes of the arrays of a packet."""
        of_pairs = (self.pairs.latents, self.pairs.images, self.pairs.guidance)
        pair = sum(
            rows.shape[1:].numel() * 4 for rows in of_pairs if rows is not None
        )  # more than half precision takes
        return 2 * self.loader.room + self.loader.batch * pair

    def arrays(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """Of the pairs of some numbers: `latent` (B, 3, h, w), `target` (B, 3, H, W), and `guidance` (B,) if they have
        weights."""
        pairs = self.pairs
        found = {"latent": pairs.latents[numbers].numpy()}
        if pairs.images is not None:
            found["target"] = pairs.images[numbers].numpy()
        else:
            found["target"] = np.stack([self._image(n).transpose(2, 0, 1) for n in numbers])
        return found if pairs.guidance is None else found | {"guidance": pairs.guidance[numbers].numpy()}

    def _image(self, number: int) -> np.ndarray:
        source, item, mirrored, *_ = (int(v) for v in self.pairs.origins[number])
        try:
            image = self.sources[source].image(item, self.loader.size, (0.5, 0.5))
        except BadImage as bad:
            raise UserError(
                f"{self.sources[source].name}: {self.sources[source].key(item)}, the image of a pair, cannot be "
                f"decoded any more ({bad.reason}): restore the file, or make the pairs again"
            ) from bad
        return image[:, ::-1] if mirrored else image


def named(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Those whose names have a certain start, by the rest of their names."""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def caption(sources: Sequence[Source], origin: Tensor) -> str:
    """The caption of the pair with an `origin` (3,), or (4,) with the number of the caption."""
    source, item, _, *number = (int(v) for v in origin)
    return wordings_of(sources[source], item)[number[0]].text if number else sources[source].text(item)


def _fits(origins: Tensor, sources: Sequence[Source], size: tuple[int, int]) -> np.ndarray:
    """Which pairs (N,) have an original image of at least `size`."""
    fits = np.zeros(len(origins), bool)
    for number, source in enumerate(sources):
        mine = (origins[:, 0] == number).numpy()
        fits[mine] = np.isin(origins[torch.from_numpy(mine), 1].numpy(), large_enough(source, size))
    return fits
