"""The guidance weight as a condition: weights by row, pairs with weights, the estimator, guided generators, a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from diffusion.test_guidance import GaussianPair, labels
from pixelgrow import checkpoint, rng
from pixelgrow.diffusion.generator import Generator, with_guidance
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.diffusion.sampling import generate
from pixelgrow.errors import UserError
from pixelgrow.growth import grow_network, grown_config
from pixelgrow.model import Model
from pixelgrow.onestep.distill import DISCRIMINATOR, GENERATOR, DistillBatch, DistillObjective
from pixelgrow.onestep.estimator import (
    EstimateObjective,
    Estimator,
    Labels,
    batches_of,
    described,
    load_estimator,
    save_estimator,
)
from pixelgrow.onestep.features import TeacherFeatures
from pixelgrow.onestep.losses import guidance_weights, spread_of
from pixelgrow.onestep.pairs import Pairs, read_shard, shard_path
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.plan.shapes import networks
from pixelgrow.recipe.read import load_recipe, read_recipe
from pixelgrow.run import run
from pixelgrow.stages import distill, looks, train
from pixelgrow.training.saving import Saver
from pixelgrow.writing import write_json
from test_growth import cond, shallow

# --- a weight for each row --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [None, (0.1, 1.0)])
def test_a_weight_for_each_row_is_each_row_alone(interval: tuple[float, float] | None) -> None:
    net, x, weights = GaussianPair(), torch.randn(3, 3, 4, 2, dtype=torch.float64), [0.0, 1.0, 3.5]
    together = Guided(net, labels(3), guidance=torch.tensor(weights), interval=interval)
    for sigma in (0.05, 0.5):
        got = together(x, sigma)
        for i, weight in enumerate(weights):
            alone = Guided(net, labels(1), guidance=weight, interval=interval)(x[i : i + 1], sigma)
            torch.testing.assert_close(got[i : i + 1], alone)
    assert together.nfe == (4 if interval is None else 3)
    with pytest.raises(UserError, match=r"guidance=-1\.0: expected a finite weight"):
        Guided(net, labels(2), guidance=torch.tensor([2.0, -1.0]))


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [("captions", stats.uniform(2, 8)), ("recaptions", stats.truncnorm((1 - 2) / 3, (10 - 2) / 3, loc=2, scale=3))],
)
def test_the_spread_of_a_distribution(distribution: Any, expected: Any) -> None:
    spread = spread_of(distribution)
    assert (spread.mean, spread.std) == pytest.approx((expected.mean(), expected.std()), rel=1e-5)
    assert (spread.low, spread.high) == pytest.approx(expected.support())
    mixed, other = spread_of("mixed"), spread_of("recaptions" if distribution == "captions" else "captions")
    assert (mixed.low, mixed.high) == pytest.approx((1, 10)) and mixed.mean == pytest.approx(
        (spread.mean + other.mean) / 2
    )


# --- guided generators ------------------------------------------------------------------------------------------------


def guided() -> Generator:
    return Generator(with_guidance(shallow().net, seed=0))


def test_a_generator_that_is_told_the_weight_starts_as_the_one_that_is_not() -> None:
    z, c = torch.randn(3, 3, 16, 16), cond(3)
    plain, made = Generator(shallow().net), guided()
    assert made.guided and not plain.guided
    assert torch.equal(made(z, c, torch.tensor([1.0, 4.0, 10.0])), plain(z, c))
    torch.nn.init.normal_(made.net.guidance.out.weight)
    first, second = (generate(made, c, size=(16, 16), guidance=w).images for w in (2.0, 7.0))
    assert (first - second).abs().mean() > 0.01
    again = torch.cat([generate(made, c[i : i + 1], size=(16, 16), index=[i], guidance=7.0).images for i in range(3)])
    torch.testing.assert_close(again, second)


def test_a_guided_generator_grows_to_a_guided_one() -> None:
    low = guided()
    torch.nn.init.normal_(low.net.guidance.out.weight)
    net, report = grow_network(low.net, grown_config(low.net.config, 32, "random", generator=True), "random")
    assert net.config.guided and {n for n in net.state_dict() if n.startswith("guidance.")} <= set(report.loaded)
    z, c, omega = torch.randn(2, 3, 16, 16), cond(2), torch.tensor([2.0, 7.0])
    assert torch.equal(next(iter(Generator(net).rungs(z, c, omega))).image, low(z, c, omega))


# --- the estimator ----------------------------------------------------------------------------------------------------


def saturated(n: int) -> tuple[Tensor, Tensor]:
    """Images whose saturation rises with their weight, as guidance makes it, and the weights."""
    omega = guidance_weights(rng.uniform(0, "test", range(n)), "captions").float()
    noise = rng.normal((3, 16, 16), 0, "pictures", range(n))
    return (omega[:, None, None, None] / 12 * torch.tensor([1.0, -1.0, 0.5])[:, None, None] + 0.2 * noise), omega


def test_the_estimator_learns_the_weights_of_images(tmp_path: Path) -> None:
    features = TeacherFeatures(shallow())
    images, omega = saturated(160)
    seen = described(features, images, cond(160))
    alone = described(features, images[7:8], cond(160)[7:8])
    torch.testing.assert_close(alone, seen[7:8], rtol=1e-4, atol=1e-5)
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(described(features, large, cond(160)), seen)  # of real images at a grown resolution
    estimator = Estimator(seen.shape[1], "captions")
    estimator.standardise(seen[:128])
    objective = EstimateObjective(estimator)
    optimizer = torch.optim.Adam(estimator.parameters(), 1e-3)
    stream = batches_of(seen[:128], omega[:128], 32, 0, 0)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = objective.loss(next(stream)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(1, abs=0.35)  # a constant guess
    says = Labels(estimator, features)(images[128:], cond(160)[128:])
    rmse = float((says - omega[128:]).square().mean().sqrt())
    assert rmse < 0.5 * spread_of("captions").std
    brighter = Labels(estimator, features)(20 * images, cond(160))
    assert float(brighter.min()) >= 2 and float(brighter.max()) <= 10

    write_json(tmp_path / "estimator.json", save_estimator(tmp_path, estimator, "teacher", rmse))
    cpu = torch.device("cpu")
    loaded = load_estimator(tmp_path, "teacher", "captions", cpu)
    assert torch.equal(Labels(loaded, features)(images[128:], cond(160)[128:]), says)
    with pytest.raises(UserError, match="of the teacher teacher, the pairs are of other"):
        load_estimator(tmp_path, "other", "captions", cpu)
    with pytest.raises(UserError, match="was trained with guidance: captions, the pairs have recaptions"):
        load_estimator(tmp_path, "teacher", "recaptions", cpu)
    with pytest.raises(UserError, match="holds no finished estimator"):
        load_estimator(tmp_path / "nowhere", "teacher", "captions", cpu)
    whole = (tmp_path / "estimator.safetensors").read_bytes()
    (tmp_path / "estimator.safetensors").write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"estimator\.safetensors is cut off"):
        load_estimator(tmp_path, "teacher", "captions", cpu)


def test_the_estimators_stream_begins_anywhere() -> None:
    of, omega = torch.arange(10.0)[:, None], torch.arange(10.0)
    whole = batches_of(of, omega, 4, 3, 0)
    next(whole)
    for late, want in zip(batches_of(of, omega, 4, 3, 4), [next(whole) for _ in range(4)], strict=False):
        assert torch.equal(late.guidance, want.guidance) and torch.equal(late.index, want.index)
        assert torch.equal(late.description[:, 0], late.guidance)


# --- the objective ----------------------------------------------------------------------------------------------------


class Conditions:
    def cond(self, texts: Any) -> Any:
        return cond(len(texts))


def batch(n: int) -> DistillBatch:
    g = torch.Generator().manual_seed(1)
    image = torch.rand(2, n, 3, 16, 16, generator=g) * 2 - 1
    z, omega = torch.randn(n, 3, 16, 16, generator=g), torch.linspace(2, 10, n)
    return DistillBatch(image[0], ("a",) * n, torch.arange(n) + 5, z, image[1], ("b",) * n, omega)


class Heard:
    """Keeps the guidance weights that a module receives."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.weights: list[Tensor] = []
        module.register_forward_pre_hook(lambda _, args: self.weights.append(args[-1]))


