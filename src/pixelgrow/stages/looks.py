"""What people look at while a stage trains: samples of the recipe's `preview`, and of training captions beside their
images. It changes no weight: its prompts have a text cache of their own, its noise is keyed by (seed, number)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelgrow.data.buckets import Shapes
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.sampling import initial_noise, sample
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import up_nearest
from pixelgrow.onestep.pairs import reduced
from pixelgrow.onestep.watch import Watch
from pixelgrow.pictures import in_groups
from pixelgrow.stages.data import Mixture
from pixelgrow.stages.examples import Examples
from pixelgrow.stages.materials import Materials
from pixelgrow.training.monitor import Row

COLUMNS = 8  # of a sample grid
GRID = 16  # held-out captions on it, where the recipe has no `preview`
KNOWN = 8  # training images on it
GRID_STEPS, GRID_GUIDANCE = 16, 2.0
Size = tuple[int, int]
# Conditions, numbers of noise and a size (h, w) in pixels -> pixels (B, 3, h, w) in [-1, 1].
Maker = Callable[[Cond, Sequence[int], Size], Tensor]


@dataclass(frozen=True)
class Prompts:
    """Prompts in words, of one kind (`what`), their conditions, and the sizes (h, w) of their images, in pixels."""

    what: str
    words: list[str]
    cond: Cond
    sizes: list[Size]


def prompts_of(materials: Materials, held: Examples) -> Prompts:
    """The prompts of a stage's samples: the recipe's `preview`, else captions of `held`, the held-out images."""
    if materials.recipe.preview:
        words = list(materials.recipe.preview)
        return Prompts("the recipe's preview", words, materials.preview_cond(), [held.size] * len(words))
    captions = held.captions[:GRID]
    return Prompts("held-out captions", materials.spoken(captions), materials.cond(captions), held.sizes[:GRID])


@dataclass(frozen=True)
class Looks:
    """The prompts of a stage's grids; captions of training images, and those images, (3, h, w) each in [-1, 1]."""

    prompts: Prompts
    known: Prompts
    images: list[Tensor]

    def rows(self, makers: Mapping[str, Maker]) -> list[Row]:
        """The rows of a grid. `makers`: who makes images of a prompt, in words; the last is the network that trains."""
        rows, number = list[Row](), 0
        *_, trained = makers
        for prompts in (self.prompts, self.known):
            numbers = range(number, number + len(prompts.words))
            made = {who: _made(make, prompts, numbers) for who, make in makers.items()}
            number = numbers.stop
            for start in range(0, len(numbers), COLUMNS):
                part = slice(start, start + COLUMNS)
                words = prompts.words[part]
                rows += [Row(x[part], f"{prompts.what}{who}", words, who == trained) for who, x in made.items()]
        return [*rows, Row(self.images, "these training images", self.known.words, made=False)]


def _made(make: Maker, prompts: Prompts, numbers: Sequence[int]) -> list[Tensor]:
    """An image (3, h, w) of each prompt."""

    def some(rows: list[int], size: Size) -> Tensor:
        of_rows = prompts.cond[torch.tensor(rows, device=prompts.cond.null.device)]
        return make(of_rows, [numbers[row] for row in rows], size).float().cpu()

    return in_groups(prompts.sizes, some)


def looks_of(materials: Materials, mixture: Mixture, shapes: Shapes, held: Examples) -> Looks:
    """What to look at in a stage that trains on images of some shapes of `mixture`."""
    known = materials.known(mixture, KNOWN, shapes)
    words, cond = materials.spoken(known.captions), materials.cond(known.captions)
    prompts = Prompts("captions of training images", words, cond, known.sizes)
    return Looks(prompts_of(materials, held), prompts, known.all_pixels)


def denoiser_rows(looks: Looks, denoiser: Denoiser, materials: Materials, batch: int) -> Callable[[], list[Row]]:
    """Makes the rows of a denoiser's grid, `batch` images at a time."""
    return lambda: looks.rows({"": _samples(denoiser, materials, GRID_GUIDANCE, batch)})


def generator_rows(
    looks: Looks,
    watch: Watch,
    teacher: Denoiser,
    guidance: float,
    interval: tuple[float, float] | None,
    materials: Materials,
    held: Examples,
    batch: int,
) -> Callable[[], list[Row]]:
    """Makes the rows of a generator's grid: its images and its teacher's from the same latents, and reconstructions.

    `guidance`, `interval`: the teacher's. `held`: the held-out images that are watched.
    """
    generator, solve = watch.generator, _samples(teacher, materials, guidance, batch, interval)
    factor = generator.resolution // teacher.resolution
    low = (teacher.resolution, teacher.resolution)
    solved: dict[int, Tensor] = {}  # by the first number; the teacher does not change

    def teachers(cond: Cond, numbers: Sequence[int], size: Size) -> Tensor:
        if numbers[0] not in solved:
            solved[numbers[0]] = up_nearest(solve(cond, numbers, (size[0] // factor, size[1] // factor)), factor)
        return solved[numbers[0]]

    def generated(cond: Cond, numbers: Sequence[int], _: Size) -> Tensor:
        noise = initial_noise(low, materials.recipe.seed, numbers, generator.space.channels).to(materials.device)
        return materials.decode(watch.generate(reduced(noise, generator.latent_resolution), cond))

    def rows() -> list[Row]:
        found = looks.rows({", by the teacher": teachers, ", by the generator from the same latents": generated})
        w, n = watch.watched, min(COLUMNS, len(held))
        again = watch.generate(w.latents[:n], w.cond[:n])
        words = materials.spoken(held.captions[:n])
        return [
            *found,
            Row(list(materials.decode(again).float().cpu()), "held-out images, reconstructed by the generator", words),
            Row(list(held.pixels(range(n))), "these held-out images", words, made=False),
        ]

    return rows


def _samples(
    denoiser: Denoiser,
    materials: Materials,
    guidance: float,
    batch: int,
    interval: tuple[float, float] | None = None,
) -> Maker:
    """Samples of a denoiser as pixels."""

    def make(cond: Cond, numbers: Sequence[int], size: Size) -> Tensor:
        found = sample(
            denoiser,
            cond,
            size=(size[0] // materials.factor, size[1] // materials.factor),
            seed=materials.recipe.seed,
            index=numbers,
            steps=GRID_STEPS,
            guidance=guidance,
            interval=interval,
            batch=batch,
        )
        return materials.decode(found.images)

    return make
