"""One step: the generator, its growth, pairs, distillation, and a whole run of them."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.test_generator import generator, grown
from pixelgrow import checkpoint
from pixelgrow.cli.average import average_checkpoint
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.errors import UserError
from pixelgrow.growth import freeze, grow_network, grown_config, kept_in
from pixelgrow.model import Model, OneStepModel
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.onestep.distill import DISCRIMINATOR, GENERATOR, DistillBatch, DistillObjective
from pixelgrow.onestep.features import TeacherFeatures, cropped
from pixelgrow.onestep.losses import DRAWS, diff_augment
from pixelgrow.onestep.pairs import Ode, Pairs, psnr, read_shard, reduced, shard_path, spread, write_shard
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.onestep.watch import energy_distance
from pixelgrow.plan.shapes import networks
from pixelgrow.recipe.read import Recipe, load_recipe, read_recipe
from pixelgrow.run import run
from pixelgrow.stages import distill, looks, train
from pixelgrow.stages import pairs as pairs_stage
from pixelgrow.stages.materials import Materials
from pixelgrow.training.state import write_tensors
from test_growth import cond, shallow

DISTILL = {"name": "onestep", "from": "core", "pairs": "pairs", "images": 8}
GROW = {"name": "grown", "to": 32, "images": 8}
FEW = {"n": 8, "batch": 8, "shard": 8, "steps": 2}


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_inverted_latents_of_gaussian_data_are_white_and_lead_back() -> None:
    """N(0, 0.5^2): the ideal denoiser is s^2 / (s^2 + sigma^2) x, and latents are x / 0.5 up to sigma_min."""

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return 0.25 / (0.25 + sigma**2) * x

    ode = Ode("heun", 40, 0.002, 80.0)
    x = 0.5 * torch.randn(64, 3, 8, 8, dtype=torch.float64)
    z = ode.to_latent(denoise, x)
    want = x / 80 * ((0.25 + 80**2) / (0.25 + 0.002**2)) ** 0.5
    torch.testing.assert_close(z, want, rtol=1e-2, atol=0)
    assert psnr(ode.to_image(denoise, z), x) > 50
    assert min(ode.round_trip(denoise, x).values()) > 50
    bands = spread(z)
    assert list(bands) == ["1 px", "2 px", "4 px", "8 px and above"]
    assert all(band["std"] == pytest.approx(1, abs=0.06) for band in bands.values())
    assert bands["1 px"]["kurtosis"] == pytest.approx(3, abs=0.1)


def test_a_thin_shell_shows_in_the_band_that_it_is_in() -> None:
    noise = torch.randn(256, 3, 8, 8)
    smooth = up_nearest(box_down(noise, 4), 4)
    bands = spread(noise - 0.5 * smooth)
    assert bands["1 px"]["std"] == pytest.approx(1, abs=0.03)
    assert bands["4 px"]["std"] == pytest.approx(0.5, abs=0.03)


def test_a_shard_that_is_cut_off_or_changed_is_none(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0)
    assert read_shard(path) is None
    tensors = {"latent": torch.randn(4, 3, 8, 8).half(), "origin": torch.zeros(4, 3, dtype=torch.int64)}
    write_shard(path, tensors)
    found = read_shard(path)
    assert found is not None and all(torch.equal(found[k], t) for k, t in tensors.items())
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert read_shard(path) is None
    path.write_bytes(whole[:-7] + b"\x01" * 7)
    assert read_shard(path) is None


def test_energy_distance_tells_a_shift_from_none() -> None:
    a, b = torch.randn(200, 4), torch.randn(200, 4)
    assert abs(energy_distance(a, b)) < 0.05
    assert energy_distance(a, b + 1) > 0.5


def test_energy_distance_is_no_smaller_for_rows_that_share_their_caption() -> None:
    shared = 5 * torch.randn(16, 4)  # what a caption does to both of its images
    found = [energy_distance(shared + torch.randn(16, 4), shared + torch.randn(16, 4)) for _ in range(200)]
    assert abs(sum(found) / len(found)) < 0.05


# --- the objective ----------------------------------------------------------------------------------------------------


class Conditions:
    def cond(self, texts: Any) -> Any:
        return cond(len(texts))


def batch(n: int, side: int, latent: int = 16) -> DistillBatch:
    g = torch.Generator().manual_seed(1)
    image = torch.rand(2, n, 3, side, side, generator=g) * 2 - 1
    z = torch.randn(n, 3, latent, latent, generator=g)
    return DistillBatch(image[0], ("a",) * n, torch.arange(n), z, image[1], ("b",) * n)


def test_real_images_are_rejected_with_the_caption_of_another_alone() -> None:
    def loss(mismatched: bool, texts: tuple[str, ...]) -> float:
        losses = LossSettings(augment=(), mismatched=mismatched)
        objective = DistillObjective(generator(), TeacherFeatures(shallow()), Conditions(), losses, seed=0)
        terms = objective.loss(dataclasses.replace(batch(4, 16), text=texts), "discriminator")
        return float(terms.loss.detach())

    same, other = ("a", "a", "a", "a"), ("a", "b", "a", "b")
    assert loss(True, same) == loss(False, same) == loss(False, other)
    assert loss(True, other) != loss(False, other)


def test_the_teachers_features_have_a_second_view_of_a_large_image() -> None:
    seen = TeacherFeatures(shallow())
    crop = torch.tensor([[0.0, 0.0], [1.0, 0.5]])  # 1 is what rounding to float32 may make of a number below it
    small = seen(torch.rand(2, 3, 16, 16), cond(2), crop)
    assert [t.shape for t in small.tokens] == [(2, 16, 32)] * len(seen.widths(16))
    assert len(seen(torch.rand(2, 3, 64, 64), cond(2), crop).tokens) == len(seen.widths(64)) == 2 * len(seen.widths(16))
    images = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    parts = cropped(images, 4, crop)
    assert torch.equal(parts[0], images[0, :, :4, :4]) and torch.equal(parts[1], images[1, :, 4:, 2:6])
    assert not any(p.requires_grad for p in seen.teacher.parameters())


def test_where_the_discriminator_looks_is_no_draw_of_the_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    features = TeacherFeatures(shallow())
    made = DistillObjective(generator(), features, Conditions(), LossSettings(features=0), seed=0)
    crops: list[torch.Tensor] = []
    augmented: list[torch.Tensor] = []

    def look(images: torch.Tensor, c: Any, crop: torch.Tensor) -> Any:
        crops.append(crop)
        return features(images, c, crop)

    def augment(x: torch.Tensor, draws: torch.Tensor, policy: Any) -> torch.Tensor:
        augmented.append(draws)
        return diff_augment(x, draws, policy)

    monkeypatch.setattr(made, "features", look)
    monkeypatch.setattr("pixelgrow.onestep.distill.diff_augment", augment)
    for part in (GENERATOR, DISCRIMINATOR):
        made.loss(batch(3, 16), part)
    assert [len(c) for c in crops] == [len(a) for a in augmented] and all(a.shape[1] == DRAWS for a in augmented)
    for crop, draws in zip(crops, augmented, strict=True):
        assert crop.shape[1] == 2 and not torch.isin(crop, draws).any()


@pytest.mark.parametrize("adversarial", [True, False])
def test_a_generator_learns_its_pairs_and_the_teacher_stays(adversarial: bool) -> None:
    teacher, made = shallow(), generator()
    kept = {n: t.clone() for n, t in teacher.net.state_dict().items()}
    objective = DistillObjective(
        made, TeacherFeatures(teacher), Conditions(), LossSettings(adversarial=adversarial), seed=0
    )
    assert list(objective.modules) == ([GENERATOR, DISCRIMINATOR] if adversarial else [GENERATOR])
    some = batch(4, 16)
    optimizers = {part: torch.optim.Adam(m.parameters(), 1e-3) for part, m in objective.modules.items()}
    rec = []
    for _ in range(12):
        for part, optimizer in optimizers.items():
            optimizer.zero_grad()
            terms = objective.loss(some, part)
            terms.loss.backward()
            optimizer.step()
            if part == GENERATOR:
                rec.append(float(terms.logs["rec"]))
                assert not adversarial or 0.01 <= float(terms.logs["adv_weight"]) <= 10
    assert rec[-1] < 0.7 * rec[0]
    assert all(torch.equal(t, kept[n]) for n, t in teacher.net.state_dict().items())


def test_the_discriminators_step_leaves_the_generator_alone_and_tells_real_from_generated() -> None:
    made = generator()
    objective = DistillObjective(made, TeacherFeatures(shallow()), Conditions(), LossSettings(augment=()), seed=0)
    some = batch(8, 16)
    optimizer = torch.optim.Adam(objective.modules[DISCRIMINATOR].parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        terms = objective.loss(some, DISCRIMINATOR)
        terms.loss.backward()
        optimizer.step()
    assert all(p.grad is None for p in made.parameters())
    assert float(terms.logs["real"]) > float(terms.logs["fake"]) + 0.3


def test_frozen_tensors_of_a_grown_generator_stay_to_the_bit() -> None:
    low = generator()
    high, loaded = grown(low, 32, "preserve")
    freeze(high.net, loaded)
    losses = LossSettings(balance="fixed", scale=1.0)
    objective = DistillObjective(high, TeacherFeatures(shallow()), Conditions(), losses, seed=0)
    trained = [p for p in high.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3)
    for _ in range(2):
        objective.loss(batch(2, 32), GENERATOR).loss.backward()
        optimizer.step()
    old, new = low.net.state_dict(), high.net.state_dict()
    assert all(torch.equal(new[n], t) for n, t in old.items())
    assert new["exit.32.conv.weight"].abs().max() > 0


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: a core, its pairs, a one-step generator, grown; validated on few images."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, distill):
            patch.setattr(module, "WATCHED", 8)
        patch.setattr(looks, "GRID_STEPS", 2)
        run(load_recipe("smoke-onestep"), root)
    return root / "smoke-onestep"


def test_every_stage_of_the_one_step_way_leaves_its_result(made: Path) -> None:
    facts = json.loads((made / "pairs" / "pairs.json").read_text())
    assert (facts["pairs"], facts["shards"], facts["direction"]) == (24, 3, "invert")
    assert facts["teacher"] == checkpoint.read_config(made / "core" / "checkpoint").sha256
    log = [json.loads(line) for line in (made / "onestep32" / "log.jsonl").read_text().splitlines()]
    last = [line for line in log if "validation/drift_psnr" in line][-1]
    assert last["validation/drift_psnr"] > 20 and "generator/adv_weight" in {k for line in log for k in line}
    metrics = json.loads((made / "eval" / "metrics.json").read_text())
    assert metrics["nfe"] == 1 and "accuracy" in metrics and "error" not in metrics
    page = (made / "report.html").read_text()
    assert "distil core to one step on pairs" in page and "drift from the base" in page
    beside = page.partition("Side by side")[2].partition("</section>")[0]
    rows = [row.partition("</td>")[0].removesuffix("</a>").rpartition(">")[2] for row in beside.split("<tr><td>")[1:]]
    assert rows == ["core", "onestep32"] and beside.count("<figure>") == 2


def test_a_grown_generators_base_is_the_one_that_was_distilled(made: Path) -> None:
    low, high = (checkpoint.load_generator(made / n / "checkpoint")[0] for n in ("onestep", "onestep32"))
    old, new = low.net.state_dict(), high.net.state_dict()
    assert all(torch.equal(new[n], t) for n, t in old.items())
    lineage = checkpoint.read_config(made / "onestep32" / "checkpoint").lineage
    assert [e["verb"] for e in lineage] == ["train", "distill", "grow"]


def test_a_one_step_model_draws_and_takes_no_setting(made: Path) -> None:
    model = Model.from_pretrained(made / "onestep32")
    assert isinstance(model, OneStepModel)
    first = model.sample(["a red circle", "a blue star"], seed=3)
    assert [p.size for p in first] == [(32, 32)] * 2
    assert model.sample("a blue star", seed=3, index=[1])[0].tobytes() == first[1].tobytes()
    with pytest.raises(UserError, match="steps: a one-step generator samples in one network evaluation"):
        model.sample("a blue star", steps=4)


def test_an_average_of_a_generators_stage_becomes_a_generator(made: Path, tmp_path: Path) -> None:
    stage = tmp_path / "onestep"
    shutil.copytree(made / "onestep" / "checkpoint", stage / "checkpoint")
    model, config = checkpoint.load_generator(stage / "checkpoint")
    kept = {f"{length}/{n}": (2 * t).half() for length in (0.05, 0.1) for n, t in model.named_parameters()}
    for images in (8, 16):  # weights that stood still: every average of theirs is themselves
        write_tensors(stage / "snapshots" / "generator" / f"{images:012d}.safetensors", kept)
    average_checkpoint(stage, 0.08, tmp_path / "out")
    found, written = checkpoint.load_generator(tmp_path / "out")
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), 2 * tensor, rtol=1e-2, atol=1e-3)
    assert written.lineage[-1] == {"verb": "average", "length": 0.08, "parent": config.sha256}


def test_a_generator_is_no_guide(made: Path) -> None:
    core, one_step = (Model.from_pretrained(made / name) for name in ("core", "onestep"))
    with pytest.raises(UserError, match="the guide is a one-step generator, expected a multi-step model"):
        core.sample("a red circle", guide=one_step)


def test_a_multi_step_checkpoint_is_no_generator_and_the_other_way_round(made: Path) -> None:
    with pytest.raises(UserError, match="is a multi-step denoiser, expected a one-step generator"):
        checkpoint.load_generator(made / "core" / "checkpoint")
    with pytest.raises(UserError, match="is a one-step generator, expected a multi-step denoiser"):
        checkpoint.load(made / "onestep" / "checkpoint")


def test_pairs_of_another_teacher_or_other_data_are_refused(made: Path) -> None:
    pairs = Pairs(made / "pairs")
    teacher, data = pairs.facts["teacher"], pairs.facts["data"]
    pairs.check([teacher], data)
    with pytest.raises(UserError, match="this model comes from abc"):
        pairs.check(["abc"], data)
    with pytest.raises(UserError, match="made of other data"):
        pairs.check([teacher], [data[0] | {"fingerprint": "other"}])
    with pytest.raises(UserError, match="holds no finished pairs"):
        Pairs(made / "core")


def test_pairs_that_were_cut_off_and_damaged_end_with_the_same_bytes(made: Path, tmp_path: Path) -> None:
    cut = tmp_path / "smoke-onestep"
    shutil.copytree(made, cut)
    for stage in ("onestep", "onestep32", "eval-core", "eval"):
        shutil.rmtree(cut / stage)
    record = json.loads((cut / "pairs" / "stage.json").read_text())
    (cut / "pairs" / "stage.json").write_text(json.dumps(record | {"done": False}))
    (cut / "pairs" / "pairs.json").unlink()
    shard_path(cut / "pairs", 2).unlink()
    damaged = shard_path(cut / "pairs", 1)
    damaged.write_bytes(damaged.read_bytes()[: random.Random(0).randrange(100, 2000)])
    kept = shard_path(cut / "pairs", 0).stat().st_mtime_ns
    recipe = load_recipe("smoke-onestep")
    run(recipe.model_copy(update={"stages": recipe.stages[:2]}), tmp_path)
    assert shard_path(cut / "pairs", 0).stat().st_mtime_ns == kept
    for name in ("00000.safetensors", "00001.safetensors", "00002.safetensors", "pairs.json"):
        assert (cut / "pairs" / name).read_bytes() == (made / "pairs" / name).read_bytes()


def again(made: Path, root: Path, workers: int, n: int = 24) -> None:
    """The pairs of a run made anew beside its core."""
    shutil.copytree(made / "core", root / "smoke-onestep" / "core")
    recipe = load_recipe("smoke-onestep", [f"stages.pairs.workers={workers}", f"stages.pairs.n={n}"])
    run(recipe.model_copy(update={"stages": recipe.stages[:2]}), root)


def test_workers_share_the_shards_and_make_the_same_bytes(made: Path, tmp_path: Path) -> None:
    makers, real = set(), pairs_stage.write_shard

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        makers.add(threading.get_ident())
        barrier.wait(60)  # the three are at work together
        real(path, tensors)

    barrier = threading.Barrier(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_stage, "write_shard", write)
        again(made, tmp_path, workers=3)
    assert len(makers) == 3
    for name in ("00000.safetensors", "00001.safetensors", "00002.safetensors", "pairs.json"):
        assert (tmp_path / "smoke-onestep" / "pairs" / name).read_bytes() == (made / "pairs" / name).read_bytes()


@pytest.mark.parametrize("fails", ["a worker", "the run"])
def test_what_stops_a_worker_or_the_run_stops_all(
    fails: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, wait = pairs_stage.write_shard, pairs_stage.as_completed

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if fails == "a worker" and path.stem == "00000":
            raise UserError("the disk is full")
        time.sleep(0.3)  # the other is not yet done when this one fails
        real(path, tensors)

    def interrupted(futures: Any) -> Any:
        if fails == "the run":
            time.sleep(0.1)
            raise KeyboardInterrupt
        return wait(futures)

    monkeypatch.setattr(pairs_stage, "write_shard", write)
    monkeypatch.setattr(pairs_stage, "as_completed", interrupted)
    with pytest.raises(UserError if fails == "a worker" else KeyboardInterrupt):
        again(made, tmp_path, workers=2, n=64)
    folder = tmp_path / "smoke-onestep" / "pairs"
    assert not (folder / "pairs.json").exists() and len(list(folder.glob("*.safetensors"))) <= 2
    monkeypatch.undo()
    recipe = load_recipe("smoke-onestep", ["stages.pairs.workers=1", "stages.pairs.n=64"])
    run(recipe.model_copy(update={"stages": recipe.stages[:2]}), tmp_path)
    for name in ("00000.safetensors", "00002.safetensors"):  # of whole shards in both
        assert (folder / name).read_bytes() == (made / "pairs" / name).read_bytes()


# --- a grown model's pairs for the growth of a generator --------------------------------------------------------------


def test_a_grown_model_draws_what_its_core_draws_from_the_averaged_latent() -> None:
    low = shallow(dtype=torch.float64)
    net, _ = grow_network(low.net, grown_config(low.net.config, 32, "preserve"), "preserve")
    high = Denoiser(net, low.config).double().eval()
    z, c = torch.randn(2, 3, 32, 32, dtype=torch.float64), cond(2, torch.float64)
    with torch.no_grad():
        images = [
            Ode("dpm++2m", 4, d.sigma_min, d.sigma_max).to_image(Guided(d, c, guidance=3.0), noise)
            for d, noise in ((low, reduced(z, 16)), (high, z))
        ]
    torch.testing.assert_close(box_down(images[1], 2), images[0], rtol=1e-9, atol=1e-9)
    assert 0.9 < float(reduced(torch.randn(8, 3, 64, 64), 16).std()) < 1.1
    assert torch.equal(reduced(z, 32), z)


@pytest.mark.parametrize("upscales", [None, "onestep"])
def test_a_generator_grows_with_what_a_model_grown_from_its_teacher_draws(
    upscales: str | None, made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "smoke-onestep"
    for stage in ("core", "pairs", "onestep", "text"):
        shutil.copytree(made / stage, folder / stage)
    quiet = {"validate_every": 0, "sample_every": 0, "snapshot_every": 0, "batch": 8}
    stages = [
        {"grow": {"name": "wide", "from": "core", "to": 32, "images": 8} | quiet},
        {"pairs": {"name": "drawn", "from": "wide", "direction": "sample", "upscales": upscales} | FEW},
        {"grow": {"name": "g", "from": "onestep", "pairs": "drawn", "to": 32, "images": 8} | quiet},
    ]
    smoke = load_recipe("smoke-onestep").model_dump(mode="json", by_alias=True, exclude_unset=True)
    first = [{verb: stage} for verb, stage in zip(("train", "pairs", "distill"), smoke["stages"], strict=False)]
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, distill):
            patch.setattr(module, "WATCHED", 8)
        run(read_recipe(smoke | {"stages": [*first, *stages]}, "x.yaml"), tmp_path)
    core, wide, below = (checkpoint.read_config(folder / n / "checkpoint") for n in ("core", "wide", "onestep"))
    assert Pairs(folder / "drawn").facts.get("upscales") == (upscales and below.sha256)
    parents = {"wide": wide.sha256} | ({"onestep": below.sha256} if upscales else {})
    assert json.loads((folder / "drawn" / "stage.json").read_text())["parents"] == parents
    assert Pairs(folder / "drawn").facts["keeps"] == [core.sha256] == kept_in(wide.lineage)
    assert Pairs(folder / "drawn").latents.shape[-1] == 32
    config = checkpoint.read_config(folder / "g" / "checkpoint")
    assert config.network.latent_resolution == 16 and config.network.resolution == 32
    trained = {**wide.lineage[-1], "tensors": {"loaded": 5, "frozen": 3}}
    assert kept_in([trained]) == [] == kept_in([*wide.lineage, {"verb": "train", "parent": "x"}])


def test_pairs_upscale_a_smaller_generator_by_exact_rungs_for_that_generator(made: Path, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"name": "wide", "from": "core", "to": 64, "images": 8}
    pairs: dict[str, Any] = {"name": "large", "from": "wide", "direction": "sample", "upscales": "onestep", "n": 8}
    before = {"distill": DISTILL}
    read([{"grow": wide}, before, {"pairs": pairs}])
    for change, words in (
        ({"upscales": "onestp"}, "upscales: unknown one-step generator 'onestp'; did you mean 'onestep'?"),
        ({"upscales": "core"}, "upscales: unknown one-step generator 'core'"),
        ({"direction": "invert"}, "upscales: got 'onestep' with direction: invert; write direction: sample"),
    ):
        mistake([{"grow": wide}, before, {"pairs": pairs | change}], words)
    mistake([{"grow": wide}, {"pairs": pairs}], "upscales: no stage makes one")
    half = {"grow": wide | {"name": "half", "to": 32, "exact": False}}
    for larger, words in (
        ([{"grow": wide | {"exact": False}}], "expected exact rungs from there to the 64 px of wide, which has none"),
        ([half, {"grow": wide | {"from": "half"}}], "64 px of wide, which adds exact rungs to images of 32 px; name"),
    ):
        with pytest.raises(UserError, match=words) as error:
            networks(read([*larger, before, {"pairs": pairs}]))
        assert "\n" not in str(error.value)
    # Another generator than the one that the pairs upscale.
    for stage in ("pairs", "text"):
        shutil.copytree(made / stage, tmp_path / "smoke-onestep" / stage)
    facts = json.loads((made / "pairs" / "pairs.json").read_text()) | {"upscales": "f" * 64}
    (tmp_path / "smoke-onestep" / "pairs" / "pairs.json").write_text(json.dumps(facts))
    shutil.copytree(made / "core", tmp_path / "smoke-onestep" / "core")
    shutil.copytree(made / "onestep", tmp_path / "smoke-onestep" / "onestep")
    record = tmp_path / "smoke-onestep" / "onestep" / "stage.json"
    known = json.loads(record.read_text())
    known["parents"]["pairs"] = checkpoint.file_hash(tmp_path / "smoke-onestep" / "pairs" / "pairs.json")
    record.write_text(json.dumps(known))
    with pytest.raises(UserError, match="are upscaled images of the generator ffffffffffff, which this stage does not"):
        run(load_recipe("smoke-onestep"), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pairs": "paris"}, "unknown stage of pairs 'paris'; did you mean 'pairs'?"),
        ({"noise": {"mean": 0}}, "noise is for the training of a denoiser"),
        ({"losses": {"norms": "cubed"}}, "expected to be 'squared' or 'plain'"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(change: dict[str, Any], words: str) -> None:
    mistake([{"distill": DISTILL | change}], words)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"grow": GROW}, "onestep is a one-step generator: add pairs:"),
        ({"grow": GROW | {"from": "core", "pairs": "pairs"}}, "core is a multi-step model, which grows without"),
        ({"grow": GROW | {"from": "core", "fraction": 0.5}}, "fraction is for the growth of a one-step generator"),
        ({"grow": GROW | {"pairs": "pairs", "multiscale": True}}, "multiscale is for the training of a denoiser"),
        ({"pairs": {"name": "more", "n": 8}}, "from: onestep is a one-step generator, expected a multi-step model"),
        ({"train": {"name": "more", "from": "onestep", "images": 8}}, "is a one-step generator"),
    ],
)
def test_generators_and_denoisers_are_not_taken_for_each_other(stage: dict[str, Any], words: str) -> None:
    mistake([{"distill": DISTILL}, stage], words)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (
            {"distill": DISTILL | {"name": "d", "from": "more"}},
            "pairs: pairs is of core, but the teacher is more: name pairs of more",
        ),
        ({"grow": GROW | {"from": "onestep", "pairs": "others"}}, "others is of more, but the teacher is core"),
        ({"estimate": {"name": "e", "from": "more", "pairs": "drawn", "images": 8}}, "drawn is of core, but the teac"),
    ],
)
def test_pairs_of_another_teacher_are_refused_when_a_recipe_is_read(stage: dict[str, Any], words: str) -> None:
    drawn = {"name": "drawn", "from": "core", "n": 8, "direction": "sample", "guidance": "captions"}
    others = {"name": "others", "from": "more", "n": 8}
    more = {"train": {"name": "more", "from": "core", "images": 16}}
    mistake([more, {"pairs": drawn}, {"pairs": others}, {"distill": DISTILL}, stage], words)


def test_pairs_of_a_larger_teacher_are_refused_when_a_recipe_is_read() -> None:
    wide = {"grow": {"name": "wide", "from": "core", "to": 64, "images": 8}}
    pairs = {"pairs": {"name": "large", "from": "wide", "n": 8}}
    mistake(
        [wide, pairs, {"distill": DISTILL}, {"grow": GROW | {"from": "onestep", "pairs": "large"}}],
        "large is of wide at 64 px, and the stage works at 32 px: name pairs of a teacher of 32 px",
    )
    loose = {"grow": wide["grow"] | {"core": "finetune"}}
    last = {"grow": GROW | {"from": "onestep", "pairs": "large", "to": 64}}
    mistake([loose, pairs, {"distill": DISTILL}, last], "large is of wide, but the teacher is core: name pairs of core")
    read([wide, pairs, {"distill": DISTILL}, last])


def test_a_generator_starts_from_the_teacher_of_its_pairs() -> None:
    recipe = read(
        [
            {"train": {"name": "more", "from": "core", "images": 16}},
            {"distill": {k: v for k, v in DISTILL.items() if k != "from"}},
            {"pairs": {"name": "elsewhere", "from": "some/folder", "n": 8}},
            {"distill": {"name": "second", "pairs": "elsewhere", "images": 8}},
        ]
    )
    assert [s.parent for s in recipe.stages] == [None, "core", "core", "core", "some/folder", "some/folder"]


def test_pairs_of_an_ancestor_of_the_teacher_are_refused_and_a_folder_of_the_other_kind(
    made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "onestep" / "checkpoint", tmp_path / "onestep")
    config = checkpoint.read_config(tmp_path / "onestep")
    core = config.lineage[-1]["parent"]
    lineage = [*config.lineage[:-1], {"verb": "train", "parent": core}, {"verb": "distill", "parent": "another"}]
    (tmp_path / "onestep" / "config.json").write_text(config.model_copy(update={"lineage": lineage}).model_dump_json())
    smoke = load_recipe("smoke-onestep").model_dump(mode="json", by_alias=True, exclude_unset=True)
    few = {"batch": 8, "shard": 8, "steps": 2, "n": 8}

    def recipe(*stages: dict[str, Any]) -> Any:
        return read_recipe({k: v for k, v in smoke.items() if k != "stages"} | {"stages": list(stages)}, "x.yaml")

    pairs = {"pairs": {"name": "pairs", "from": f"{made}/core"} | few}
    with pytest.raises(UserError, match="this model comes from another: make pairs with this model's teacher"):
        run(recipe(pairs, {"grow": GROW | {"from": f"{tmp_path}/onestep", "pairs": "pairs"}}), tmp_path)
    for stage, words in (
        ({"grow": GROW | {"from": f"{made}/onestep"}}, "is a one-step generator: add pairs:"),
        ({"grow": GROW | {"from": f"{made}/core", "pairs": "pairs"}}, "is a multi-step model, which grows without"),
        ({"pairs": {"name": "more", "from": f"{made}/onestep"} | few}, "is a one-step generator, expected a multi"),
        ({"train": {"name": "more", "from": f"{made}/onestep", "images": 8}}, "is a one-step generator, expected"),
        ({"distill": {"name": "more", "from": f"{made}/onestep", "pairs": "pairs", "images": 8}}, "is a one-step gen"),
        ({"evaluate": {"name": "more", "from": f"{made}/onestep", "steps": 4}}, "steps: a one-step generator samples"),
    ):
        with pytest.raises(UserError, match=words) as error:
            networks(recipe(pairs, stage))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (
            {"grow": GROW | {"from": "onestep", "pairs": "drawn"}},
            "drawn is of core at 16 px, and the stage works at 32",
        ),
        ({"evaluate": {"name": "e", "steps": 4}}, "stage 'e': steps: a one-step generator samples in one network"),
        ({"evaluate": {"name": "e", "from": "onestep", "guidance": 2}}, "guidance: a one-step generator samples"),
        ({"evaluate": {"name": "e", "from": "guided", "guidance": 0}}, "guidance=0: expected a weight above 0"),
        ({"evaluate": {"name": "e", "from": "guided", "guidance": 2, "sampler": "heun"}}, "stage 'e': sampler: a one"),
    ],
)
def test_what_a_generator_does_not_take_is_refused_when_a_recipe_is_read(stage: dict[str, Any], words: str) -> None:
    drawn = {"pairs": {"name": "drawn", "n": 8, "direction": "sample"}}
    weighed = {"pairs": {"name": "weighed", "n": 8, "guidance": "captions"}}
    guided = {"name": "guided", "pairs": "weighed", "losses": {"adversarial": False}}
    before = [drawn, weighed, {"distill": DISTILL | guided}, {"distill": DISTILL}]
    mistake([*before, stage], words)
    read([*before, {"evaluate": {"name": "e", "from": "guided", "guidance": 2}}])


def test_solutions_are_drawn_with_the_weight_of_the_pairs(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sampled(Exception):
        pass

    def note(*_: Any, guidance: float, **__: Any) -> None:
        raise Sampled(guidance)

    for stage in ("core", "pairs", "text"):
        shutil.copytree(made / stage, tmp_path / "smoke-onestep" / stage)
    monkeypatch.setattr(distill, "WATCHED", 8)
    monkeypatch.setattr(distill, "sample", note)
    recipe = load_recipe("smoke-onestep")
    with pytest.raises(Sampled) as sampled:
        run(recipe.model_copy(update={"stages": recipe.stages[:3]}), tmp_path)
    assert sampled.value.args == (1.0,)


def test_a_generator_trains_on_the_data_of_its_pairs(tmp_path: Path) -> None:
    other = {"data": {"source": "scenes", "n": 10, "captions": 4}}
    recipe = read(
        [
            {"pairs": {"name": "others", "from": "core", "n": 8} | other},
            {"distill": DISTILL | {"pairs": "others"}},
            {"grow": GROW | {"pairs": "others"}},
        ]
    )
    materials = Materials(recipe, tmp_path)
    core, _, pairs, distilled, grow = recipe.stages
    seen = [materials.data.mixture(s).describe() for s in (pairs, distilled, grow)]  # type: ignore[arg-type]
    assert seen[0] == seen[1] == seen[2] != materials.data.mixture(core).describe()  # type: ignore[arg-type]


def read(stages: list[dict[str, Any]]) -> Recipe:
    """A recipe of a core, its pairs, and `stages`."""
    first: list[dict[str, Any]] = [
        {"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 16}},
        {"pairs": {"name": "pairs", "n": 8}},
    ]
    return read_recipe({"name": "x", "data": {"source": "scenes"}, "stages": first + stages}, "x.yaml")


def mistake(stages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UserError) as error:
        read(stages)
    assert words in str(error.value) and "\n" not in str(error.value)
