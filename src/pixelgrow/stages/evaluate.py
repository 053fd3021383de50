"""The `evaluate` stage: samples of held-out prompts, measured as `pixelgrow evaluate` does, and held-out error.

Images are sampled and measured batch by batch, so the memory used does not grow with their number, and a stage that is
interrupted goes on from what was measured. Several processes share the batches; the first one writes the results.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgrow.data.buckets import square
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.heldout import denoising_error
from pixelgrow.evaluation.images import Conditions, Made, describe_model, eight_bit
from pixelgrow.evaluation.judges import Judge, SceneJudge
from pixelgrow.evaluation.measures import takes
from pixelgrow.evaluation.protocol import Plan, check, measure, result
from pixelgrow.evaluation.real import Real
from pixelgrow.evaluation.shards import Shards
from pixelgrow.model import Model
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import details
from pixelgrow.pictures import grid
from pixelgrow.recipe.stages import EvaluateStage
from pixelgrow.stages.examples import Examples
from pixelgrow.stages.materials import Materials
from pixelgrow.stages.train import Parent, write_prompts
from pixelgrow.training.log import Displays
from pixelgrow.training.monitor import Seams, peak_memory
from pixelgrow.writing import atomic, write_json

MEASURED = "measured"  # in the stage's folder, until it is done
logger = logging.getLogger(__name__)


def evaluate_stage(stage: EvaluateStage, parent: Parent, folder: Path, materials: Materials) -> dict[str, Any]:
    """Run or resume an `evaluate` stage: writes `metrics.json` and `samples/grid.png`; returns the metrics.

    Writes `evaluation.json`, too, as `pixelgrow evaluate` does, if there are metrics to compare.

    Its `details`: mean square of x - up(down(x)) over 2 x 2 pixels, of the samples and of the held-out images. These,
    seams and held-out errors are of the first seed.
    """
    candidate = Evaluated(stage, parent, materials)
    held, seed = candidate.held, materials.recipe.seed
    asked = materials.question_judge(stage)
    prompts = held.captions if asked is None else [item.prompt for item in asked.items]
    if len(prompts) < stage.prompts:
        logger.warning(
            "%s: got %d %sprompts, expected %d",
            stage.name,
            len(prompts),
            "held-out " if asked is None else "",
            stage.prompts,
        )
    if asked is None:
        materials.sees(stage.name, materials.data.prompts(stage.prompts, held.size, len(held.bad)))
    materials.encode(stage.name, prompts)
    own = ["scenes"] if candidate.scenes else []
    metrics = tuple(dict.fromkeys((*(stage.metrics or ()), *own))) if asked is None else tuple(asked.metrics)
    judge: Judge | None = asked
    if asked is None and (seen := takes(metrics, "judge")):
        judge = SceneJudge(seen, prompts)
    trained = takes(metrics, "train")
    plan = Plan(
        metrics,
        range(seed, seed + (stage.seeds or 1)),
        prompts,
        materials.extractors(stage),
        judge,
        real_of(held) if takes(metrics, "real") else None,
        real_of(materials.trained(stage.prompts, square(candidate.model.resolution))) if trained else None,
        stage.reference,
        stage.batch,
    )
    check(plan, candidate)
    team = materials.team
    shards = team.in_turn(lambda: Shards(folder / MEASURED, plan.describe(candidate)))
    with Displays(f"{materials.recipe.name}/{stage.name}") as display:
        measure(candidate, plan, shards, progress=display, team=team)
    return team.alone(lambda: _write(stage, candidate, plan, shards, folder))


def _write(stage: EvaluateStage, candidate: Evaluated, plan: Plan, shards: Shards, folder: Path) -> dict[str, Any]:
    """Write the results of what was measured; returns the metrics."""
    made, held, n = result(candidate, plan, shards), candidate.held, len(plan.prompts)
    rows, values = made.values["metrics"], made.values
    bad = [] if stage.questions else held.bad  # the prompts are not theirs
    values["measured"]["peak_memory"] = peak_memory(candidate.materials.device)
    found: dict[str, Any] = {
        "prompts": n,
        "bad_files": [f"{source.name}: {file.key}: {file.reason}" for source, file in bad],
        "sampling": candidate.sampling,
        "nfe": values["cost"]["nfe"],
        "seconds_per_image": round(values["measured"]["seconds_per_image"], 5),
        **(candidate.summary(made.sums, n) if made.sums else {}),
        "peak_memory": values["measured"]["peak_memory"],
    }
    if accuracy := accuracy_of(rows):
        found["accuracy"] = accuracy
        logger.info("checker: %s", ", ".join(f"{k} {100 * v:.1f}%" for k, v in accuracy.items()))
    if rows:
        found |= {"metrics": rows, "seeds": list(plan.seeds), "extractors": values["extractors"]}
    with atomic(folder / "samples" / "grid.png") as part:
        grid(made.shown.permute(0, 2, 3, 1).numpy(), 8, len(made.shown)).save(part, format="PNG")
    write_prompts(folder, plan.prompts[: len(made.shown)])
    if rows:
        write_json(folder / "evaluation.json", values)
    write_json(folder / "metrics.json", found)
    shards.clear()
    return found


class Evaluated:
    """The model of a stage: samples of held-out prompts, and what is measured on them before they are 8-bit files."""

    prompts = None
    conditions: Conditions = "text"

    def __init__(self, stage: EvaluateStage, parent: Parent, materials: Materials) -> None:
        self.name, self.parent, self.materials = stage.name, parent, materials
        self.model = Model.from_pretrained(parent.folder, materials.device)
        self.sampling, self.given, self.batch = self.model.settings(**stage.given), stage.given, stage.batch
        side = self.model.resolution
        self.held = materials.heldout(stage.prompts, square(side))
        self.size = self.held.size
        self.looks_at_held = stage.questions is None

    @property
    def scenes(self) -> bool:
        """Whether all held-out images are scenes."""
        return all(isinstance(source, Scenes) for source, _ in self.held.origins)

    def describe(self) -> dict[str, Any]:
        return describe_model(self.model) | {"sampling": self.sampling}

    def make(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Made:
        cond = self.materials.cond(prompts)
        sampler = self.model.sampler(seed=seed, batch=self.batch, **self.given)
        found = sampler(cond, numbers, None)
        images = self.materials.decode(found.images)
        made = eight_bit(images, self.name, numbers)
        # Held-out images are measured once, beside samples of their captions.
        first = self.looks_at_held and seed == self.materials.recipe.seed
        sums = self._sums(images, cond, range(numbers[0], numbers[-1] + 1)) if first else {}
        return Made(made, found.nfe, sums)

    def _sums(self, images: Tensor, cond: Cond, numbers: range) -> dict[str, Tensor]:
        """Sums over some images (B, 3, h, w) in [-1, 1], and over the held-out ones of their numbers."""
        seams, pixels = self._seams(), self.held.pixels(numbers)
        seams.add(images)
        sums = {f"seams/{side}": torch.tensor([*seams.across[side], *seams.inside[side]]) for side in seams.across}
        if images.shape[-1] % 2 == 0:
            pairs = images, pixels
            sums["details"] = torch.stack([details(x, 2).square().mean((1, 2, 3)).sum().cpu() for x in pairs]).double()
        model = self.model.network
        if isinstance(model, Denoiser):
            held, seed = self.held.encode(pixels).to(self.materials.device), self.materials.recipe.seed
            by_level = denoising_error(model, held, cond, scale=model.noise_scale, seed=seed, index=numbers)
            sums |= {f"error/{level:g}": torch.tensor(e * len(numbers)).double() for level, e in by_level.items()}
        return sums

    def _seams(self) -> Seams:
        return Seams(self.materials.patches(self.model.network))

    def summary(self, sums: Mapping[str, Tensor], n: int) -> dict[str, Any]:
        """Seams, details and held-out errors from the sums over all `n` images."""
        seams = self._seams()
        for side in seams.across:
            found = sums[f"seams/{side}"].tolist()
            seams.across[side], seams.inside[side] = found[:2], found[2:]
        summary: dict[str, Any] = {"seams": seams.ratios()}
        if "details" in sums:
            summary["details"] = dict(zip(("samples", "images"), (sums["details"] / n).tolist(), strict=True))
        if errors := {k.partition("/")[2]: float(v) / n for k, v in sums.items() if k.startswith("error/")}:
            summary["error"] = errors
        return summary


def real_of(held: Examples) -> Real:
    """The held-out images as an evaluation's real ones."""
    names = dict.fromkeys(source.name for source, _ in held.origins)
    said = "\0".join(f"{source.fingerprint} {i}" for source, i in held.origins)
    digest = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
    return Real(", ".join(names), digest, held.origins, held.size, held.captions)


def accuracy_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The checker's accuracy by kind of question, and "all": the share of images with every answer as expected."""
    found = {row["measure"]: row["mean"] for row in rows if row["metric"] == "scenes"}
    kinds = {k: v for k, v in found.items() if k not in ("scenes", "scenes-questions")}
    return kinds | ({"all": found["scenes"]} if found else {})
