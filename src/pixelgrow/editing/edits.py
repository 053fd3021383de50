"""Edits of pictures: inpaint, upscale, transfer, interpolate (PaGoDA, arXiv 2405.14822, controllable generation).

A multi-step model edits along its sampler's path: what is known of a picture is put into every denoised image. For a
one-step generator the latent of what is known is looked for, by descent from a prior sample, or from where the ODE of a
multi-step `teacher` leads.

Pictures are PIL images or arrays (H, W, 3) of uint8: one, or several of one size that are edited together; what becomes
of picture i is a function of it, its prompts, the seed, i and the settings, beyond rounding. `settings` are those of
`Model.sample` (steps, guidance, sampler, grid, interval, threshold) for a multi-step model, those of `FitSettings`
(iterations, rate, starts, prior, tolerance) for a one-step generator; `progress` is called with (steps done, steps in
all). All raise UserError for pictures, prompts and settings that do not fit.
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
    Picture,
    check_space,
    conditions_of,
    each_of,
    factor_of,
    masks_of,
    pictures_of,
    pixels_of,
    several,
    size_of,
    stack,
    words_of,
)
from pixelgrow.editing.path import CALM, FIT, EditPath, Progress, given_of
from pixelgrow.errors import UserError
from pixelgrow.growth import kept_in, ungrown
from pixelgrow.model import Model, OneStepModel
from pixelgrow.models.cond import Cond, mixed, slerp
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.onestep.latents import Draw, FitSettings, Misfit, fit, nearest
from pixelgrow.onestep.pairs import Ode
from pixelgrow.precision import tf32

MAX_FRAMES = 1000
BATCH = 64  # frames at a time
STRENGTH = 0.7  # of `transfer`, where none is given
REFINED = 0.4  # of the path: for a second pass
SEEN = (0.5, 2.0)  # noise levels at which a picture's objects are seen, in units of the data's deviation
APART = 0.3  # of the largest difference between two prompts' pictures: from there on they disagree
TEACHER = ("heun", 20)  # the solver of a teacher's inversion: 38 evaluations
CLOSER = 30  # steps of descent from the latent of a teacher, where no number is given; the paper's way takes none
logger = logging.getLogger(__name__)


# --- the four edits ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@tf32()
def inpaint(
    model: Model,
    pictures: Picture | Sequence[Picture],
    masks: Picture | Sequence[Picture],
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Fill what a mask covers by the prompt; every other pixel comes back as it was.

    A mask is as large as its picture, black where the picture is known and anything else where it is to be filled. A
    multi-step model has the known pixels in every denoised image, so that they pass through the noise levels as
    x + sigma eps (as in RePaint, arXiv 2201.09865, with one noise for all levels), and does so once more from the noise
    level of REFINED, so that seams settle (ours). A one-step generator's latent is the one whose picture has the known
    pixels (`FitSettings`).
    """
    x = pixels_of(model, pictures)
    fill = masks_of(masks, x)
    cond = conditions_of(model, prompts, len(x))
    if isinstance(model, OneStepModel):
        known = (~fill).float()

        def misfit(drawn: Tensor) -> Tensor:
            return ((drawn - x).square() * known).sum((1, 2, 3)) / (3 * known.sum((1, 2, 3)))

        draw = _drawing(model, cond, settings)
        z = _latents(model, draw, misfit, x.shape, settings, seed=seed, progress=progress)
        return pictures_of(torch.where(fill, draw(z), x))
    path = EditPath(model, settings, progress, more=REFINED)
    drawn = path.fill(path.denoise(cond), x, fill, path.noise(size_of(x), seed, len(x)), seed)
    return pictures_of(path.again(cond, x, fill, drawn, seed))


