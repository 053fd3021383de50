"""Learning from real images' latents or from the teacher's samples, as the teacher gets worse (PaGoDA, Theorem 3.1).

    python -m bench.biased_teacher --figures docs/figures    # three to four minutes of one core
    python -m bench.biased_teacher --quick                   # seconds: that it runs, nothing is judged

The data are a mixture of six Gaussians on a circle, whose score is known exactly. The teacher believes that each of
them is (1 + bias) times as wide as it is: scores too smooth, as a teacher's that was trained too little; at no bias
everything is exact. Its probability-flow ODE gives few pairs of a latent and a point,

    rec    a data point, and the latent that inversion finds for it
    dstl   a latent of the prior, and the point that solving makes of it

and a small generator learns them by their squared error, alone or (`+adv`) with the hinge loss of its prior samples
against fresh data, at the adaptive weight. The distance is sliced Wasserstein-2 between prior samples of the generator
and data. Reconstruction alone shows prior holes: biased latents lie in a part of the prior, and nothing tells the
generator what to do elsewhere. Distillation keeps the teacher's error whatever the adversary says; `rec+adv` need not.

The claim, and the exit status: from no bias to the largest, the distance of dstl+adv grows at least three times as much
as that of rec+adv, in the mean over the seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench.growth_summary import spread
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pixelgrow.diffusion.sampling import karras_grid
from pixelgrow.diffusion.solvers import Denoise, invert, solve
from pixelgrow.onestep.losses import at_output, balanced, hinge_discriminator, hinge_generator
from pixelgrow.rng import generator, seed_of
from pixelgrow.training.cpu import denormals_flushed

MODES, WIDTH = 6, 0.3  # of the data, on a circle of radius 1
SIGMA_MAX = 20.0
GRID = karras_grid(40, 0.01, SIGMA_MAX)  # 40 levels, as in the paper: 78 evaluations to invert, 79 to sample
METHODS = ("rec", "rec+adv", "dstl", "dstl+adv")
BIASES = (0.0, 0.5, 1.0, 2.0)
TARGET = 3.0
PAIRS, BATCH, LR, STEPS = 24, 128, 4e-3, 1200
POINTS = 10_000  # that distances are measured on

Distances = Mapping[str, Sequence[Sequence[float]]]  # by method; of each bias, of each seed


def centres() -> Tensor:
    """(MODES, 2)."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return torch.stack([angle.cos(), angle.sin()], 1)


def data(n: int, g: torch.Generator) -> Tensor:
    """n points (n, 2)."""
    return centres()[torch.randint(MODES, (n,), generator=g)] + WIDTH * torch.randn(n, 2, generator=g)


def teacher(bias: float) -> Denoise:
    """The ideal denoiser of the mixture that a teacher of this bias believes in."""
    mean, width = centres(), WIDTH * (1 + bias)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        variance = width**2 + sigma**2
        posterior = torch.softmax(-(x[:, None] - mean).square().sum(-1) / (2 * variance), -1)  # (B, MODES)
        return (width**2 * x + sigma**2 * posterior @ mean) / variance

    return denoise


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein-2 distance of two sets of n points (n, 2): root mean square over 64 directions."""
    angle = torch.arange(64) * (math.pi / 64)
    directions = torch.stack([angle.cos(), angle.sin()])  # (2, 64)
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt())


def networks(seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Generator (B, 2) -> (B, 2), discriminator (B, 2) -> logits (B, 1)."""
    torch.manual_seed(seed_of(seed, "weights"))
    n = 128
    hidden = [layer for i in (2, n, n) for layer in (nn.Linear(i, n), nn.SiLU())]
    critic = [layer for i in (2, n) for layer in (spectral_norm(nn.Linear(i, n)), nn.LeakyReLU(0.2))]
    return nn.Sequential(*hidden, nn.Linear(n, 2)), nn.Sequential(*critic, spectral_norm(nn.Linear(n, 1)))