def objective(adversarial: bool = True) -> DistillObjective:
    losses, features = LossSettings(adversarial=adversarial), TeacherFeatures(shallow())
    width = described(features, torch.zeros(1, 3, 16, 16), cond(1)).shape[1]
    says = Labels(Estimator(width, "captions"), features) if adversarial else None
    return DistillObjective(guided(), features, Conditions(), losses, 7, distribution="captions", labels=says)


def test_pairs_have_their_own_weights_and_prior_samples_those_of_the_distribution() -> None:
    made, some = objective(), batch(4)
    by_generator, by_discriminator = Heard(made.generator), Heard(made.discriminator)
    made.loss(some, GENERATOR).loss.backward()
    (received,), (rated,) = by_generator.weights, by_discriminator.weights
    want = guidance_weights(rng.uniform(7, "guidance generator", some.index), "captions").float()
    assert torch.equal(received, torch.cat([some.guidance, want])) and torch.equal(rated, want)  # type: ignore[list-item]
    gradient = made.generator.net.guidance.out.weight.grad
    assert gradient is not None and gradient.abs().max() > 0

    made.loss(some, DISCRIMINATOR)
    prior = guidance_weights(rng.uniform(7, "guidance discriminator", some.index), "captions").float()
    assert torch.equal(by_generator.weights[-1], prior)
    real = torch.full((4,), spread_of("captions").mean)  # an estimator that has learnt nothing
    torch.testing.assert_close(by_discriminator.weights[-1], torch.cat([real, prior]))


