"""The solver of an edit by a multi-step model: forwards and backwards, with the known part of an image inserted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.diffusion.sampling import ancestral_noise, grid_of, initial_noise
from pixelgrow.diffusion.sampling_spec import SamplingSpec
from pixelgrow.diffusion.solvers import Denoise, Noise, trajectory
from pixelgrow.editing.inputs import size_of
from pixelgrow.errors import UserError
from pixelgrow.model import Model, noise_grid
from pixelgrow.models.cond import Cond
from pixelgrow.onestep.latents import FitSettings

Progress = Callable[[int, int], None]
CALM = 2.0  # guidance where details are decided; more would fray edges and add grain
REVERSIBLE = "dpm++2m"
FIT = tuple(field.name for field in dataclasses.fields(FitSettings))  # settings of a one-step generator's edits


class EditPath:
    """A multi-step model's solver with `settings`; those not given are the checkpoint's, else the library's.

    strength: the part of the grid, in (0, 1], that `sigmas` goes through, up to noise level 0.
    more: the part that the second pass, `again`, goes through.
    passes: how often `sigmas` is gone through, to count steps for `progress`.
    inverts: whether images are inverted. Where the checkpoint's own sampler is ddpm, whose noise cannot be undone,
    `REVERSIBLE` then takes its place, unless `settings` name a sampler.
    """

    def __init__(
        self,
        model: Model,
        settings: dict[str, Any],
        progress: Progress | None = None,
        *,
        strength: float = 1.0,
        passes: int = 1,
        more: float = 0.0,
        inverts: bool = False,
    ) -> None:
        if named := [name for name in given_of(settings) if name in FIT]:
            raise UserError(
                f"{', '.join(named)}: a multi-step model edits while it samples and searches for no latent; drop it, "
                "or name a one-step checkpoint"
            )
        if unknown := [name for name in given_of(settings) if name not in SamplingSpec.model_fields]:
            raise UserError(f"{unknown[0]}: no such setting; expected {', '.join(SamplingSpec.model_fields)}")
        if not 0 < strength <= 1:
            raise UserError(f"strength={strength}: expected more than 0 and at most 1; 1 starts from pure noise")
        chosen = model.settings(**settings)
        grid = noise_grid(chosen.pop("grid", "karras"), model.denoiser, model.config)
        self.steps: int = chosen.pop("steps")
        sigmas = grid_of(grid, self.steps, model.denoiser)
        self.sigmas, self.last = (sigmas[round((1 - share) * (len(sigmas) - 2)) :] for share in (strength, more))
        self.sampler: str = chosen.pop("sampler")
        if inverts and self.sampler == "ddpm" and settings.get("sampler") is None:
            self.sampler = REVERSIBLE
        self.model, self.guiding, self.progress = model, chosen, progress
        self.done, self.total = 0, passes * (len(self.sigmas) - 1) + (len(self.last) - 1 if more else 0)

    def denoise(self, cond: Cond, **guiding: Any) -> Denoise:
        """The guided denoiser for conditions; `guiding` overrides the settings."""
        return Guided(self.model.denoiser, cond, **(self.guiding | guiding))

    def noise(self, size: tuple[int, int], seed: int, count: int) -> Tensor:
        """(count, 3, h, w) at the first level: the noise that `sample` starts from."""
        return self.sigmas[0].item() * initial_noise(size, seed, range(count)).to(self.model.device)

    def solve(
        self,
        denoise: Denoise,
        x: Tensor,
        seed: int = 0,
        *,
        index: Sequence[int] | None = None,
        sigmas: Tensor | None = None,
    ) -> Tensor:
        """x (B, 3, h, w) at the first level of the grid, or of `sigmas`, -> images."""
        numbers = range(len(x)) if index is None else index
        noise = ancestral_noise(tuple(x.shape[1:]), seed, numbers, x.device)
        *_, end = self._along(self.sigmas if sigmas is None else sigmas, denoise, x, noise)
        if not bool(end.isfinite().all()):
            raise UserError("the edit gave non-finite pixels: expected finite predictions; try less guidance, or fp32")
        return end

    def fill(
        self, denoise: Denoise, x: Tensor, where: Tensor, z: Tensor, seed: int, sigmas: Tensor | None = None
    ) -> Tensor:
        """Images from z at the first level that equal x (B, 3, h, w) except `where` (B, 1, h, w) is True."""
        filled = self.solve(lambda z, sigma: torch.where(where, denoise(z, sigma), x), z, seed, sigmas=sigmas)
        return torch.where(where, filled, x)

    def again(self, cond: Cond, x: Tensor, where: Tensor, filled: Tensor, seed: int) -> Tensor:
        """A second pass over `filled` images from a lower level, with less guidance: it smooths seams and edges."""
        denoise = self.denoise(cond, guidance=min(CALM, self.guiding["guidance"]))
        noise = self.last[0].item() * initial_noise(size_of(x), rng.seed_of(seed, "again"), range(len(x))).to(x.device)
        return self.fill(denoise, x, where, filled + noise, seed, self.last)

    def invert(self, denoise: Denoise, x: Tensor) -> list[Tensor]:
        """Images x (B, 3, h, w) -> the states at the grid's levels, highest first, x itself last."""
        if self.steps < 2:  # there is no slope at noise level 0, so the image itself would be the noise
            raise UserError(f"steps={self.steps}: an inversion takes 2 or more")
        return [x, *self._along(self.sigmas.flip(0), denoise, x, None)][::-1]

    @torch.no_grad()
    def _along(self, sigmas: Tensor, denoise: Denoise, x: Tensor, noise: Noise | None) -> Iterator[Tensor]:
        for state in trajectory(denoise, x, sigmas, self.sampler, noise):
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)
            yield state


def given_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}