@torch.no_grad()
@tf32()
def upscale(
    model: Model,
    pictures: Picture | Sequence[Picture],
    prompts: str | Sequence[str],
    *,
    teacher: Model | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Enlarge pictures to the model's resolution: averaged down, what comes back is what was given.

    The shorter side is the model's divided by 2, 4, 8 ... A multi-step model has the averages of every denoised image
    set to the picture, and is guided by CALM unless told: the picture says enough, and details suffer from more. A
    one-step generator draws from the latent whose picture, averaged down, is the one given, found by descent; with a
    `teacher` from where its ODE leads (the paper stays there; the picture then has the teacher's resolution).
    """
    y = stack(model, pictures)
    k = factor_of(model, size_of(y))
    size = (k * y.shape[-2], k * y.shape[-1])
    cond = conditions_of(model, prompts, len(y))

    def consistent(image: Tensor) -> Tensor:
        return image + up_nearest(y - box_down(image, k), k)

    if isinstance(model, OneStepModel):
        start = None if teacher is None else _inverted(model, teacher, y, prompts)

        def misfit(drawn: Tensor) -> Tensor:
            return (box_down(drawn, k) - y).square().mean((1, 2, 3))

        draw = _drawing(model, cond, settings)
        shape = torch.Size([len(y), 3, *size])
        drawn = draw(_latents(model, draw, misfit, shape, settings, start=start, seed=seed, progress=progress))
    else:
        _no_teacher(teacher)
        path = EditPath(model, {"guidance": CALM} | given_of(settings), progress)
        denoise = path.denoise(cond)
        drawn = path.solve(lambda z, sigma: consistent(denoise(z, sigma)), path.noise(size, seed, len(y)), seed=seed)
    return pictures_of(_averaging_to(drawn, y, k))


def _averaging_to(image: Tensor, y: Tensor, k: int) -> Tensor:
    """Images (B, 3, kh, kw), clipped, with their averages set to y (B, 3, h, w) within [-1, 1].

    What an average lacks is shared out by the room that each pixel has on that side, so that none leaves the range.
    """
    x = image.clamp(-1, 1)
    lack = up_nearest(y - box_down(x, k), k)
    room = torch.where(lack > 0, 1 - x, 1 + x)
    return x + lack * room / up_nearest(box_down(room, k), k).clamp_min(1e-6)


@torch.no_grad()
@tf32()
def transfer(
    model: Model,
    pictures: Picture | Sequence[Picture],
    source: str | Sequence[str],
    target: str | Sequence[str],
    *,
    strength: float | None = None,
    teacher: Model | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """What `source` says of a picture becomes what `target` says: inverted under the one, drawn under the other.

    Pixels change only where the prompts disagree about them (after DiffEdit, arXiv 2210.11427; the rest is ours). A
    multi-step model runs its ODE backwards under `source`, without guidance, up to the noise level of `strength` in
    (0, 1]; where what it makes of the states on the way differs between the prompts (`_differing`), it draws along
    the ODE under `target`, with everything else known as in `inpaint`; and once more from the noise level REFINED, on
    fresh noise, since a state that was inverted still has the old picture's details. A one-step generator's latent of
    the picture, found as in `upscale`, is decoded under both prompts: where they differ, the second decode is taken.
    """
    x = pixels_of(model, pictures)
    before, after = each_of(source, len(x)), each_of(target, len(x))
    old, new = model.conditions(before), model.conditions(after)
    if isinstance(model, OneStepModel):
        if strength is not None:
            raise UserError(
                "strength: a one-step generator has no noise levels to stop at; drop it, or name a multi-step one"
            )
        z = _latent_of(model, x, old, before, teacher, settings, seed, progress)
        drawn, was = (_drawing(model, cond, settings)(z) for cond in (new, old))
        return pictures_of(torch.where(_differing([drawn - was]), drawn, x))
    _no_teacher(teacher)
    strength = STRENGTH if strength is None else strength
    path = EditPath(model, settings, progress, strength=strength, passes=2, more=min(strength, REFINED))
    states = path.invert(path.denoise(old, guidance=1.0), x)
    will, would = path.denoise(new), path.denoise(old)
    low, high = (sigma * model.denoiser.noise_scale * model.denoiser.config.sigma_data for sigma in SEEN)
    levels = [(sigma, at) for sigma, at in zip(path.sigmas.tolist(), states, strict=True) if sigma > 0]
    nearest_level = min(levels, key=lambda level: abs(math.log(level[0] / math.sqrt(low * high))))
    seen = [level for level in levels if low <= level[0] <= high] or [nearest_level]
    change = _differing([will(at, sigma) - would(at, sigma) for sigma, at in seen])

    drawn = path.fill(will, x, change, states[0], seed)
    return pictures_of(path.again(new, x, change, drawn, seed))


def _differing(changes: Sequence[Tensor]) -> Tensor:
    """Where two drawings of a picture differ, (B, 1, H, W) bool, by their differences (B, 3, H, W) at some levels.

    All pixels whose difference, summed over the levels and averaged over the pixels next to it, is above a share APART
    of the largest one's (of a hundredth of the pixels), and those next to them. Nowhere, if it is nothing.
    """
    reach = max(1, round(min(size_of(changes[0])) / 64))
    window = 2 * reach + 1
    total = torch.stack([change.float().square().sum(1, keepdim=True).sqrt() for change in changes]).sum(0)
    near = F.avg_pool2d(total, window, 1, reach, count_include_pad=False)
    most = near.flatten(1).quantile(0.99, dim=1)[:, None, None, None]
    return F.max_pool2d((near > APART * most.clamp_min(1e-4)).float(), window, 1, reach) > 0


@torch.no_grad()
@tf32()
def interpolate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    frames: int = 8,
    seeds: Sequence[int] | None = None,
    pictures: Sequence[Picture] = (),
    teacher: Model | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """`frames` pictures from one end to the other: latents on the arc between two (`slerp`), conditions `mixed`.

    The ends are one or two `prompts`, and one or two `seeds` (0), whose latents are those of `sample`, or two
    `pictures`, each inverted under its prompt: by a multi-step model's own ODE with the guidance that the frames are
    drawn with (none, unless it is given: then the ends are the pictures), or to a one-step generator's latent as in
    `upscale`; a descent may be given one seed. At most BATCH frames are drawn at a time.
    """
    check_space(model)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    given, ends_of = several(pictures), [0] if seeds is None else list(seeds)
    if not 1 <= len(texts) <= 2 or not 1 <= len(ends_of) <= 2 or len(given) not in (0, 2):
        raise UserError(
            f"{len(texts)} prompts, {len(ends_of)} seeds and {len(given)} pictures: expected one or two prompts, and "
            "one or two seeds or two pictures"
        )
    descends = isinstance(model, OneStepModel) and teacher is None
    if given and seeds is not None and (len(ends_of) > 1 or not descends):
        raise UserError(
            f"seeds {', '.join(map(str, ends_of))} beside pictures: the pictures are the ends"
            f"{', and a descent begins at one seed' if descends else ''}; drop {'one' if descends else 'seeds'}"
        )
    if not given and texts[0] == texts[-1] and ends_of[0] == ends_of[-1]:
        raise UserError("both ends are the same: expected two prompts, two seeds or two pictures")
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
            _no_pictures(teacher, settings)
            z = prior(model.generator.latent_size(size))
        else:
            z = _latent_of(model, x, cond, ends, teacher, settings, ends_of[0], progress)
        return [p for t in parts for p in pictures_of(_drawing(model, between(t), settings)(arc(z, t)))]
    _no_teacher(teacher)
    if x is None:
        path = EditPath(model, settings, progress, passes=len(parts))
        z = path.sigmas[0].item() * prior(size)
    else:
        path = EditPath(model, {"guidance": 1.0} | given_of(settings), progress, passes=1 + len(parts))
        z = path.invert(path.denoise(cond), x)[0]
    made = []
    for t in parts:
        made += pictures_of(path.solve(path.denoise(between(t)), arc(z, t), index=[0] * len(t)))
    return made


# --- a one-step generator ---------------------------------------------------------------------------------------------


def _drawing(model: OneStepModel, cond: Cond, settings: dict[str, Any]) -> Draw:
    """The generator under conditions, told its guidance weight if it takes one."""
    told = model.settings(**{name: value for name, value in settings.items() if name not in FIT})
    return lambda z: model.generator(z, cond, weights_like(z, told.get("guidance"))).float()


def _latents(
    model: OneStepModel,
    draw: Draw,
    misfit: Misfit,
    shape: torch.Size,
    settings: dict[str, Any],
    *,
    start: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Latents whose pictures, of `shape`, fit. From `start`, where a teacher found it, in CLOSER steps unless told."""
    given = {name: value for name, value in given_of(settings).items() if name in FIT}
    if start is not None and "starts" in given:
        raise UserError("starts: the search begins where the teacher's ODE ends; drop it, or the teacher")
    chosen = FitSettings(**({} if start is None else {"iterations": CLOSER}) | given)
    idle = [name for name in given if name in ("rate", "prior", "tolerance")]
    if idle and not chosen.iterations:
        raise UserError(f"{', '.join(idle)}: no step of a descent is taken; drop it, or give iterations above 0")
    if start is None:
        h, w = model.generator.latent_size((shape[-2], shape[-1]))
        start = nearest(draw, misfit, (shape[0], h, w), seed, chosen.starts, model.device)
    found = fit(draw, misfit, start, chosen, progress)
    logger.info("known pixels are met to %.3g, of the range [-1, 1] (root mean square)", float(found.error.max()))
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
    """The latents of whole pictures (B, 3, H, W) under their prompts."""
    k = model.resolution // model.generator.latent_resolution
    start = None if teacher is None else _inverted(model, teacher, box_down(x, k), prompts)

    def misfit(drawn: Tensor) -> Tensor:
        return (drawn - x).square().mean((1, 2, 3))

    draw = _drawing(model, cond, settings)
    return _latents(model, draw, misfit, x.shape, settings, start=start, seed=seed, progress=progress)


@torch.no_grad()
def _inverted(model: OneStepModel, teacher: Model, x: Tensor, prompts: Sequence[str]) -> Tensor:
    """A teacher's latents of pictures (B, 3, h, w), without guidance: with it, they lie where no prior sample does.

    A teacher that was grown by `preserve` since the distillation inverts as it was before.
    """
    if isinstance(teacher, OneStepModel):
        raise UserError(
            "the teacher is a one-step generator, expected a multi-step denoiser: name the checkpoint that it was "
            "distilled from"
        )
    asked = {e["parent"] for e in model.config.lineage if e.get("verb") == "distill"}
    if asked and teacher.config.sha256 and not asked & {teacher.config.sha256, *kept_in(teacher.config.lineage)}:
        raise UserError(
            f"the teacher is {teacher.config.sha256[:12]}, and the generator was distilled from "
            f"{', '.join(sorted(asked))[:12]}: name the checkpoint that it was distilled from"
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
            f"a picture of {words_of(x)} cannot be inverted by a teacher of {denoiser.resolution} px: expected a "
            f"shorter side of {denoiser.resolution}, or drop the teacher"
        )
    ode = Ode(*TEACHER, denoiser.sigma_min, denoiser.sigma_max)
    cond = teacher.conditions(prompts)
    return ode.to_latent(Guided(denoiser, cond), x.to(teacher.device)).to(x.device)


def _no_pictures(teacher: Model | None, settings: dict[str, Any]) -> None:
    named = [*(name for name in given_of(settings) if name in FIT), *(["teacher"] if teacher is not None else [])]
    if named:
        raise UserError(f"{', '.join(named)}: nothing is inverted without pictures; drop it, or give two pictures")


def _no_teacher(teacher: Model | None) -> None:
    if teacher is not None:
        raise UserError(
            "the checkpoint to edit with is a multi-step denoiser, expected a one-step generator where a teacher is "
            "given: drop the teacher, or name a one-step checkpoint"
        )
