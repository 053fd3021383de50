"""Edits of images: inpaint, upscale, transfer, interpolate (PaGoDA, arXiv 2405.14822, controllable generation).

A multi-step model edits while it samples: the known part of an image replaces that part of every denoised image. A
one-step generator needs the latent of the known part. Gradient descent finds it, from a prior sample or from the latent
that a multi-step `teacher` inverts the image to.

Images are PIL images or uint8 arrays (H, W, 3): one, or several of one size that are edited together. Beyond rounding,
the edit of image i is a function of the image, its prompts, the seed, i and the settings. `settings` are those of
`Model.sample` (steps, guidance, sampler, grid, interval, threshold) for a multi-step model, and those of `FitSettings`
(iterations, rate, starts, prior, tolerance) for a one-step generator. `progress` is called with (steps done, steps in
all). All functions raise UserError for images, prompts and settings that do not fit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixelgrow.diffusion.guidance import Guided
from pixelgrow.diffusion.sampling import initial_noise, weights_like
from pixelgrow.editing.inputs import (
    ImageLike,
    check_space,
    conditions_of,
    each_of,
    factor_of,
    masks_of,
    pixels_of,
    several,
    size_of,
    stack,
    to_pil,
    words_of,
)
from pixelgrow.editing.path import CALM, FIT, EditPath, Progress, given_of
from pixelgrow.errors import UserError
from pixelgrow.growth import kept_in, ungrown
from pixelgrow.model import Model, OneStepModel
from pixelgrow.models.cond import Cond, mixed, slerp
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.onestep.latents import FitSettings, Generate, Misfit, fit, nearest
from pixelgrow.onestep.pairs import Ode
from pixelgrow.precision import tf32

MAX_FRAMES = 1000
BATCH = 64  # frames at a time
STRENGTH = 0.7  # default of `transfer`
REFINED = 0.4  # part of the noise levels that a second pass goes through
OBJECTS = (0.5, 2.0)  # noise levels at which denoised images show objects, in units of the data's deviation
APART = 0.3  # of the largest difference between the images of two prompts; pixels above it are changed
TEACHER = ("heun", 20)  # the solver of a teacher's inversion: 38 evaluations
CLOSER = 30  # default iterations from the latent of a teacher; the paper takes none
logger = logging.getLogger(__name__)


# --- the four edits ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@tf32()
def inpaint(
    model: Model,
    images: ImageLike | Sequence[ImageLike],
    masks: ImageLike | Sequence[ImageLike],
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Fill the part under a mask as the prompt says; all other pixels stay as they are.

    A mask has the size of its image. It is black where the image is known and anything else where it is to be filled.
    A multi-step model samples with the known pixels in every denoised image, so at each level their state is
    x + sigma eps (as in RePaint, arXiv 2201.09865, but with one noise for all levels). A second pass from a lower noise
    level, REFINED of the grid, smooths seams (ours). A one-step generator fills with the image of the latent that
    matches the known pixels best (`FitSettings`).
    """
    x = pixels_of(model, images)
    fill = masks_of(masks, x)
    cond = conditions_of(model, prompts, len(x))
    if isinstance(model, OneStepModel):
        known = (~fill).float()

        def misfit(image: Tensor) -> Tensor:
            return ((image - x).square() * known).sum((1, 2, 3)) / (3 * known.sum((1, 2, 3)))

        generate = _generating(model, cond, settings)
        z = _latents(model, generate, misfit, x.shape, settings, seed=seed, progress=progress)
        return to_pil(torch.where(fill, generate(z), x))
    path = EditPath(model, settings, progress, more=REFINED)
    filled = path.fill(path.denoise(cond), x, fill, path.noise(size_of(x), seed, len(x)), seed)
    return to_pil(path.again(cond, x, fill, filled, seed))


