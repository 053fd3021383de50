"""What one evaluation saves: against guided sampling, by part, by resolution, and against an autoencoder's decoder.

    python -m bench.onestep --figures docs/figures    # four to six minutes of one core
    python -m bench.onestep --quick                   # seconds: that it runs, nothing is judged

1. The shipped one-step generator against 32 guided steps of the shipped 64 px model, in turn, in one process. Encoding
   the captions is the same for both and left out. The exit status: at least 25 times faster per image.
2. Of that evaluation, what the frozen base takes and what the blocks that it was grown by.
3. Cost by resolution, one image at a time: generators that grow by decoder halves, untrained, against decoding a
   picture of that size with an autoencoder of Stable Diffusion's shape, of random weights. That decoder comes after
   every latent generator's own evaluations, so that it alone is what drawing pixels must be cheaper than (PaGoDA,
   arXiv 2405.14822: about twice as fast as a one-step latent model).

Everything is measured in turn, and medians of the rounds' ratios are given. FLOPs and memory are counted without
running anything; what needs more than `--memory` or, by the size before it, more than `--longest` is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.sampling_overhead import conditions, wall
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pixelgrow import checkpoint
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.sampling import initial_noise, sample
from pixelgrow.growth import grown_config
from pixelgrow.model import builtin, find
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import NetConfig
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.plan.network import Live

TARGET = 25.0
TEACHER, ONE_STEP = "tiny", "tiny-onestep"
GUIDANCE = 4.0  # of the shipped model's own settings
TOKENS = 24  # of a batch of scenes' captions
SIDES = (64, 128, 256, 512, 1024)
SLOW = 20.0  # seconds from which one measurement, after none to warm up, must do
REPEATS = 8  # of what takes milliseconds
CPU = torch.device("cpu")
DECODER = "Stable Diffusion's decoder"
# The configuration of runwayml/stable-diffusion-v1-5's `vae`.
STABLE_DIFFUSION: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
}
LATENT = 8  # pixels of a picture's side for each of its latent's


# --- what is measured -------------------------------------------------------------------------------------------------


def one_step() -> tuple[Generator, str]:
    """The shipped one-step generator, or one of its shape that was never trained; and which it is."""
    if ONE_STEP in builtin():
        return checkpoint.load_generator(find(ONE_STEP))[0], ONE_STEP
    shape = grown_config(core(), 64, "preserve", generator=True)
    return Generator(UViT(shape)).eval(), f"an untrained generator of {ONE_STEP}'s shape"


def core() -> NetConfig:
    """The network that the shipped model was grown out of."""
    config = checkpoint.read_config(find(TEACHER)).network
    return config.model_copy(update={"rungs": config.rungs[:-1]}).checked()


def shapes(names: Sequence[str], side: int) -> dict[str, NetConfig]:
    """Generators of `side` pixels by name: `tiny` as shipped, grown from 32 px, others from a core at 64 px."""
    found = {}
    for name in names:
        config = core() if name == "tiny" else shallow_uvit(name, 64)
        while config.resolution < side:
            config = grown_config(config, 2 * config.resolution, "preserve", generator=True)
        found[name] = config
    return found


def drawn(generator: Generator, z: Tensor, cond: Cond, side: int | None = None) -> Iterator[Tensor]:
    """What each rung of one evaluation draws, innermost first, up to `side` pixels."""
    told = z.new_full((len(z),), GUIDANCE) if generator.net.config.guided else None
    for rung in generator.rungs(z, cond, told):
        yield rung.image
        if rung.image.shape[-1] == side:
            return


@torch.no_grad()
def split(generator: Generator, z: Tensor, cond: Cond, side: int | None = None) -> list[float]:
    """Seconds that each rung of one evaluation takes, innermost first."""
    times, images = [], drawn(generator, z, cond, side)
    while True:
        start = time.perf_counter()
        if next(images, None) is None:
            return times
        times.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Speed:
    """Seconds an image of sampling and of one step, their ratio, and the shares of one step; medians of the rounds."""

    sampled: float
    one_step: float
    ratio: float
    least: float
    base: float
    growth: float


def speed(generator: Generator, batch: int, steps: int, rounds: int) -> Speed:
    """Sampling and one step in turn, both at 64 px and of one batch."""
    denoiser, config = checkpoint.load(find(TEACHER))
    cond = conditions(config.network.core, batch, CPU, TOKENS)
    side = (denoiser.resolution, denoiser.resolution)
    settings: dict[str, Any] = {"size": side, "guidance": GUIDANCE, "batch": batch}

    @torch.no_grad()
    def once() -> None:
        z = initial_noise(generator.latent_size(side), 0, range(batch))
        for _ in drawn(generator, z, cond):
            pass

    sample(denoiser, cond, steps=2, **settings)
    once()
    slow, fast, parts = [], [], []
    z = initial_noise(generator.latent_size(side), 0, range(batch))
    for _ in range(rounds):
        slow.append(wall(CPU, lambda: sample(denoiser, cond, steps=steps, **settings)) / batch)
        fast.append(wall(CPU, lambda: [once() for _ in range(REPEATS)]) / REPEATS / batch)
        parts += [split(generator, z, cond) for _ in range(REPEATS)]
    ratios = [s / f for s, f in zip(slow, fast, strict=True)]
    median = statistics.median
    base, growth = median(p[0] for p in parts), median(sum(p[1:]) for p in parts)
    return Speed(median(slow), median(fast), median(ratios), min(ratios), base / batch, growth / batch)


@dataclass(frozen=True)
class Cost:
    """Of a picture: FLOPs, bytes at the most (weights included), seconds (None: not measured), and of those the share
    of the blocks that a generator was grown by."""

    flops: float
    memory: int
    seconds: float | None = None
    growth: float = 0.0


def counted(make: Callable[[], nn.Module], work: Callable[[Any], Iterator[Any]]) -> list[Cost]:
    """FLOPs and bytes after each step of `work(module)`, on fake tensors: nothing is allocated."""
    found = []
    with FakeTensorMode(), torch.no_grad():
        module = make()
        weights = sum(p.numel() * p.element_size() for p in module.parameters())
        with Live() as live:
            for _ in work(module):
                found.append(Cost(live.flops, weights + live.peak))
    return found


def decoder() -> nn.Module:
    """An autoencoder of Stable Diffusion's shape without its encoder, of random weights."""
    from diffusers import AutoencoderKL

    made = AutoencoderKL(**STABLE_DIFFUSION)
    del made.encoder, made.quant_conv
    return made.eval()


