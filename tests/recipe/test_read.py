"""Recipes: what is read, and the one line of each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pixelgrow.errors import UserError
from pixelgrow.plan import shapes
from pixelgrow.recipe.read import builtin, load_recipe, read_recipe, resolution_of
from pixelgrow.recipe.stages import GrowStage, TrainStage

GOOD = """
name: mine
data: {source: scenes, n: 200_000, captions: 1e3}
stages:
  - train: {name: core, size: tiny, resolution: 32, images: 1e4, lr: 1e-3}
  - grow: {name: grown, to: 64, images: 3_000}
  - evaluate: {name: eval}
"""


def write(folder: Path, text: str = GOOD) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "recipe.yaml")


def test_numbers_and_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    core, grown, evaluation = recipe.stages
    assert recipe.data[0].n == 200_000
    assert recipe.data[0].captions == 1000
    assert isinstance(core, TrainStage)
    assert (core.images, core.lr, core.warmup) == (10_000, 1e-3, 500)
    assert isinstance(grown, GrowStage)
    assert (grown.parent, grown.to, grown.init, grown.core) == ("core", (64,), "preserve", "frozen")
    assert evaluation.parent == "grown"
    assert [resolution_of(recipe.stages, n) for n in ("core", "grown")] == [32, 64]


@pytest.mark.parametrize("name", builtin())
def test_the_package_s_recipes_are_valid(name: str) -> None:
    assert load_recipe(name).name == name


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path)
    recipe = load_recipe(
        path,
        ["seed=7", "stages.core.images=1e3", "stages.1.core={unfreeze_after: 100}", "text.max_tokens=8", "data.n=5"],
    )
    core, grown, _ = recipe.stages
    assert recipe.seed == 7
    assert recipe.text.max_tokens == 8
    assert recipe.data[0].n == 5
    assert isinstance(core, TrainStage)
    assert core.images == 1000
    assert isinstance(grown, GrowStage)
    assert (grown.core, grown.unfreeze_after) == ("frozen", 100)


@pytest.mark.parametrize(
    "typed",
    ["/x/photos #2", "a: b", "- a", "[2024] photos", "[2024]", "{x}", "{x", "yes", "null", "~", "true", "007", "1e6",
     "2024", "1:30", "0x10", "2024-01-31", "@x", "%x", "`x`", "!!int 5", "!x", "&a", "*a", "|", "> a", "? a", "it's",
     "\"", "'a", "\\d\\n", "a\tb", " a ", "", "Grüße", "a=b", "a, b", "#"],
)  # fmt: skip
def test_a_text_is_what_was_typed(tmp_path: Path, typed: str) -> None:
    path = write(tmp_path, GOOD.replace("{source: scenes, n: 200_000, captions: 1e3}", "[{source: x}]"))
    flow, none = typed[:1] in ("{", "["), typed in ("null", "~", "")
    given = [f"data[0].source={typed}"]
    given += [] if flow else [f"data[0]={typed}", f"data={typed}"]  # else a mapping, or a list of sources
    given += [] if flow or none else [f"stages.core.data={typed}"]  # else no data of its own
    for override in given:
        recipe = load_recipe(path, [override])
        stage = recipe.stages[0]
        assert isinstance(stage, TrainStage)
        assert (stage.data or recipe.data)[0].source == typed, override


@pytest.mark.parametrize(
    ("typed", "read"),
    [("5", 5), ("1e3", 1000), ("010", 10), ("1_000", 1000), ("0x10", 16), (" 7 ", 7), ("+3", 3), ("'8'", 8)],
)
def test_numbers_are_numbers(tmp_path: Path, typed: str, read: int) -> None:
    assert load_recipe(write(tmp_path), [f"seed={typed}"]).seed == read
    assert load_recipe(write(tmp_path, GOOD.replace("name: mine", f"name: mine\nseed: {typed}"))).seed == read
    stage = load_recipe(write(tmp_path), [f"stages.core.warmup={typed}"]).stages[0]
    assert isinstance(stage, TrainStage) and stage.warmup == read


def test_values_of_other_fields(tmp_path: Path) -> None:
    given = ["name='007'", 'heldout.source="/x/photos #2"', "data.n=~"]
    given += [f"stages.core.{one}" for one in ("compile=true", "warmup=null", "lr=.5", "ema=[]", "decay=constant")]
    recipe = load_recipe(write(tmp_path), given)
    core = recipe.stages[0]
    assert isinstance(core, TrainStage)
    assert (recipe.name, recipe.heldout.source, recipe.data[0].n) == ("007", "/x/photos #2", None)
    assert (core.compile, core.lr, core.ema, core.decay) == (True, 0.5, (), "constant")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.core.imagess=3", "recipe.yaml: stages[0].train: unknown key 'imagess'; did you mean 'images'?"),
        ("stages.grown.noise.kin=1", "recipe.yaml: stages[1].grow.noise: unknown key 'kin'; did you mean 'kind'?"),
        ("sead=1", "recipe.yaml: unknown key 'sead'; did you mean 'seed'?"),
        ("data.sorce=x", "recipe.yaml: data[0]: unknown key 'sorce'; did you mean 'source'?"),
        ("stages.core.size=tinny", "recipe.yaml: stages[0].train.size: got 'tinny', expected one of nano, tiny, small"),
        ("stages.core.images=abc", "recipe.yaml: stages[0].train.images: got 'abc', expected to be a valid integer"),
        (
            "stages.core.images=0",
            "recipe.yaml: stages[0].train.images: got 0, expected to be greater than or equal to 1",
        ),
        ("stages.grown.to=96", "recipe.yaml: stage 'grown': to: got 96, expected 32 doubled once or more: 64, 128"),
        ("stages.grown.from=cor", "recipe.yaml: stage 'grown': from: unknown stage 'cor'; did you mean 'core'?"),
        ("stages.grown.name=core", "recipe.yaml: two stages are called 'core'; give"),
        ("stages.grown.name=Core", "recipe.yaml: two stages are called 'core' and 'Core', one folder on some file sys"),
        ("stages.eval.name=text", "recipe.yaml: a stage is called 'text', which is the name of a run's own file"),
        ("stages.eval.name=Report.html", "recipe.yaml: a stage is called 'Report.html', which is the name of a run's"),
        ("stages.eval.name=eval.", "recipe.yaml: stages[2].evaluate.name: got 'eval.', expected letters, digits"),
        ("stages.nope.images=1", "--set 'stages.nope.images=1': got 'nope', expected one of core, grown, eval"),
        ("stages=[{trian: {}}]", "recipe.yaml: stages[0]: unknown stage 'trian'; did you mean 'train'?"),
        ("stages=[{grow: {name: a, to: 64, images: 1}}]", "recipe.yaml: stage 'a' has no model to start from"),
        ("seed=!!int 2024-13-45", "recipe.yaml: seed: got '!!int 2024-13-45', expected to be a valid integer"),
        ("seed=5 # five", "recipe.yaml: seed: got '5 # five', expected to be a valid integer"),
        ("seed=1:30", "recipe.yaml: seed: got '1:30', expected to be a valid integer"),
        ("data={source: /x/photos #2}", "--set 'data={source: /x/photos #2}': the value is not readable as YAML"),
        ("seed=" + "[" * 2000, "--set 'seed=[["),
        ("seed=" + "1" * 5000, "--set 'seed=11"),
        ("name=2024-13-45", None),
        ("name=2024-01-31", None),
        ("text.kind=1", "recipe.yaml: text: unknown key 'kind'; expected one of encoder, max_tokens"),
        (
            "text={encoder: minilm, classes: 3}",
            "recipe.yaml: text: got encoder: minilm and classes: 3, expected one of",
        ),
        ("text.classes=3", None),
        ("data=scenes", None),
        ("data=[scenes, {source: folder}]", None),
        ("data=[]", "recipe.yaml: data: got a list, "),
        ("heldout=folder", None),
        ("stages.core.data=folder", None),
        ("stages.0.train.images=5", None),
        ("stages[0].train.images=5", None),
        ("stages[0].grow.images=5", "recipe.yaml: stages[0].train: unknown key 'grow'"),
        ("stages[0].train.imagess=5", "recipe.yaml: stages[0].train: unknown key 'imagess'; did you mean 'images'?"),
        ("data.n=1e12", "recipe.yaml: data[0].n: got 1000000000000.0, expected to be less than or equal to 100000000"),
        ("stages.eval.steps=1000000", "recipe.yaml: stages[2].evaluate.steps: got 1000000, expected to be less than"),
        ("stages=3", "recipe.yaml: stages: got 3, expected a list"),
        ("data.split=train", None),
        ("data={source: folder, split: train}", "recipe.yaml: data[0]: split belongs to `source: scenes`"),
        ("data={source: scenes, kind: tar}", "recipe.yaml: data[0]: kind: got 'tar', but it belongs to a path"),
        ("data={source: scenes, ground: red}", "recipe.yaml: data[0]: ground: got 'red', but it belongs to a path"),
        ("data={source: x, ground: redd}", "recipe.yaml: data[0].ground: got 'redd', expected a colour such as white"),
        ("data={source: x, fit: cover}", "recipe.yaml: data[0].fit: got 'cover'"),
        ("heldout={fit: pad}", "recipe.yaml: heldout: fit: got 'pad' without a source"),
        ("heldout={weight: 2}", "recipe.yaml: heldout: weight: got 2, but held-out data is no mixture"),
        ("heldout={kind: tar}", "recipe.yaml: heldout: kind: got 'tar' without a source"),
        ("stages.core.sampling={interval: [2, 1]}", "recipe.yaml: stages[0].train.sampling.interval: got [2.0, 1.0]"),
        ("stages.eval.grid=linear", "recipe.yaml: stages[2].evaluate.grid: got 'linear', expected to be 'karras' or"),
        ("stages.eval.interval=[0.3, 5]", None),
        ("stages.eval.grid=native", None),
        (
            "stages.core.weighting_bias=-2",
            "recipe.yaml: stages[0].train: weighting_bias: got -2 with weighting: edm, but it belongs to",
        ),
        ("text={classes: 0}", "recipe.yaml: text.encoder: got 'labels:0', expected labels:N"),
        ("text.encoder=labels:ten", "recipe.yaml: text.encoder: got 'labels:ten', expected labels:N"),
        ("stages.core.resolution=30", "recipe.yaml: stages[0].train: resolution 30 is not a multiple of the stride 4"),
        ("stages.core.from=grown", "recipe.yaml: stages[0].train: resolution comes from the checkpoint"),
        ("stages.grown.unfreeze_after=5000", "recipe.yaml: stages[1].grow: unfreeze_after: got 5000, which leaves no"),
        ("stages.grown.core=melted", "recipe.yaml: stages[1].grow.core: got 'melted', expected to be 'frozen' or"),
        ("name=../up", "recipe.yaml: name: got '../up', expected letters, digits"),
        ("seed", "--set 'seed': expected a.b=value"),
        ("seed.deep=1", "--set"),
    ],
)
def test_one_line_for_each_mistake(tmp_path: Path, override: str, expected: str | None) -> None:
    path = write(tmp_path, GOOD.replace("name: mine", "name: mine\nseed: 0"))
    if expected is None:
        load_recipe(path, [override])
    else:
        assert mistake(path, override).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "recipe.yaml:1: not readable as YAML: "),
        ("name: a\nseed: !!int x", "recipe.yaml:2: not readable as YAML: no readable int"),
        ("[" * 2000, "recipe.yaml: not readable as YAML: nested too deeply"),
        ("name: a\nname: b", "recipe.yaml:2: not readable as YAML: the key 'name' stands twice"),
        ("name: a\ndata: {{source: x}}", "recipe.yaml:2: not readable as YAML: a key is a mapping or a list"),
        ("name: a\ndata: {[a]: x}", "recipe.yaml:2: not readable as YAML: a key is a mapping or a list"),
        ("- 1", "recipe.yaml: got a list, expected a mapping with name, data and stages"),
        ("", "recipe.yaml: got nothing, expected a mapping"),
        (GOOD.replace("name: mine", ""), "recipe.yaml: name is missing"),
        (
            GOOD.replace("{name: eval}", "eval"),
            "recipe.yaml: stages[2].evaluate: got the text 'eval', expected its settings",
        ),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, expected: str) -> None:
    assert mistake(write(tmp_path, text)).startswith(expected)


def test_a_patch_that_a_growth_would_not_take_is_refused(tmp_path: Path) -> None:
    again = "  - grow: {name: again, to: 128, images: 1, init: random, patch: 2}\n"
    tuned = "  - train: {name: tuned, from: grown, images: 1}\n"
    random = GOOD.replace("to: 64", "to: 64, init: random, patch: 2")
    for between in ("", tuned):
        said = mistake(write(tmp_path, random + between + again))
        assert said.startswith("recipe.yaml: stage 'again': patch: got 2, but init: random keeps")
    for fine in (
        GOOD + again,
        random + again.replace(", patch: 2", "").replace("init: random", "init: preserve, patch: 2"),
    ):
        assert load_recipe(write(tmp_path, fine)).stages[-1].name == "again"


def test_short_forms(tmp_path: Path) -> None:
    overrides = ["data=images", "stages[0].train.images=5", "stages.1.grow.data=[a, {source: b}]"]
    recipe = load_recipe(write(tmp_path), overrides)
    assert [d.source for d in recipe.data] == ["images"]
    core, grown, _ = recipe.stages
    assert isinstance(core, TrainStage) and core.images == 5
    assert isinstance(grown, GrowStage) and grown.data is not None
    assert [d.source for d in grown.data] == ["a", "b"]
    said = mistake(write(tmp_path, GOOD + "text: {encoder: minilm}\n"), "text.classes=3")
    assert "text={classes: 3}" in said


def test_words_stay_words(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD.replace("name: mine", "name: no")))
    assert recipe.name == "no"


def test_a_name_that_is_nowhere() -> None:
    with pytest.raises(UserError, match="neither a file nor one of cc12m, demo, emoji, huge, photos, smoke"):
        load_recipe("dmo")


def test_a_stage_whose_name_has_dots_is_overridden_by_it(tmp_path: Path) -> None:
    given = ["stages.core.name=v1", "stages.grown.from=v1", "stages.grown.name=v1.5", "stages.eval.from=v1.5"]
    recipe = load_recipe(write(tmp_path), [*given, "stages.v1.5.batch=32", "stages.v1.batch=8"])
    assert [getattr(s, "batch", None) for s in recipe.stages[:2]] == [8, 32]


def test_training_settings_of_a_stage_are_its_own() -> None:
    stage = TrainStage(name="a", size="tiny", resolution=32, images=10_000, save_every=64)
    settings = stage.training()
    assert (settings.images, settings.warmup, settings.save_every) == (10_000, stage.warmup, 64) == (10_000, 500, 64)


def test_the_stages_of_train_your_own_go_into_its_recipe() -> None:
    root = Path(__file__).parents[2]
    blocks = (root / "docs" / "train-your-own.md").read_text().split("```yaml\n")[1:]
    stages = [stages for block in blocks if isinstance(stages := yaml.safe_load(block.partition("```")[0]), list)]
    assert len(stages) == 2
    for more in stages:
        raw = yaml.safe_load((root / "src" / "pixelgrow" / "recipes" / "photos.yaml").read_text())
        raw["stages"] += more
        nets = shapes.networks(read_recipe(raw, "train-your-own.md"))
        assert (nets["onestep"].resolution, nets["onestep64"].resolution) == (32, 64)
