"""The command line: every verb, one line for a mistake, and torch only where it is needed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from PIL import Image

from pixelgrow import checkpoint
from pixelgrow.checkpoint import CheckpointConfig
from pixelgrow.cli.main import share_cores
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.models.sizes import core_config, shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.training.state import write_tensors

LONG = "x" * 300


class CliResult(Protocol):
    """What `run_cli` returns; see conftest.py."""

    code: int
    out: str
    err: str


class RunCli(Protocol):
    """The `run_cli` fixture; see conftest.py."""

    def __call__(self, *args: str | Path, cwd: Path | None = None) -> CliResult: ...


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint of three classes."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    torch.manual_seed(0)
    net = UViT(shallow_uvit("tiny", 16, core=core_config("tiny", classes=3)))
    torch.nn.init.normal_(net.exit["16"].conv.weight, std=0.1)
    denoiser = Denoiser(net)
    text = {"encoder": "labels:3", "max_tokens": 1}
    config = CheckpointConfig(
        network=net.config, diffusion=denoiser.config, text=text, lineage=[{"stage": "core", "images": 12345}]
    )
    checkpoint.save(folder, denoiser, config)
    return folder


def test_the_package_is_a_command_and_data_takes_a_source_or_a_verb(tmp_path: Path, run_cli: RunCli) -> None:
    command = [sys.executable, "-m", "pixelgrow", "data"]
    asked = [*command, "--decode", "2", "scenes", "--sheet", str(tmp_path / "sheet.png")]
    short = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    long = run_cli("data", "count", "scenes", "--decode", "2", "--sheet", tmp_path / "sheet.png")
    assert "usable image-caption pairs" in short and short.splitlines() == long.out.splitlines()
    (tmp_path / "recaption").mkdir()
    assert "data recaption: SOURCE is missing" in run_cli("data", "recaption", cwd=tmp_path).err
    assert "./recaption: no images in it" in run_cli("data", "./recaption", cwd=tmp_path).err


def test_help_is_quick_and_leaves_torch_alone() -> None:
    code = (
        "import sys, time\nfrom pixelgrow.cli.main import main\nsys.argv = ['pixelgrow', '--help']\n"
        "main()\nprint('torch' in sys.modules, 'pydantic' in sys.modules, time.process_time())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *helped, last = out.splitlines()
    assert {"demo", "run", "sample", "data", "grow", "info", "plan"} <= {line.split()[0] for line in helped if line}
    loaded_torch, loaded_pydantic, seconds = last.split()
    assert (loaded_torch, loaded_pydantic) == ("False", "False")
    assert float(seconds) < 0.5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rnu"], "there is no verb 'rnu'; did you mean run?"),
        (
            ["xyz"],
            "there is no verb 'xyz'; expected one of average, data, demo, edit, graft, grow, info, plan, run, sample",
        ),
        (["edit"], "edit: a verb is missing; expected one of inpaint, interpolate, transfer, upscale"),
        (["edit", "inpant"], "edit: there is no verb 'inpant'; did you mean inpaint?"),
        (["run"], "run: RECIPE is missing (A recipe"),
        (["run", "smoke", "--dryrun"], "run: there is no option --dryrun; did you mean --dry-run or --runs?"),
        (["sample", "MODEL", "1", "-x"], "sample: there is no option -x; see pixelgrow sample --help"),
        (["run", "smoke", "--set"], "run: --set requires an argument; see pixelgrow run --help"),
        (["sample", "MODEL", "1", "--interval", "1"], "sample: --interval requires 2 arguments; see"),
        (["grow", "MODEL", "--to", "32"], "grow: -o / --out is missing ("),
        (["info", "tiny", "a", "b"], "info: unexpected 'a b'; put text of several words in quotes"),
        (["sample", "MODEL", "1", "-n", "x"], "sample: -n: input should be a valid integer"),
        (["run", "nowhere.yaml"], "recipe 'nowhere.yaml' is neither a file nor one of demo"),
        (["run", "demo", "--set", "stages.core.imagess=1"], "unknown key 'imagess'; did you mean 'images'?"),
        (["sample", "nowhere"], "no prompt was given"),
        (["sample", "nowhere", "a"], "nowhere is not a checkpoint"),
        (["info", "nowhere"], "nowhere is not a checkpoint"),
        (["plan"], "expected a recipe or --size"),
        (["plan", "smoke", "--rate", "0"], "plan: --rate: input should be greater"),
        (["run", "smoke", "--runs", "FILE"], "cannot write FILE/smoke: Not a directory; name another place\n"),
        (["data", "images", "--sheet", "images"], "--sheet images: lies in images, which is only looked at"),
        (
            ["data", "images", "--sheet", "FILE/x.png"],
            "cannot write FILE/x.png: FILE is a file, not a folder; name another place",
        ),
        (["sample", "MODEL", "1", "-o", "/proc/x.png"], "cannot write /proc/x.png: No such file or directory"),
        (["sample", "./nowhere", "a"], "./nowhere is not a checkpoint"),
        (["info", LONG], "File name too long; check the path"),
        (["run", LONG], "File name too long"),
        (["run", "smoke", "--dry-run", "--set", f"text.encoder={LONG}"], "File name too long"),
        (["average", LONG, "--length", "0.1", "-o", "out"], "File name too long"),
        (["average", "MODEL", "--length", "0.1", "-o", LONG], "is no stage that was trained"),
        (["sample", "MODEL", "1", "-o", f"{LONG}/x.png"], "File name too long"),
        (["grow", "MODEL", "--to", "32", "-o", LONG], "File name too long"),
        (["plan", "--size", "giant"], "got 'giant', expected one of tiny, small"),
        (["data", "nowhere"], "nowhere: no such folder or file"),
        (["sample", "MODEL", "1", "--size", "16"], "--size '16': expected HEIGHTxWIDTH"),
        (["sample", "MODEL", "1", "--size", "16x15"], "size 16x15 does not fit"),
        (["sample", "MODEL", "1", "--sampler", "euler"], "sampler 'euler' does not exist"),
        (["sample", "MODEL", "1", "-o", "folder", "--grid"], "a grid is one PNG"),
        (["sample", "MODEL", "1", "-o", "picture.jpg"], "expected a name that ends in .png, or a folder"),
        (["sample", "MODEL", "1", "--guide", "base"], "has no base path"),
        (["sample", "MODEL", "1", "--schedule", "native"], "does not hold the noise"),
        (["sample", "MODEL", "1", "--interval", "3", "1"], "expected (lo, hi) with 0 <= lo < hi"),
        (["sample", "MODEL", "--prompts", "nowhere.txt"], "--prompts nowhere.txt: No such file or directory; expected"),
        (["sample", "MODEL", "--prompts", "images"], "--prompts images: Is a directory; expected a text file"),
        (["sample", "MODEL", "--prompts", "images/0/a.png"], "--prompts images/0/a.png: not UTF-8 text; expected one"),
        (["sample", "MODEL", "caf\udce9"], "the prompt 'caf\\udce9' is not UTF-8"),
        (["sample", "MODEL", "--prompts", "FILE"], "--prompts FILE: no prompt in it; expected one a line"),
        (["sample", "MODEL", "1", "--schedule", "foo"], "(--schedule) 'foo' does not exist; expected 'karras' or"),
        (["sample", "MODEL", "1", "--steps", "1000000000000"], "steps=1000000000000: expected 1 to 10000"),
        (["sample", "MODEL", "1", "--size", "1000000x1000000"], "each from 1 to 8192 pixels"),
        (["sample", "MODEL", "1", "-n", "1000000000000"], "expected 100000 images at most"),
        (
            ["sample", "MODEL", "1", "-n", "90000", "--size", "512x512"],
            "make a grid of 154198x154198, expected at most",
        ),
        (["data", "images/0/a.png"], "images/0/a.png: a single image is no source"),
        (["grow", "MODEL", "--to", "24", "-o", "out"], "cannot grow from 16 to 24 px"),
        (["grow", "MODEL", "--to", "0", "-o", "out"], "cannot grow from 16 to 0 px"),
        (["average", "MODEL", "--length", "0.1", "-o", "out"], "is no stage that was trained"),
        (["grow", "MODEL", "--to", "32", "-o", "MODEL"], "holds a checkpoint already"),
        (["grow", "MODEL", "--to", "32", "-o", "."], "cannot be written to '.'"),
        (["grow", "MODEL", "--to", "32", "-o", "images"], "images holds 0 and 2 more"),
        (["grow", "MODEL", "--to", "32", "-o", "out", "--init", "magic"], "expected one of preserve, random, scratch"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], expected: str, model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("")
    class_folder(tmp_path)
    if words[0] == "grow":  # class labels: scenes' captions are none
        words = [*words, "--data", "images"]
    result = run_cli(*(str(model) if w == "MODEL" else w for w in words), cwd=tmp_path)
    assert result.code == 2
    assert result.err.startswith("pixelgrow: ")
    assert expected in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_another_average_of_a_stage_becomes_a_checkpoint(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    stage = tmp_path / "core"
    denoiser, config = checkpoint.load(model)
    checkpoint.save(stage / "checkpoint", denoiser, config)
    name = "net.exit.16.conv.weight"
    last = denoiser.state_dict()[name]
    for images in (1000, 2000):  # weights that stood still: every average of theirs is themselves
        kept = {f"{length}/{name}": (2 * last).half() for length in (0.05, 0.1)}
        write_tensors(stage / "snapshots" / "denoiser" / f"{images:012d}.safetensors", kept)
    result = run_cli("average", stage, "--length", "0.08", "-o", tmp_path / "out")
    assert result.code == 0 and "the average of length 0.08" in result.out
    found, written = checkpoint.load(tmp_path / "out")
    torch.testing.assert_close(found.state_dict()[name], 2 * last, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.net.core.null_token, denoiser.net.core.null_token)
    assert written.lineage[-1] == {"verb": "average", "length": 0.08, "parent": config.sha256}
    assert run_cli("average", stage, "--length", "0.1", "-o", stage / "checkpoint").code == 2
    assert "name another folder" in run_cli("average", stage, "--length", "0.1", "-o", stage / "checkpoint").err


@pytest.mark.parametrize(
    ("where", "words", "advice"),
    [
        ("pixelgrow.model.sample", "sample MODEL 1", "run it again with a smaller --batch"),
        ("pixelgrow.cli.grow.grow", "grow MODEL --to 32 -o out --data images", "grow it by a recipe's grow stage"),
        ("pixelgrow.model.sample", "edit upscale MODEL small.png --prompt 1", "crop the image"),
        ("pixelgrow.plan.recipe.parts_of", "info MODEL", "use a machine with more memory"),
    ],
)
def test_running_out_of_memory_is_one_line(
    model: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, words: str, advice: str
) -> None:
    def large(*_: object, **__: object) -> None:
        torch.empty(2**50)

    class_folder(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    monkeypatch.setattr("pixelgrow.editing.path.EditPath.solve", large)
    monkeypatch.setattr(where, large)
    result = run_cli(*(str(model) if word == "MODEL" else word for word in words.split()), cwd=tmp_path)
    last = result.err.splitlines()[-1]
    assert (result.code, result.err.count("pixelgrow: ")) == (2, 1)
    assert last.startswith("pixelgrow: out of memory (") and advice in last


def test_idle_threads_are_told_to_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "x")  # so that what follows is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    share_cores()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "5000"


def class_folder(root: Path) -> Path:
    folder = root / "images"
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        pixels = np.full((32, 32, 3), 80 * label, np.uint8)
        Image.fromarray(pixels).save(folder / str(label) / "a.png")
    return folder


def test_sample_writes_a_grid_with_its_settings(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("1\n\n2\n")
    words = ["sample", str(model), "0", "--prompts", "prompts.txt", "-n", "2", "--steps", "2", "--seed", "3"]
    result = run_cli(*words, "-o", "out/grid.png", cwd=tmp_path)
    assert result.out.strip() == "out/grid.png"
    picture = Image.open(tmp_path / "out/grid.png")
    assert picture.size == (2 * 16 + 2, 3 * 16 + 4)
    facts = json.loads(picture.text["pixelgrow"])  # type: ignore[attr-defined]
    assert facts["prompts"] == ["0", "0", "1", "1", "2", "2"]
    assert (facts["seed"], facts["steps"], facts["guidance"]) == (3, 2, 2.0)
    assert facts["sha256"] == checkpoint.read_config(model).sha256


def test_a_byte_order_mark_is_no_prompt(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf1\n")
    assert run_cli("sample", model, "--prompts", "prompts.txt", "--steps", "1", "-o", "o", cwd=tmp_path).code == 0
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["0000-1.png"]


def test_sample_writes_single_files_that_the_grid_holds(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    words = ["sample", str(model), "0", "1", "--steps", "2", "--size", "16x24"]
    assert run_cli(*words, "-o", "grid.png", cwd=tmp_path).code == 0
    result = run_cli(*words, "-o", "singles", cwd=tmp_path)
    assert result.out.split() == ["singles/0000-0.png", "singles/0001-1.png"]
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    for i, name in enumerate(result.out.split()):
        single = np.asarray(Image.open(tmp_path / name))
        assert single.shape == (16, 24, 3)
        assert (grid[:, 26 * i : 26 * i + 24] == single).all()


def test_single_files_are_written_as_they_are_made(
    model: Path, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def full(image: Image.Image, path: Path, **settings: Any) -> None:
        save(image, path, **settings)
        if "0003" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    words = ["sample", model, "0", "-n", "5", "--steps", "1", "--batch", "2", "-o", "many"]
    result = run_cli(*words, cwd=tmp_path)
    assert (result.code, "cannot write many/0003-0.png: No space left" in result.err) == (2, True)
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["0000-0.png", "0001-0.png", "0002-0.png"]


def test_many_images_of_one_prompt_are_nearly_square(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    assert run_cli("sample", model, "0", "-n", "9", "--steps", "1", cwd=tmp_path).code == 0
    assert np.asarray(Image.open(tmp_path / "samples.png")).shape == (3 * 16 + 4, 3 * 16 + 4, 3)
    ends = ["--seed", "0", "--seed", "1", "--frames", "12", "-o", "arc.png"]
    assert run_cli("edit", "interpolate", model, "--prompt", "0", *ends, "--steps", "1", cwd=tmp_path).code == 0
    assert np.asarray(Image.open(tmp_path / "arc.png")).shape == (3 * 16 + 4, 4 * 16 + 6, 3)


@pytest.mark.parametrize("out", ["FILE/grid.png", "FILE", "folder.png"])
def test_where_pictures_go_is_tested_before_they_are_drawn(
    model: Path, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "FILE").write_text("")
    (tmp_path / "folder.png").mkdir()
    drawn: list[object] = []
    monkeypatch.setattr("pixelgrow.model.Model.stream", lambda *_, **__: drawn.append(1))
    result = run_cli("sample", model, "0", "-o", out, cwd=tmp_path)
    assert (result.code, drawn, len(result.err.splitlines())) == (2, [], 1)
    assert out in result.err


def test_info(model: Path, run_cli: RunCli) -> None:
    out = run_cli("info", model).out
    for words in ("16 px; sides are multiples of 4", "tiny: 4 blocks", "labels:3", "stage core, images 12,345"):
        assert words in out


def test_grow_writes_a_checkpoint(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    denoiser, config = checkpoint.load(model)
    sampling = {"guidance": 3.0, "interval": [0.5, 4.0]}
    checkpoint.save(tmp_path / "small", denoiser, config.model_copy(update={"sampling": sampling}))
    words = ["grow", tmp_path / "small", "--to", "32", "-o", tmp_path / "big", "--data", class_folder(tmp_path)]
    result = run_cli(*words)
    assert result.code == 0, result.err
    # An interval is in sigma of the image, which the growth multiplies.
    assert checkpoint.read_config(tmp_path / "big").sampling == {"guidance": 3.0, "interval": [1.0, 8.0]}
    words = ["--guide", "base", "--interval", "0.1", "5", "--steps", "2", "-o", tmp_path / "guided.png"]
    guided = run_cli("sample", tmp_path / "big", "0", *words)
    assert guided.code == 0, guided.err
    facts = json.loads(Image.open(tmp_path / "guided.png").text["pixelgrow"])  # type: ignore[attr-defined]
    assert (facts["guide"], facts["interval"]) == ("base", [0.1, 5.0])
    assert "grown from 16 to 32 px (preserve, exact)" in result.out
    assert "0 dropped" in result.out
    assert checkpoint.read_config(tmp_path / "big").lineage[-1]["to"] == 32
    report = json.loads((tmp_path / "big-growth" / "growth.json").read_text(encoding="utf-8"))
    assert report["resolution"] == [16, 32] and report["loaded"] and report["after"]
    before, after = (tmp_path / "big-growth" / f"{name}.png" for name in ("before", "after"))
    with Image.open(before) as low, Image.open(after) as high:
        assert high.width > low.width


def test_data(run_cli: RunCli, tmp_path: Path) -> None:
    class_folder(tmp_path)
    result = run_cli("data", "images", "--recipe", "smoke", cwd=tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / "contact-sheet.png").exists()
    assert [line.split() for line in result.out.splitlines() if line.startswith("16x16")] == [
        ["16x16", "sees", "3", "of", "3", "images"]
    ]


def test_data_names_bad_files(run_cli: RunCli, tmp_path: Path) -> None:
    """One for each reason; all in a list like a run's; also where a name is no text, and ours is not its language."""
    folder = class_folder(tmp_path)
    for name in (b"x.png", b"y.png", b"\xe9.gif"):
        (Path(os.fsdecode(os.fsencode(folder) + b"/0/" + name))).write_bytes(b"")
    command = [sys.executable, "-m", "pixelgrow", "data", "images", "--bad", "bad.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[-2:] for line in lines if line and line[0] == "empty"] == [["3", "0/x.png"]]
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(row["file"] for row in rows) == ["0/x.png", "0/y.png", "0/\udce9.gif"]
    assert rows[0].keys() == {"source", "file", "reason", "fingerprint"}
    (tmp_path / "taken").mkdir()
    result = run_cli("data", "images", "--bad", "taken", cwd=tmp_path)
    assert (result.code, "cannot write taken: Is a directory" in result.err) == (2, True)


def test_dry_run_touches_nothing(run_cli: RunCli, tmp_path: Path) -> None:
    result = run_cli("run", "smoke", "--dry-run", "--rate", "1e9", cwd=tmp_path)
    assert result.code == 0, result.err
    stages = ("core: train tiny", "grown: grow preserve, frozen", "eval: evaluate grown, 8 prompts")
    for words in (*stages, "activations", "as given"):
        assert words in result.out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_what_is_not_there(run_cli: RunCli, tmp_path: Path) -> None:
    words = [
        "text.encoder=minlm",
        "heldout.source=held",
        "stages.grown.data=more",
        "data=scenes",
        "heldout={source: h}",
    ]
    sets = [word for setting in words for word in ("--set", setting)]
    result = run_cli("run", "photos", "--dry-run", "--rate", "1e9", *sets, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "data: scenes; held out: h (not there yet)" in result.out
    assert "grown: data more (not there yet)" in result.out
    assert "minlm, 32 tokens (neither minilm nor a folder here: taken as a name on the hub" in result.out


def test_names_are_shown_as_they_are(run_cli: RunCli, tmp_path: Path, model: Path) -> None:
    names = ["cats [old]", "[bold]", ":cat:"]
    for i, name in enumerate(names):
        (tmp_path / "m[/a]" / name).mkdir(parents=True)
        Image.new("RGB", (20 + i, 20)).save(tmp_path / "m[/a]" / name / "a.png")
        (tmp_path / "m[/a]" / name / "b.png").write_bytes(b"")
    result = run_cli("data", "m[/a]", cwd=tmp_path)
    assert result.code == 0, result.err
    for name in (*names, "m[/a] (class folders)", ":cat:/b.png"):
        assert name in result.out
    (tmp_path / "m[/b]").symlink_to(model)
    assert "m[/b]" in run_cli("info", "m[/b]", cwd=tmp_path).out


def test_control_c_says_how_to_go_on(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pixelgrow.run.run", interrupted)
    result = run_cli("run", "smoke", cwd=tmp_path)
    assert result.code == 130
    assert result.err == "pixelgrow: stopped by SIGINT: run the same command again to go on\n"
    monkeypatch.setattr("pixelgrow.model.find", interrupted)
    result = run_cli("info", "tiny")  # starts anew
    assert (result.code, result.err) == (130, "pixelgrow: stopped by SIGINT\n")