def latent(side: int) -> Tensor:
    return torch.randn(1, STABLE_DIFFUSION["latent_channels"], side // LATENT, side // LATENT)


def inputs(config: NetConfig) -> tuple[Tensor, Cond]:
    """A latent and a condition for one picture of a generator."""
    low = config.latent_resolution
    return torch.randn(1, 3, low, low), conditions(config.core, 1, CPU, TOKENS)


def by_resolution(
    names: Sequence[str], sides: Sequence[int], rounds: int, memory: float, longest: float
) -> dict[str, dict[int, Cost]]:
    """{name: {side: cost}} of generators and of the decoder; measured in turn at each size."""
    configs = shapes(names, sides[-1])
    costs: dict[str, dict[int, Cost]] = {}
    generators: dict[str, Generator] = {}
    for name, config in configs.items():
        found = counted(lambda c=config: Generator(UViT(c)), lambda g, c=config: drawn(g, *inputs(c)))
        rungs = [rung.resolution for rung in config.rungs]
        costs[name] = {side: found[rungs.index(side)] for side in sides}
        generators[name] = Generator(UViT(config)).eval()
    costs[DECODER] = {
        side: counted(decoder, lambda d, side=side: iter([d.decode(latent(side)).sample]))[0] for side in sides
    }
    vae, rate = decoder(), 0.0
    for side in sides:
        work: dict[str, Callable[[], list[float]]] = {}
        for name, generator in generators.items():
            if fits(name, side, costs[name][side], memory):
                work[name] = partial(split, generator, *inputs(configs[name]), side)
        expected = costs[DECODER][side].flops / rate if rate else 0.0
        if expected > longest:
            say(
                f"{DECODER} is not measured at {side} px: about {expected:.0f} s by its FLOPs, the limit is {longest:g}"
            )
        elif fits(DECODER, side, costs[DECODER][side], memory):
            work[DECODER] = partial(decode, vae, latent(side))
        times: dict[str, list[list[float]]] = {name: [] for name in work}
        few = expected > SLOW
        for number in range(1 if few else rounds + 1):
            for name, run in work.items():
                took = run()
                if number or few:  # the first warms up
                    times[name].append(took)
        for name, runs in times.items():
            whole = statistics.median(sum(run) for run in runs)
            growth = statistics.median(sum(run[1:]) / sum(run) for run in runs)
            costs[name][side] = Cost(costs[name][side].flops, costs[name][side].memory, whole, growth)
        if DECODER in times:
            rate = costs[DECODER][side].flops / statistics.median(sum(run) for run in times[DECODER])
        say(f"{side} px: " + ", ".join(f"{n} {1e3 * (costs[n][side].seconds or 0):.0f} ms" for n in times))
    return costs


@torch.no_grad()
def decode(vae: Any, z: Tensor) -> list[float]:
    """Seconds that decoding takes, in the form of `split`."""
    return [wall(CPU, lambda: vae.decode(z))]


def fits(name: str, side: int, cost: Cost, memory: float) -> bool:
    """Whether a picture can be made within `memory` GiB; says so if not."""
    needs = cost.memory / 2**30
    if needs > memory:
        say(f"{name} is not measured at {side} px: it needs {needs:.1f} GiB, the limit is {memory:g}")
    return needs <= memory


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- what is written --------------------------------------------------------------------------------------------------


def first_table(found: Speed, what: str, batch: int, steps: int) -> str:
    """Speed and parts as Markdown."""
    whole = found.base + found.growth
    return "\n".join(
        [
            f"64 px, batch {batch}, {torch.get_num_threads()} threads; one step is {what}.",
            "",
            "| | ms an image | |",
            "|---|---:|---|",
            f"| {TEACHER}, {steps} steps, guidance {GUIDANCE:g} | {1e3 * found.sampled:.1f} | |",
            f"| one step | {1e3 * found.one_step:.2f} | {found.ratio:.1f} times faster (at the least "
            f"{found.least:.1f}), target {TARGET:g} |",
            f"| of it, base | {1e3 * found.base:.2f} | {found.base / whole:.0%} |",
            f"| of it, growth blocks | {1e3 * found.growth:.2f} | {found.growth / whole:.0%} |",
        ]
    )


def second_table(costs: dict[str, dict[int, Cost]]) -> str:
    """Cost by resolution as Markdown."""
    names = [name for name in costs if name != DECODER]
    head = [f"{n}, GFLOP | MiB | s | growth blocks | decoder over it" for n in names]
    lines = [
        "Of one picture. FLOPs, MiB at the most (weights included) and seconds of whole generators, and of the decoder "
        "of an autoencoder of Stable Diffusion's shape alone.",
        "",
        "| px | " + " | ".join(head) + " | decoder, GFLOP | MiB | s |",
        "|---:|" + "---:|" * (5 * len(names) + 3),
    ]
    for side, cost in costs[DECODER].items():
        cells = []
        for name in names:
            mine = costs[name][side]
            ratio = f"{cost.seconds / mine.seconds:.1f}" if cost.seconds and mine.seconds else ""
            share = f"{mine.growth:.0%}" if mine.seconds else ""
            cells += [*figures(mine), share, ratio]
        lines.append(f"| {side} | " + " | ".join(cells + figures(cost)) + " |")
    return "\n".join(lines)


def figures(cost: Cost) -> list[str]:
    seconds = "" if cost.seconds is None else f"{cost.seconds:.3g}"
    return [f"{cost.flops / 1e9:.3g}", f"{cost.memory / 2**20:.0f}", seconds]


def plot(costs: dict[str, dict[int, Cost]], path: Path) -> None:
    """Seconds by resolution, and how base and growth blocks share them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name for name in costs if name != DECODER]
    for name, of in costs.items():
        measured = {side: cost for side, cost in of.items() if cost.seconds}
        style: dict[str, Any] = {"color": "grey", "linestyle": ":"} if name == DECODER else {}
        label = name if name == DECODER else f"generator of size {name}"
        left.plot(list(measured), [cost.seconds for cost in measured.values()], marker="o", label=label, **style)
    left.set(xscale="log", yscale="log", xlabel="pixels of a side", ylabel="seconds a picture")
    left.set_xticks(list(costs[DECODER]), [str(side) for side in costs[DECODER]])
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [n + (i - (len(names) - 1) / 2) * width for n in range(len(costs[name]))]
        seconds = [cost.seconds or 0.0 for cost in costs[name].values()]
        growth = [100 * cost.growth if s else 0.0 for cost, s in zip(costs[name].values(), seconds, strict=True)]
        base = [100 - g if s else 0.0 for g, s in zip(growth, seconds, strict=True)]
        (bars,) = right.bar(at, base, 0.92 * width, color=f"C{i}", label=f"size {name}").patches[:1]
        right.bar(at, growth, 0.92 * width, bottom=base, color=bars.get_facecolor(), alpha=0.35, hatch="//")
    right.set(xlabel="pixels of a side", ylabel="% of the time; hatched: growth blocks")
    right.set_xticks(range(len(costs[DECODER])), [str(side) for side in costs[DECODER]])
    right.legend(fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="of the 64 px models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, default=4.0, help="GiB that a picture may take")
    parser.add_argument("--longest", type=float, default=90.0, help="seconds that a picture may take")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"], help="of the generators by resolution")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--quick", action="store_true", help="few steps, small sizes; nothing is judged")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    generator, what = one_step()
    batch, steps, rounds = (1, 2, 1) if args.quick else (args.batch, 32, args.rounds)
    found = speed(generator, batch, steps, rounds)
    print(first_table(found, what, batch, steps) + "\n", flush=True)
    sides = SIDES[:2] if args.quick else SIDES
    costs = by_resolution(args.sizes[:1] if args.quick else args.sizes, sides, rounds, args.memory, args.longest)
    plot(costs, args.figures / "onestep.png")
    print(second_table(costs))
    if not args.quick and found.ratio < TARGET:
        sys.exit(f"bench onestep: one step is {found.ratio:.1f} times faster per image, expected {TARGET:g}")


if __name__ == "__main__":
    main()
