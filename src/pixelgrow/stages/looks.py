"""What people look at while a stage trains: samples of the recipe's `preview`, and of training captions beside their
images. It changes no weight: its prompts have a text cache of their own, its noise is keyed by (seed, number)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.sampling import initial_noise, sample
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import up_nearest
from pixelgrow.onestep.pairs import reduced
from pixelgrow.onestep.watch import Watch
from pixelgrow.stages.data import Mixture
from pixelgrow.stages.materials import Examples, Materials
from pixelgrow.training.monitor import Row

COLUMNS = 8  # of a sample grid
GRID = 16  # held-out captions on it, where the recipe has no `preview`
KNOWN = 8  # training images on it
GRID_STEPS, GRID_GUIDANCE = 16, 2.0
Maker = Callable[[Cond, Sequence[int]], Tensor]  # conditions and numbers of noise -> pixels (B, 3, H, W) in [-1, 1]


@dataclass(frozen=True)
class Prompts:
    """Prompts in words, of one kind (`what`), and their conditions."""

    what: str
    words: list[str]
    cond: Cond


def prompts_of(materials: Materials, held: Examples) -> Prompts:
    """The prompts of a stage's samples: the recipe's `preview`, else captions of `held`, the held-out images."""
    if materials.recipe.preview:
        return Prompts("the recipe's preview", list(materials.recipe.preview), materials.preview_cond())
    captions = held.captions[:GRID]
    return Prompts("held-out captions", materials.spoken(captions), materials.cond(captions))


@dataclass(frozen=True)
class Looks:
    """The prompts of a stage's grids; captions of training images, and those images (n, 3, H, W) in [-1, 1]."""

    prompts: Prompts
    known: Prompts
    images: Tensor

    def rows(self, makers: Mapping[str, Maker]) -> list[Row]:
        """The rows of a grid. `makers`: who makes images of a prompt, in words; the last is the network that trains."""
        rows, number = list[Row](), 0
        *_, trained = makers
        for prompts in (self.prompts, self.known):
            numbers = range(number, number + len(prompts.words))
            made = {who: make(prompts.cond, numbers).float().cpu() for who, make in makers.items()}
            number = numbers.stop
            for start in range(0, len(numbers), COLUMNS):
                part = slice(start, start + COLUMNS)
                words = prompts.words[part]
                rows += [Row(x[part], f"{prompts.what}{who}", words, who == trained) for who, x in made.items()]
        return [*rows, Row(self.images, "these training images", self.known.words, made=False)]


def looks_of(materials: Materials, mixture: Mixture, side: int, held: Examples) -> Looks:
    """What to look at in a stage that trains on `mixture` at `side`."""
    known = materials.known(mixture, KNOWN, (side, side))
    prompts = Prompts("captions of training images", materials.spoken(known.captions), materials.cond(known.captions))
    return Looks(prompts_of(materials, held), prompts, known.pixels(slice(None)))


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

    def teachers(cond: Cond, numbers: Sequence[int]) -> Tensor:
        if numbers[0] not in solved:
            solved[numbers[0]] = up_nearest(solve(cond, numbers), factor)
        return solved[numbers[0]]

    def generated(cond: Cond, numbers: Sequence[int]) -> Tensor:
        noise = initial_noise(low, materials.recipe.seed, numbers, generator.space.channels).to(materials.device)
        return materials.decode(watch.generate(reduced(noise, generator.latent_resolution), cond))

    def rows() -> list[Row]:
        found = looks.rows({", by the teacher": teachers, ", by the generator from the same latents": generated})
        w, n = watch.watched, min(COLUMNS, len(held))
        again = watch.generate(w.latents[:n], w.cond[:n])
        words = materials.spoken(held.captions[:n])
        return [
            *found,
            Row(materials.decode(again).float().cpu(), "held-out images, reconstructed by the generator", words),
            Row(held.pixels(slice(n)), "these held-out images", words, made=False),
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

    def make(cond: Cond, numbers: Sequence[int]) -> Tensor:
        found = sample(
            denoiser,
            cond,
            size=(denoiser.resolution, denoiser.resolution),
            seed=materials.recipe.seed,
            index=numbers,
            steps=GRID_STEPS,
            guidance=guidance,
            interval=interval,
            batch=batch,
        )
        return materials.decode(found.images)

    return make