@torch.no_grad()
@tf32()
def upscale(
    model: Model,
    images: ImageLike | Sequence[ImageLike],
    prompts: str | Sequence[str],
    *,
    teacher: Model | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Enlarge images to the model's resolution; averaged down, the results equal the images given.

    The shorter side is the model's divided by 2, 4, 8 ... In a multi-step model, the averages of every denoised image
    are set to the image given. Its default guidance is CALM: the image already determines most of the result, and more
    guidance harms details. A one-step generator takes the latent whose image, averaged down, is nearest to the one
    given, by descent. With a `teacher`, whose resolution the image must have, the descent starts from the latent of its
    ODE (the paper stops there).
    """
    y = stack(model, images)
    k = factor_of(model, size_of(y))
    size = (k * y.shape[-2], k * y.shape[-1])
    cond = conditions_of(model, prompts, len(y))

    def consistent(image: Tensor) -> Tensor:
        return image + up_nearest(y - box_down(image, k), k)

    if isinstance(model, OneStepModel):
        start = None if teacher is None else _inverted(model, teacher, y, prompts)

        def misfit(image: Tensor) -> Tensor:
            return (box_down(image, k) - y).square().mean((1, 2, 3))

        generate = _generating(model, cond, settings)
        shape = torch.Size([len(y), 3, *size])
        large = generate(_latents(model, generate, misfit, shape, settings, start=start, seed=seed, progress=progress))
    else:
        _no_teacher(teacher)
        path = EditPath(model, {"guidance": CALM} | given_of(settings), progress)
        denoise = path.denoise(cond)
        large = path.solve(lambda z, sigma: consistent(denoise(z, sigma)), path.noise(size, seed, len(y)), seed=seed)
    return to_pil(_averaging_to(large, y, k))


def _averaging_to(image: Tensor, y: Tensor, k: int) -> Tensor:
    """Images (B, 3, kh, kw), clamped to [-1, 1], with their averages set to y (B, 3, h, w), which lies in that range.

    The difference is added to pixels in proportion to their distance from the bound on that side, so none passes it.
    """
    x = image.clamp(-1, 1)
    lack = up_nearest(y - box_down(x, k), k)
    room = torch.where(lack > 0, 1 - x, 1 + x)
    return x + lack * room / up_nearest(box_down(room, k), k).clamp_min(1e-6)


@torch.no_grad()
@tf32()
def transfer(
    model: Model,
    images: ImageLike | Sequence[ImageLike],
    source: str | Sequence[str],
    target: str | Sequence[str],
    *,
    strength: float | None = None,
    teacher: Model | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Change what the prompt `source` says of an image to what `target` says: invert with one, sample with the other.

    Only pixels on which the prompts differ change (`_differing`, after DiffEdit, arXiv 2210.11427; the rest is ours).
    A multi-step model runs its ODE backwards with `source`, without guidance, up to the noise level of `strength` in
    (0, 1]. The states on the way, denoised with either prompt, give the pixels that differ. Those are sampled along the
    ODE with `target`, the others are known as in `inpaint`. A second pass from the noise level REFINED starts from
    fresh noise, as an inverted state still holds the old image's details. A one-step generator finds the image's latent
    as in `upscale` and generates with both prompts; where the two differ, the image of `target` is taken.
    """
    x = pixels_of(model, images)
    before, after = each_of(source, len(x)), each_of(target, len(x))
    old, new = model.conditions(before), model.conditions(after)
    if isinstance(model, OneStepModel):
        if strength is not None:
            raise UserError(
                "strength: a one-step generator has no noise levels to stop at; drop it, or name a multi-step model"
            )
        z = _latent_of(model, x, old, before, teacher, settings, seed, progress)
        now, was = (_generating(model, cond, settings)(z) for cond in (new, old))
        return to_pil(torch.where(_differing([now - was]), now, x))
    _no_teacher(teacher)
    strength = STRENGTH if strength is None else strength
    path = EditPath(model, settings, progress, strength=strength, passes=2, more=min(strength, REFINED), inverts=True)
    states = path.invert(path.denoise(old, guidance=1.0), x)
    by_target, by_source = path.denoise(new), path.denoise(old)
    low, high = (sigma * model.denoiser.noise_scale * model.denoiser.config.sigma_data for sigma in OBJECTS)
    levels = [(sigma, state) for sigma, state in zip(path.sigmas.tolist(), states, strict=True) if sigma > 0]
    nearest_level = min(levels, key=lambda level: abs(math.log(level[0] / math.sqrt(low * high))))
    compared = [level for level in levels if low <= level[0] <= high] or [nearest_level]
    change = _differing([by_target(state, sigma) - by_source(state, sigma) for sigma, state in compared])

    filled = path.fill(by_target, x, change, states[0], seed)
    return to_pil(path.again(new, x, change, filled, seed))


def _differing(changes: Sequence[Tensor]) -> Tensor:
    """Where two versions of an image differ, (B, 1, H, W) bool, from their differences (B, 3, H, W) at some levels.

    The differences are summed over the levels and averaged over a neighbourhood. True where the result is above APART
    of its 99th percentile, and in the neighbourhood of such pixels; nowhere if the versions are equal.
    """
    reach = max(1, round(min(size_of(changes[0])) / 64))
    window = 2 * reach + 1
    total = torch.stack([change.float().square().sum(1, keepdim=True).sqrt() for change in changes]).sum(0)
    near = F.avg_pool2d(total, window, 1, reach, count_include_pad=False)
    pixels = near.flatten(1)  # kthvalue, as quantile takes no more than 2^24 numbers
    most = pixels.kthvalue(math.ceil(0.99 * pixels.shape[1]), dim=1).values[:, None, None, None]
    return F.max_pool2d((near > APART * most.clamp_min(1e-4)).float(), window, 1, reach) > 0


@torch.no_grad()
@tf32()
def interpolate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    frames: int = 8,
    seeds: Sequence[int] | None = None,
    images: Sequence[ImageLike] = (),
    teacher: Model | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """`frames` images from one end to the other: latents on the arc between two (`slerp`), conditions `mixed`.

    The ends have one or two `prompts`. Their latents are those of `sample` for one or two `seeds` (default 0), or those
    of two `images`, each inverted with its prompt. A multi-step model inverts by its own ODE, with the guidance of the
    frames; the default is none, so the end frames equal the images. A one-step generator finds latents as in
    `transfer`; one seed may be given for its descent. BATCH frames are made at a time.
    """
    check_space(model)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    given, ends_of = several(images), [0] if seeds is None else list(seeds)
    if not 1 <= len(texts) <= 2 or not 1 <= len(ends_of) <= 2 or len(given) not in (0, 2):
        raise UserError(
            f"{len(texts)} prompts, {len(ends_of)} seeds and {len(given)} images: expected one or two prompts, and "
            "one or two seeds or two images"
        )
    descends = isinstance(model, OneStepModel) and teacher is None
    if given and seeds is not None and (len(ends_of) > 1 or not descends):
        raise UserError(
            f"seeds {', '.join(map(str, ends_of))} beside images: the images are the ends"
            f"{', and a descent begins at one seed' if descends else ''}; drop {'one' if descends else 'seeds'}"
        )
    if not given and texts[0] == texts[-1] and ends_of[0] == ends_of[-1]:
        raise UserError("both ends are the same: expected two prompts, two seeds or two images")
    if not 2 <= frames <= MAX_FRAMES:
        raise UserError(f"frames={frames}: expected 2 to {MAX_FRAMES}, the ends among them")
    ends = [texts[0], texts[-1]]
    cond = model.conditions(ends)
    x = pixels_of(model, given) if given else None
    size = (model.resolution, model.resolution) if x is None else size_of(x)
    parts = torch.linspace(0, 1, frames, device=model.device).split(BATCH)

    def between(t: Tensor) -> Cond:
        first = torch.zeros_like(t, dtype=torch.int64)
        return mixed(cond[first], cond[first + 1], t, model.denoiser.net.config.core.classes)

    def arc(z: Tensor, t: Tensor) -> Tensor:
        first = torch.zeros_like(t, dtype=torch.int64)
        return slerp(z[first], z[first + 1], t)

    def prior(size: tuple[int, int]) -> Tensor:
        return torch.cat([initial_noise(size, seed, [0]) for seed in (ends_of[0], ends_of[-1])]).to(model.device)

    if isinstance(model, OneStepModel):
        if x is None:
            _nothing_inverted(teacher, settings)
            z = prior(model.generator.latent_size(size))
        else:
            z = _latent_of(model, x, cond, ends, teacher, settings, ends_of[0], progress)
        return [p for t in parts for p in to_pil(_generating(model, between(t), settings)(arc(z, t)))]
    _no_teacher(teacher)
    if x is None:
        path = EditPath(model, settings, progress, passes=len(parts))
        z = path.sigmas[0].item() * prior(size)
    else:
        path = EditPath(model, {"guidance": 1.0} | given_of(settings), progress, passes=1 + len(parts), inverts=True)
        z = path.invert(path.denoise(cond), x)[0]
    made = []
    for t in parts:
        made += to_pil(path.solve(path.denoise(between(t)), arc(z, t), index=[0] * len(t)))
    return made


# --- a one-step generator ---------------------------------------------------------------------------------------------


def _generating(model: OneStepModel, cond: Cond, settings: dict[str, Any]) -> Generate:
    """The generator with conditions, and with a guidance weight if it takes one."""
    chosen = model.settings(**{name: value for name, value in settings.items() if name not in FIT})
    return lambda z: model.generator(z, cond, weights_like(z, chosen.get("guidance"))).float()


def _latents(
    model: OneStepModel,
    generate: Generate,
    misfit: Misfit,
    shape: torch.Size,
    settings: dict[str, Any],
    *,
    start: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Latents whose images, of `shape`, fit. `start`: where the search begins, the latents of a teacher."""
    given = {name: value for name, value in given_of(settings).items() if name in FIT}
    if start is not None and "starts" in given:
        raise UserError("starts: the search begins at the teacher's latent; drop it, or the teacher")
    chosen = FitSettings(**({} if start is None else {"iterations": CLOSER}) | given)
    idle = [name for name in given if name in ("rate", "prior", "tolerance")]
    if idle and not chosen.iterations:
        raise UserError(f"{', '.join(idle)}: there are no iterations to use it in; drop it, or give iterations above 0")
    if start is None:
        h, w = model.generator.latent_size((shape[-2], shape[-1]))
        start = nearest(generate, misfit, (shape[0], h, w), seed, chosen.starts, model.device)
    found = fit(generate, misfit, start, chosen, progress)
    logger.info("error of the known pixels: %.3g (root mean square, in [-1, 1])", float(found.error.max()))
    return found.latent


def _latent_of(
    model: OneStepModel,
    x: Tensor,
    cond: Cond,
    prompts: Sequence[str],
    teacher: Model | None,
    settings: dict[str, Any],
    seed: int,
    progress: Progress | None,
) -> Tensor:
    """The latents of whole images (B, 3, H, W) with their prompts."""
    k = model.resolution // model.generator.latent_resolution
    start = None if teacher is None else _inverted(model, teacher, box_down(x, k), prompts)

    def misfit(image: Tensor) -> Tensor:
        return (image - x).square().mean((1, 2, 3))

    generate = _generating(model, cond, settings)
    return _latents(model, generate, misfit, x.shape, settings, start=start, seed=seed, progress=progress)


@torch.no_grad()
def _inverted(model: OneStepModel, teacher: Model, x: Tensor, prompts: Sequence[str]) -> Tensor:
    """A teacher's latents of images (B, 3, h, w), without guidance, with which they would lie far from prior samples.

    A teacher that was grown with `preserve` after the distillation inverts without its growth.
    """
    if isinstance(teacher, OneStepModel):
        raise UserError(
            "the teacher is a one-step generator, expected a multi-step denoiser: name the checkpoint that it was "
            "distilled from"
        )
    teachers = {e["parent"] for e in model.config.lineage if e.get("verb") == "distill"}
    if teachers and teacher.config.sha256 and not teachers & {teacher.config.sha256, *kept_in(teacher.config.lineage)}:
        raise UserError(
            f"the teacher is {teacher.config.sha256[:12]}, and the generator was distilled from "
            f"{', '.join(h[:12] for h in sorted(teachers))}: name the checkpoint that it was distilled from"
        )
    check_space(teacher)
    denoiser = teacher.denoiser
    while denoiser.resolution > model.generator.latent_resolution and denoiser.net.config.rungs[-1].attach == "base":
        denoiser = ungrown(denoiser)
    if denoiser.resolution != model.generator.latent_resolution:
        raise UserError(
            f"the teacher is a {teacher.resolution} px model, expected {model.generator.latent_resolution} px: name "
            "the checkpoint that the generator was distilled from"
        )
    if min(size_of(x)) != denoiser.resolution:
        raise UserError(
            f"an image of {words_of(x)} cannot be inverted by a teacher of {denoiser.resolution} px: expected a "
            f"shorter side of {denoiser.resolution}, or drop the teacher"
        )
    ode = Ode(*TEACHER, denoiser.sigma_min, denoiser.sigma_max)
    cond = teacher.conditions(prompts)
    return ode.to_latent(Guided(denoiser, cond), x.to(teacher.device)).to(x.device)


def _nothing_inverted(teacher: Model | None, settings: dict[str, Any]) -> None:
    named = [*(name for name in given_of(settings) if name in FIT), *(["teacher"] if teacher is not None else [])]
    if named:
        raise UserError(f"{', '.join(named)}: nothing is inverted without images; drop it, or give two images")


def _no_teacher(teacher: Model | None) -> None:
    if teacher is not None:
        raise UserError(
            "the checkpoint to edit with is a multi-step denoiser, and only a one-step generator takes a teacher: drop "
            "the teacher, or name a one-step checkpoint"
        )