def train(method: str, bias: float, seed: int, steps: int) -> nn.Sequential:
    """A generator of points from standard normal latents."""
    g = generator(seed, "training")
    if method.startswith("rec"):
        points = data(PAIRS, g)
        latents = invert(teacher(bias), points, GRID) / SIGMA_MAX
    else:
        latents = torch.randn(PAIRS, 2, generator=g)
        points = solve(teacher(bias), SIGMA_MAX * latents, GRID, "heun")
    made, critic = networks(seed)
    *_, last, _ = made.parameters()  # weight and bias of the last layer
    adversarial = method.endswith("+adv")
    optimizer = torch.optim.Adam(made.parameters(), betas=(0.5, 0.99), fused=True)
    against = torch.optim.Adam(critic.parameters(), betas=(0.5, 0.99), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, 2 - 2 * step / steps)  # falls to zero from half-way on
        against.param_groups[0]["lr"] = 2 * optimizer.param_groups[0]["lr"]
        rows = torch.randint(PAIRS, (BATCH,), generator=g)
        target = points[rows]

        def error(y: Tensor, target: Tensor = target) -> Tensor:
            return (y - target).square().sum(1).mean()

        if adversarial:
            y_pairs, y_prior = made(torch.cat([latents[rows], torch.randn(BATCH, 2, generator=g)])).chunk(2)
            real, fake = critic(torch.cat([data(BATCH, g), y_prior.detach()])).chunk(2)
            against.zero_grad()
            hinge_discriminator([real], [fake]).backward()
            against.step()
            adv = at_output(y_prior, lambda y: hinge_generator([critic(y)]))
            loss = balanced(at_output(y_pairs, error), adv, last, "plain").loss
        else:
            loss = error(made(latents[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made


@torch.no_grad()
def distance(made: nn.Module | None, bias: float, seed: int) -> float:
    """Distance to the data of a generator's prior samples, or of the teacher's own if there is none."""
    g = generator(seed, "distance")
    latents, points = torch.randn(POINTS, 2, generator=g), data(POINTS, g)
    samples = solve(teacher(bias), SIGMA_MAX * latents, GRID, "heun") if made is None else made(latents)
    return sliced_wasserstein(samples, points)


def measure(biases: Sequence[float], seeds: int, steps: int) -> Distances:
    """Distances of all methods, and of the teacher itself."""
    found: dict[str, list[list[float]]] = {"teacher": [[distance(None, b, s) for s in range(seeds)] for b in biases]}
    for method in METHODS:
        found[method] = []
        for bias in biases:
            found[method].append([distance(train(method, bias, s, steps), bias, s) for s in range(seeds)])
            print(f"{method} at bias {bias:g}: {spread(found[method][-1], 3)}", file=sys.stderr, flush=True)
    return found


# --- what is written --------------------------------------------------------------------------------------------------


def growth(distances: Distances, method: str) -> float:
    """How much further from the data the largest bias is than none, in the mean over the seeds."""
    return statistics.mean(distances[method][-1]) - statistics.mean(distances[method][0])


def holds(distances: Distances) -> bool:
    """Whether the claim does."""
    distilled = growth(distances, "dstl+adv")
    return distilled > 0 and distilled >= TARGET * growth(distances, "rec+adv")


def table(distances: Distances, biases: Sequence[float]) -> str:
    """Distances as Markdown."""
    lines = [
        f"Sliced Wasserstein-2 distance of prior samples to the data x 1000, of {PAIRS} pairs; mean and standard "
        f"deviation of {len(distances['rec'][0])} seeds.",
        "",
        "| bias | " + " | ".join(distances) + " |",
        "|---:|" + "---:|" * len(distances),
    ]
    for row, bias in enumerate(biases):
        cells = [spread((1e3 * d for d in of[row]), 0) for of in distances.values()]
        lines.append(f"| {bias:g} | " + " | ".join(cells) + " |")
    grown = ", ".join(f"{method} {1e3 * growth(distances, method):.0f}" for method in METHODS)
    return "\n".join([*lines, "", f"Growth from bias {biases[0]:g} to {biases[-1]:g}, x 1000: {grown}"])


def plot(distances: Distances, biases: Sequence[float], path: Path) -> None:
    """Distance over bias: the mean of the seeds, and a band from least to most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axis = figure.subplots()
    for name, of in distances.items():
        style: dict[str, Any] = {"color": "grey", "linestyle": ":"} if name == "teacher" else {"marker": "."}
        (line,) = axis.plot(biases, [statistics.mean(d) for d in of], label=name, **style)
        axis.fill_between(biases, [min(d) for d in of], [max(d) for d in of], color=line.get_color(), alpha=0.15)
    axis.set(
        xlabel="bias: each Gaussian is believed (1 + bias) times as wide",
        ylabel="distance of prior samples to the data",
        ylim=(0, None),
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--quick", action="store_true", help="one seed, two biases, few steps; nothing is judged")
    args = parser.parse_args(argv)
    biases, seeds, steps = ((BIASES[0], BIASES[-1]), 1, 60) if args.quick else (BIASES, args.seeds, STEPS)
    with denormals_flushed():  # saturated units would else take many times as long
        distances = measure(biases, seeds, steps)
    plot(distances, biases, args.figures / "biased-teacher.png")
    print(table(distances, biases))
    if not (args.quick or holds(distances)):
        sys.exit(f"bench biased_teacher: dstl+adv's distance grows less than {TARGET:g} times as much as rec+adv's")


if __name__ == "__main__":
    main()
