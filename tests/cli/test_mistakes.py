"""A user's mistake, in any verb: one line, status 2, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_files import class_folder
from conftest import RunCli

LONG = "x" * 300


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rnu"], "there is no verb 'rnu'; did you mean run?"),
        (
            ["xyz"],
            "there is no verb 'xyz'; expected one of average, compare, data, demo, edit, evaluate, graft, grow, info, "
            "new, plan, run, sample",
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
        (["run", "nowhere.yaml"], "recipe 'nowhere.yaml' is neither a file nor one of cc12m, demo"),
        (["run", "demo", "--set", "stages.core.imagess=1"], "unknown key 'imagess'; did you mean 'images'?"),
        (["sample", "nowhere"], "no prompt was given"),
        (["sample", "nowhere", "a"], "nowhere is not a checkpoint"),
        (["info", "nowhere"], "nowhere is not a checkpoint"),
        (["plan"], "expected a recipe or --size"),
        (["plan", "smoke", "--rate", "0"], "plan: --rate: input should be greater"),
        (["run", "smoke", "--runs", "FILE"], "cannot write FILE/smoke: Not a directory; name another place\n"),
        (["data", "images", "--sheet", "images"], "--sheet images: lies in images, where nothing is written"),
        (
            ["data", "images", "--sheet", "FILE/x.png"],
            "cannot write FILE/x.png: FILE is a file, not a folder; name another place",
        ),
        (["sample", "MODEL", "1", "-o", "/proc/x.png"], "cannot write /proc/x.png: No such file or directory"),
        (["sample", "./nowhere", "a"], "./nowhere is not a checkpoint"),
        (["sample", "MODEL", "1", "-o", ""], "sample: -o is empty: expected a value; is a variable not set?"),
        (["sample", "MODEL", "1", "--out="], "sample: --out is empty"),
        (["data", ""], "data: argument 1 is empty"),
        (["plan", "--size", "tiny", "--batch", "99999999999999"], "plan: --batch: input should be less than"),
        (["info", LONG], "File name too long; check the path"),
        (["run", LONG], "File name too long"),
        (["run", "smoke", "--dry-run", "--set", f"text.encoder={LONG}"], "File name too long"),
        (["average", LONG, "--length", "0.1", "-o", "out"], "File name too long"),
        (["average", "MODEL", "--length", "0.1", "-o", LONG], "is no stage that was trained"),
        (["sample", "MODEL", "1", "-o", f"{LONG}/x.png"], "File name too long"),
        (["grow", "MODEL", "--to", "32", "-o", LONG], "File name too long"),
        (["plan", "--size", "giant"], "got 'giant', expected one of nano, tiny, small"),
        (["data", "nowhere"], "nowhere: no such folder or file"),
        (["sample", "MODEL", "1", "--size", "16"], "--size '16': expected HEIGHTxWIDTH"),
        (["sample", "MODEL", "1", "--size", "16x15"], "size 16x15 does not fit"),
        (["sample", "MODEL", "1", "--sampler", "euler"], "sampler 'euler' does not exist"),
        (["sample", "MODEL", "1", "-o", "folder", "--grid"], "a grid is one PNG"),
        (["sample", "MODEL", "1", "-o", "image.jpg"], "expected a name that ends in .png, or a folder"),
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
        (
            ["edit", "interpolate", "MODEL", "--prompt", "1", "--frames", "900000", "-o", "x.png"],
            "expected at most 150 million pixels: ask for fewer --frames",
        ),
        (["edit", "upscale", "MODEL", "x.png", "--prompt", "1"], "cannot read x.png: No such file or directory"),
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
