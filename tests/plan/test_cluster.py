"""Plans for clusters: layouts, what does not fit, disks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import RunCli
from pixelgrow.errors import UserError
from pixelgrow.growth import grown_config
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.plan.cluster import Placed, decoded_per_second, disks, place
from pixelgrow.plan.gpus import GIB, GPUS, ROOM, Cluster, Gpu
from pixelgrow.plan.layout import Layout, Parts, Sizes, cheapest, generator_sizes, sizes, what_would
from pixelgrow.plan.network import network_cost, parameters_of
from pixelgrow.plan.onestep import Distillation, distill_cost
from pixelgrow.plan.recipe import plan_recipe
from pixelgrow.plan.text import plan_text
from pixelgrow.recipe.read import load_recipe
from pixelgrow.report.cluster import settings_of
from pixelgrow.training.settings import Checkpointing, TrainSettings

BIG = Sizes(
    weights=32 * GIB, training=32 * GIB, optimizer=64 * GIB, averages=64 * GIB, copied=32 * GIB,
    block=GIB, reduced=GIB, root=0, width=2,
    activations=1.9 * GIB, transient=0.1 * GIB, flops=1e13, update=0,
)  # fmt: skip
SMALL = replace(BIG, weights=GIB, training=GIB, optimizer=2 * GIB, averages=0, copied=GIB, block=0, reduced=0)
LESS: dict[Checkpointing, float] = {False: 1.0, "selective": 0.5, True: 0.1}  # of the activations


def by_mode(found: Sizes) -> Any:
    def measure(mode: Checkpointing) -> Sizes:
        less = LESS[mode]
        more = 4 / 3 if mode is True else 1
        return replace(found, activations=found.activations * less, flops=found.flops * more)

    return measure


@pytest.mark.parametrize(
    ("found", "gpus", "gpu", "batch", "layout", "micro_batch", "mode"),
    [
        (SMALL, 1, "h100", 256, "one GPU", 32, False),  # 3 + 1 + 0.5 + 64 of 72 GiB
        (SMALL, 64, "h100", 2048, "replicate", 32, False),
        (BIG, 64, "h100", 2048, "shard 8 x 8", 16, False),  # 4 GPUs wait for each other
        (BIG, 8, "h100", 2048, "shard 8", 16, False),
        (BIG, 2, "h200", 64, "shard 2", 16, "selective"),  # else only 8 fit, and the GPUs wait
        (BIG, 16, "h100", 16, "shard 4 x 4", 1, False),  # all wait: the first that fits
    ],
)
def test_the_cheapest_layout_that_fits(
    found: Sizes, gpus: int, gpu: str, batch: int, layout: str, micro_batch: int, mode: Checkpointing
) -> None:
    cluster = Cluster(gpus, gpu)
    best = cheapest(cluster, batch, by_mode(found))
    assert best is not None and (str(best), best.micro_batch, best.checkpointing) == (layout, micro_batch, mode)
    assert best.accumulate == batch // micro_batch and best.accumulate % gpus == 0
    assert best.memory.peak <= cluster.room == ROOM * cluster.gpu.memory


def test_a_text_encoder_takes_room() -> None:
    best = cheapest(Cluster(1, "h100", taken=40 * GIB), 256, by_mode(SMALL))
    assert best is not None and best.micro_batch == 8  # 3 + 1 + 0.5 + 16 of 32 GiB
    recipe = load_recipe("smoke-vermeer")
    text = plan_text(recipe)
    assert text is not None and 10e6 < text.resident / 2 < 12e6  # minilm, without its tables
    stored = plan_text(load_recipe("smoke"))
    assert stored is not None and stored.resident == 0


def test_parts_of_memory() -> None:
    whole = BIG.on(8, 1, 2, several=True)
    assert whole.peak == (32 + 32 + 64 + 64 + max(16 + 4, 32)) * GIB  # copies and activations, or all gradients at once
    assert BIG.on(1, 1, 2, several=False).peak == (32 + 64 + 64 + 32) * GIB
    shared = BIG.on(64, 8, 16, several=True)
    assert shared.peak == (32 + 32 + 64 + 64) * GIB // 8 + (32 + 1 + 2.5) * GIB
    assert (shared.weights, shared.compute, shared.buffers) == (4 * GIB, GIB, 2.5 * GIB)
    assert replace(BIG, root=8 * GIB).on(64, 8, 2, several=True).compute == 5 * GIB
    assert BIG.on(64, 64, 1, several=True).peak == 160 * GIB // 64 + 32 * GIB  # a whole average is looked at


def test_what_does_not_fit_says_what_would() -> None:
    measure = by_mode(BIG)
    assert cheapest(Cluster(2, "a100"), 64, measure) is None
    said = what_would(Cluster(2, "a100"), 64, measure)
    assert said.startswith("it takes 124 GiB of 80 GiB a GPU") and said.endswith("4 GPUs would do")
    assert ", sharded over all of them, with" in said
    frozen = replace(BIG, training=GIB, optimizer=2 * GIB, averages=2 * GIB, copied=0)  # whole averages are looked at
    assert "it takes 42 GiB of 40 GiB a GPU, whole on each" in what_would(Cluster(2, "a100-40"), 2, by_mode(frozen))
    assert what_would(Cluster(2, "a100"), 2, measure).endswith("GPUs like h200 would do")
    assert what_would(Cluster(1, "a100"), 1, measure).endswith("lower the size or the resolution")


@pytest.mark.parametrize(("init", "mode"), [("", "selective"), ("preserve", True), ("random", False)])
def test_a_layout_on_one_gpu_takes_what_the_plan_of_the_recipe_says(init: Any, mode: Checkpointing) -> None:
    config, old = shallow_uvit("tiny", 32), None
    if init:
        config, old = grown_config(config, 64, init), config
    settings = TrainSettings(images=100, batch=8, accumulate=2, activation_checkpointing=mode)
    exact = network_cost(config, settings, frozen=old, bf16=True, gpu=True)
    found = sizes(config, settings, old, 32, mode)
    assert found.on(1, 1, 4, several=True).peak == pytest.approx(exact.memory.peak, rel=0.05)
    assert found.flops == pytest.approx(exact.flops, rel=1e-9)


@pytest.mark.parametrize(
    ("grown", "mode", "bf16", "optimizer"),
    [(False, "selective", True, "adamw"), (True, False, True, "radam"), (False, True, False, "radam")],
)
def test_a_layout_of_a_generator_takes_what_the_plan_of_the_recipe_says(
    grown: bool, mode: Checkpointing, bf16: bool, optimizer: Any
) -> None:
    base = shallow_uvit("tiny", 16)
    config = grown_config(base, 32, "preserve", generator=True) if grown else base
    of = Distillation(config, base, LossSettings(), frozen=base if grown else None, free=int(grown))
    given: dict[str, Any] = {"precision": "bf16" if bf16 else "fp32", "optimizer": optimizer}
    settings = TrainSettings(images=256, batch=128, accumulate=2, activation_checkpointing=mode, **given)
    found = generator_sizes(of, settings, mode)
    for n in (2, 64):  # what weights take, and what images do
        exact = distill_cost(of, settings.model_copy(update={"batch": 2 * n}), bf16=bf16, gpu=True)
        assert found.on(1, 1, n, several=True).peak == pytest.approx(exact.memory.peak, rel=0.05)
        assert found.flops == pytest.approx(exact.flops, rel=1e-6)
    # Sharded, the generator's tensors are fewer. The teacher, and all of the discriminator, are whole.
    generator = 4 * parameters_of(UViT(config))
    memory = exact.memory
    discriminator = memory.weights - 2 * 4 * parameters_of(UViT(base)) if not grown else None
    assert found.weights == generator
    kept = memory.weights - generator + memory.optimizer - found.optimizer + memory.averages - found.averages
    assert found.others == kept and (discriminator is None or 0 < discriminator < found.others - generator)
    half = found.on(2, 2, 1, several=True)
    assert half.weights == generator // 2 + found.others
    always = (generator + found.optimizer + found.averages) // 2 + found.others
    step = half.gradients + half.activations + half.compute + half.buffers + found.beside
    assert half.peak == always + max(step, generator, found.training // 2 + found.update // 2)


def test_a_generator_hides_less_than_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    base = shallow_uvit("tiny", 16)
    settings = TrainSettings(images=64, batch=64)
    found = generator_sizes(Distillation(base, base, LossSettings()), settings, False)
    plain = generator_sizes(Distillation(base, base, LossSettings(adversarial=False)), settings, False)
    assert (found.fetches, plain.fetches) == (3, 2)
    assert found.hiding == plain.hiding and found.hiding is not None and found.hiding < 0.5 * found.flops
    moved = 3 * found.weights / 2 + found.training  # in bfloat16, and gradients in float32
    for link, hidden in ((1.01, True), (0.99, False)):
        speed = link * moved / (0.5 * 8 * found.hiding)  # bytes/s of the link for each FLOP/s
        monkeypatch.setitem(GPUS, "this", Gpu(80 * GIB, 1e12, 0.4e12 * speed))
        assert found.hidden(Cluster(2, "this"), 2, 8) is hidden


def in_gib(text: str) -> float:
    number, unit = text.rsplit(" ", 1)
    return float(number) * {"GiB": 1, "MiB": 2**-10}[unit]


def test_huge_on_eight_machines(run_cli: RunCli) -> None:
    """The command of docs/scale.md, and its table."""
    command = "pixelgrow plan huge --gpus 64 --gpu h100"
    docs = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert f"```bash\n{command}\n```" in docs
    done = run_cli(*command.split()[1:])
    lines = [line for line in done.out.splitlines() if line.startswith(("core:", "raw:", "tuned:"))]
    work, memory = ([re.split(r"  +", line.strip())[1:] for line in lines[i : i + 3]] for i in (0, 3))
    assert [row[:5] for row in work] == [
        ["256", "shard 8 x 8", "32", "64", "selective"],
        ["1024", "replicate", "8", "256", "none"],
        ["1024", "shard 8 x 8", "32", "64", "selective"],
    ]
    state = [sum(map(in_gib, row[:4])) for row in memory]
    assert state[0] == pytest.approx(22.3, abs=0.3) and float(work[0][6].split()[0]) == pytest.approx(21, abs=1)
    table = re.findall(r"^\| (?:core|raw|tuned),.*$", docs, re.MULTILINE)
    said = [[float(cell) for cell in re.findall(r"([\d.]+) GiB", row)] for row in table]
    assert said == [pytest.approx([s, in_gib(row[-1])], abs=0.6) for s, row in zip(state, memory, strict=True)]
    assert "--set parallel.shard=8 --set stages.core.accumulate=64" in done.out and "MFU of 0.4" in done.out
    assert "and nothing is stored" in done.out and "The encoder takes 8.6 GiB of each GPU beside that" in done.out


def test_pairs_and_generators_on_a_machine() -> None:
    recipe = load_recipe("smoke-onestep")
    core, pairs, onestep, grown = stages = place(recipe, Cluster(4, "a100"))
    assert [str(p.layout) for p in stages] == ["replicate"] * 3 + ["replicate"]
    assert pairs.layout is not None and pairs.layout.gpus == 3  # of 24 pairs in shards of 8
    more = load_recipe(
        "smoke-onestep", ["stages.pairs.n=800", *(f"stages.{p.name}.batch=16" for p in stages if p.trains)]
    )
    many = next(p for p in place(more, Cluster(16, "a100")) if not p.trains)
    assert many.layout is not None and many.layout.gpus == 16  # of two machines
    assert onestep.layout is not None and (onestep.layout.accumulate, onestep.layout.micro_batch) == (4, 2)
    assert (pairs.trains, grown.trains, core.cores, pairs.cores, onestep.cores) == (False, True, core.cores, 0, 0)
    by_name = {disk.name: disk for disk in disks(recipe)}
    assert by_name["pairs"].kept == 2 * 3 * 16 * 16 * 24
    cost = network_cost(shallow_uvit("tiny", 16), TrainSettings(images=64, batch=16))
    assert by_name["core"].states == 3 * cost.memory.state and by_name["core"].kept == cost.memory.weights
    planned = {stage.name: stage.cost.memory for stage in plan_recipe(recipe, gpu=True)}
    for name in ("onestep", "onestep32"):  # with their discriminators
        assert by_name[name].states == 3 * planned[name].state


def test_settings_are_one_of_a_stage_and_say_that_nothing_is_sharded() -> None:
    def placed(name: str, accumulate: int, mode: Checkpointing) -> Placed:
        parts = Parts(*[0] * 8)
        return Placed(name, "", 32, 64, Layout(4, 1, accumulate, 8 // accumulate, mode, parts, 1.0), 1.0)

    stages = [placed("core", 2, False), placed("grown", 4, "selective"), placed("grown", 1, False)]
    assert settings_of(stages) == [
        "parallel.shard=1",
        "stages.core.accumulate=2",
        "stages.core.activation_checkpointing=false",
        "stages.grown.accumulate=4",
        "stages.grown.activation_checkpointing=selective",
    ]


def test_what_a_core_decodes() -> None:
    assert [decoded_per_second(s) for s in (32, 64, 256, 1024)] == pytest.approx([390, 390, 114, 12])
    assert decoded_per_second(128) == pytest.approx((390 * 114) ** 0.5) and decoded_per_second(2048) == 3


def test_mistakes_are_one_line(run_cli: RunCli) -> None:
    with pytest.raises(UserError, match="got a batch of 16 for 5 GPUs, expected a multiple of 5"):
        place(load_recipe("smoke"), Cluster(5, "h100"))
    for args, said in (
        (["smoke", "--gpus", "4"], "add --gpu h100"),
        (["smoke", "--gpu", "h100"], "add --gpus 8"),
        (["smoke", "--gpus", "4", "--gpu", "h1000"], "expected one of a100-40, a100"),
        (["--size", "tiny", "--gpus", "4", "--gpu", "h100"], "--gpus is for recipes"),
    ):
        done = run_cli("plan", *args)
        assert done.code == 2 and said in done.err