def test_prior_samples_of_mixed_captions_have_the_distribution_of_theirs() -> None:
    some = dataclasses.replace(batch(4), caption=torch.tensor([0, 1, 0, 2]))
    made = DistillObjective(guided(), TeacherFeatures(shallow()), Conditions(), LossSettings(), 7, distribution="mixed")
    heard = Heard(made.discriminator)
    made.loss(some, GENERATOR)
    u = rng.uniform(7, "guidance generator", some.index)
    came, anew = (guidance_weights(u, distribution).float() for distribution in ("captions", "recaptions"))
    assert torch.equal(heard.weights[0], torch.stack([came[0], anew[1], came[2], anew[3]]))


def test_the_discriminator_goes_by_the_weight() -> None:
    discriminator = objective().discriminator
    tokens, vec = [torch.randn(2, 5, 32) for _ in discriminator.heads], torch.randn(2, 32)
    low, high = (discriminator(tokens, vec, torch.full((2,), w)) for w in (2.0, 10.0))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(low, high, strict=True))


def test_without_a_discriminator_the_pairs_weights_are_all_there_is() -> None:
    made, some = objective(adversarial=False), batch(3)
    heard = Heard(made.generator)
    assert set(made.loss(some, GENERATOR).logs) == {"rec"}
    assert torch.equal(heard.weights[0], some.guidance)  # type: ignore[arg-type]


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the guided recipe; validated on few images."""
    root = tmp_path_factory.mktemp("runs")
    smoke(root)
    return root / "smoke-guided"


def smoke(root: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, distill):
            patch.setattr(module, "WATCHED", 8)
        patch.setattr(looks, "GRID_STEPS", 2)
        run(load_recipe("smoke-guided"), root)


def test_every_pair_has_a_weight_of_its_own_by_its_number(made: Path) -> None:
    seed = rng.seed_of(0, "stage", "pairs")
    pairs = Pairs(made / "pairs")
    assert pairs.distribution == "captions" and pairs.facts["solver"]["guidance"] == "captions"
    want = guidance_weights(rng.uniform(seed, "guidance", range(16)), "captions").float()
    assert torch.equal(pairs.guidance, want)  # type: ignore[arg-type]
    assert not torch.equal(Pairs(made / "drawn").guidance[:16], want)  # type: ignore[index]
    shard = read_shard(shard_path(made / "drawn", 2))
    assert shard is not None and shard["guidance"].shape == (4,) and shard["image"].shape == (4, 3, 16, 16)


def test_the_estimator_tells_its_error(made: Path) -> None:
    facts = json.loads((made / "omega" / "estimator.json").read_text())
    assert facts["teacher"] == checkpoint.read_config(made / "core" / "checkpoint").sha256
    assert facts["guidance_deviation"] == pytest.approx(8 / 12**0.5, rel=1e-5)
    result = json.loads((made / "omega" / "stage.json").read_text())["result"]
    assert 0 < result["heldout_rmse"] == facts["heldout_rmse"] < 3 * facts["guidance_deviation"]
    log = [json.loads(line) for line in (made / "omega" / "log.jsonl").read_text().splitlines()]
    assert {"validation/rmse", "validation/share"} <= {k for line in log for k in line}
    assert "estimate guidance weights from drawn" in (made / "report.html").read_text()


def test_an_estimator_may_have_no_average(made: Path, tmp_path: Path) -> None:
    for stage in ("core", "pairs", "drawn", "text"):
        shutil.copytree(made / stage, tmp_path / "smoke-guided" / stage)
    few = load_recipe("smoke-guided", ["stages.omega.ema=[]", "stages.omega.images=8", "stages.omega.save_every=8"])
    run(few.model_copy(update={"stages": few.stages[:4]}), tmp_path)
    assert (tmp_path / "smoke-guided" / "omega" / "estimator.json").is_file()


def test_a_guided_checkpoint_is_drawn_with_its_own_weight_or_another(made: Path) -> None:
    config = checkpoint.read_config(made / "onestep32" / "checkpoint")
    assert config.network.guided and config.sampling == {"guidance": 2.0}
    assert config.lineage[1]["guidance"] == "captions"
    model = Model.from_pretrained(made / "onestep32")
    assert model.settings() == {"guidance": 2.0} and model.settings(guidance=5) == {"guidance": 5.0}
    torch.nn.init.normal_(model.denoiser.net.guidance.out.weight)
    own, same, other = (model.sample("a red circle", guidance=w)[0].tobytes() for w in (None, 2.0, 9.0))
    assert own == same != other
    with pytest.raises(UserError, match="guidance=0: expected a weight above 0"):
        model.sample("a red circle", guidance=0)
    with pytest.raises(UserError, match="steps: a one-step generator samples in one network evaluation"):
        model.sample("a red circle", steps=4, guidance=2)
    metrics = json.loads((made / "eval" / "metrics.json").read_text())
    assert metrics["sampling"] == {"guidance": 4.0} and metrics["nfe"] == 1


def test_a_grown_generator_is_told_what_its_base_was(made: Path) -> None:
    low, high = (load_file(made / n / "checkpoint" / "model.safetensors") for n in ("onestep", "onestep32"))
    assert all(torch.equal(high[n], t) for n, t in low.items())
    assert low["guidance.out.weight"].abs().max() > 0


def test_a_run_that_was_stopped_in_each_stage_ends_with_the_same_bytes(made: Path, tmp_path: Path) -> None:
    cut = tmp_path / "smoke-guided"
    shutil.copytree(made, cut)
    for stage in ("omega", "onestep", "onestep32", "eval"):
        shutil.rmtree(cut / stage)
    shard_path(cut / "pairs", 1).unlink()
    record = json.loads((cut / "pairs" / "stage.json").read_text())
    (cut / "pairs" / "stage.json").write_text(json.dumps(record | {"done": False}))
    real = Saver.start
    for stage in ("omega", "onestep"):

        def start(self: Saver, *state: Any, stage: str = stage) -> None:
            real(self, *state)
            if self.folder.parent.name == stage:
                self.finish()
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Saver, "start", start)
            smoke(tmp_path)
    smoke(tmp_path)
    for name in (
        "pairs/00001.safetensors",
        "pairs/pairs.json",
        "omega/estimator.safetensors",
        "omega/estimator.json",
        "onestep/checkpoint/model.safetensors",
        "onestep32/checkpoint/model.safetensors",
    ):
        assert (cut / name).read_bytes() == (made / name).read_bytes(), name


# --- mistakes ---------------------------------------------------------------------------------------------------------

WEIGHED = {"pairs": {"name": "pairs", "n": 8, "guidance": "captions"}}
DRAWN = {"pairs": {"name": "drawn", "n": 8, "guidance": "captions", "direction": "sample"}}
OMEGA = {"estimate": {"name": "omega", "pairs": "drawn", "images": 8}}
ONESTEP = {"name": "onestep", "pairs": "pairs", "images": 8}


def recipe(*stages: dict[str, Any]) -> Any:
    first = {"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 16}}
    return read_recipe({"name": "x", "data": {"source": "scenes"}, "stages": [first, *stages]}, "x.yaml")


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"pairs": {"name": "pairs", "n": 8, "guidance": "caption"}}], "got 'caption', expected a weight >= 0 (1: "),
        ([{"pairs": {"name": "pairs", "n": 8, "guidance": -1}}], "got -1, expected a weight >= 0"),
        ([WEIGHED, {"estimate": {"name": "omega", "pairs": "pairs", "images": 8}}], "expected images sampled with wei"),
        ([DRAWN, {"estimate": {"name": "o", "pairs": "drawn", "images": 8, "flip": True}}], "flip: an estimator"),
        ([WEIGHED, {"distill": ONESTEP}], "pairs: pairs has guidance: captions, so the discriminator needs a weight"),
        ([WEIGHED, DRAWN, OMEGA, {"distill": ONESTEP | {"estimator": "omgea"}}], "unknown estimate stage 'omgea'"),
        (
            [WEIGHED, DRAWN, OMEGA, {"distill": ONESTEP | {"estimator": "omega", "losses": {"adversarial": False}}}],
            "but there is no discriminator; drop it",
        ),
        (
            [{"pairs": {"name": "pairs", "n": 8}}, DRAWN, OMEGA, {"distill": ONESTEP | {"estimator": "omega"}}],
            "but the pairs have guidance: 1.0, no distribution; drop it",
        ),
        ([WEIGHED, DRAWN, OMEGA, {"evaluate": {"name": "e", "from": "omega"}}], "unknown stage 'omega'"),
        ([{"grow": {"name": "g", "to": 32, "images": 8, "estimator": "omega"}}], "estimator is for the growth of a"),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe_are_one_line(stages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UserError) as error:
        recipe(*stages)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_mixed_captions_need_samples_of_several_before_anything_trains(tmp_path: Path) -> None:
    several = load_recipe("smoke-guided", ["stages.pairs.guidance=mixed", "stages.drawn.guidance=mixed"])
    with pytest.raises(
        UserError, match="stage 'pairs': guidance: mixed has a distribution for captions and one for recaptions"
    ):
        run(several, tmp_path)
    assert not (tmp_path / "smoke-guided" / "core").exists()


def test_a_guided_generator_is_grown_with_pairs_of_a_distribution_alone() -> None:
    plain = {"pairs": {"name": "plain", "n": 8}}
    onestep = {"distill": ONESTEP | {"estimator": "omega"}}
    grown = {"grow": {"name": "g", "pairs": "plain", "to": 32, "images": 8}}
    assert networks(recipe(WEIGHED, DRAWN, OMEGA, onestep))["onestep"].guided
    with pytest.raises(UserError, match="onestep is conditioned on the guidance weight, but the guidance of the pairs"):
        networks(recipe(WEIGHED, DRAWN, OMEGA, plain, onestep, grown))
