"""What the growth benchmark trains: the regimes, and how many images each of them gets from a budget of FLOPs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from bench.untrained import TOKENS, denoiser

from pixelgrow.diffusion.heldout import SIGMAS
from pixelgrow.growth import Init, grown_config
from pixelgrow.models.config import NetConfig
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.plan.network import loss_of, spent
from pixelgrow.plan.shapes import planned_core
from pixelgrow.recipe.data import TextSpec
from pixelgrow.stages.looks import GRID, GRID_STEPS


class Regime(NamedTuple):
    """How a core is grown, and what becomes of it; `exact`: by exact rungs."""

    init: Init
    core: Literal["finetune", "frozen", "unfreeze"]
    exact: bool = False


REGIMES: dict[str, Regime] = {
    "scratch": Regime("scratch", "finetune"),
    "finetune-random": Regime("random", "finetune"),
    "frozen-random": Regime("random", "frozen"),
    "unfreeze-random": Regime("random", "unfreeze"),
    "frozen-preserve": Regime("preserve", "frozen"),
    "unfreeze-preserve": Regime("preserve", "unfreeze"),
    "frozen-exact": Regime("preserve", "frozen", exact=True),
    "finetune-exact": Regime("preserve", "finetune", exact=True),
}
DEFAULT = [name for name, regime in REGIMES.items() if not regime.exact]  # exact: with a trained core, by name
PATCH = 4  # pixels per cell of the top map, of a UViT and of a `preserve` rung alike
TERA = 1e12


@dataclass(frozen=True)
class Phase:
    """Training with one set of frozen tensors."""

    images: int
    flops: float  # per image

    @property
    def cost(self) -> float:
        return self.images * self.flops


@dataclass(frozen=True)
class Plan:
    """What is trained for each seed, and FLOPs of all that is only evaluated."""

    core: Phase
    regimes: dict[str, tuple[Phase, ...]]
    evaluation: dict[str, float]

    @property
    def flops(self) -> float:
        trained = self.core.cost + sum(p.cost for phases in self.regimes.values() for p in phases)
        return trained + sum(self.evaluation.values())

    def starts(self, regime: str) -> float:
        """FLOPs spent before the regime's first step."""
        return 0.0 if regime == "scratch" else self.core.cost


def make_plan(args: argparse.Namespace) -> Plan:
    """Images for each regime from the budgets."""
    small = shallow_uvit(
        args.size, args.low, stride=args.stride, core=planned_core(args.size, TextSpec(encoder=args.encoder))
    )

    @cache
    def cost(net: NetConfig, frozen: NetConfig | None = None) -> tuple[float, float]:
        """FLOPs an image, forward and backward."""
        found = spent(loss_of(denoiser(net, frozen), 1, TOKENS))
        return found.forward, found.backward

    def phase(budget: float, net: NetConfig, frozen: NetConfig | None = None) -> Phase:
        flops = sum(cost(net, frozen))
        return Phase(max(1, round(budget / flops / args.batch)) * args.batch, flops)

    def evaluated(net: NetConfig, frozen: NetConfig | None) -> float:
        """Validation; both models before the first step, on held-out images and drawn; the checker's prompts."""
        below, at = cost(small)[0], cost(net, frozen)[0]
        validation = (args.evaluations + 1) * args.heldout * len(SIGMAS) * at
        start = (args.heldout * len(SIGMAS) + 2 * GRID * GRID_STEPS) * (below + at)
        return validation + start + args.prompts * (2 * args.steps + len(SIGMAS)) * at

    core_budget, budget = args.budget * args.core * TERA, args.budget * args.growth * TERA
    core = phase(core_budget, small)
    regimes: dict[str, tuple[Phase, ...]] = {}
    evaluation: dict[str, float] = {}
    for name in args.regimes:
        init, how, exact = REGIMES[name]
        net = grown_config(small, args.to, init, patch=PATCH, exact=exact)
        if how == "unfreeze":
            regimes[name] = (phase(budget / 2, net, small), phase(budget / 2, net))
        elif how == "frozen":
            regimes[name] = (phase(budget, net, small),)
        else:
            regimes[name] = (phase(budget + (core.cost if init == "scratch" else 0), net),)
        evaluation[name] = evaluated(net, None if how == "finetune" else small)
    return Plan(core, regimes, evaluation)


def describe(plan: Plan, args: argparse.Namespace) -> str:
    """The plan as Markdown."""
    lines = [
        f"{args.size}, core at {args.low} px, grown to {args.to} px; batch {args.batch}; {args.seeds} seeds",
        "",
        "| run | images | GFLOP an image | training, TFLOP | with the core, TFLOP | evaluation, TFLOP |",
        "|---|---:|---:|---:|---:|---:|",
        f"| core | {plan.core.images:,} | {plan.core.flops / 1e9:.2f} | {plan.core.cost / TERA:.2f} | | |",
    ]
    for name, phases in plan.regimes.items():
        images = " + ".join(f"{p.images:,}" for p in phases)
        flops = " + ".join(f"{p.flops / 1e9:.2f}" for p in phases)
        cost = sum(p.cost for p in phases)
        total = (cost + plan.starts(name)) / TERA
        lines.append(
            f"| {name} | {images} | {flops} | {cost / TERA:.2f} | {total:.2f} | {plan.evaluation[name] / TERA:.2f} |"
        )
    total = args.seeds * plan.flops
    minutes = total / args.rate / 1e9 / 60
    lines += ["", f"{total / TERA:.0f} TFLOP in all: about {minutes:.0f} minutes at {args.rate:g} GFLOP/s achieved"]
    return "\n".join(lines)
