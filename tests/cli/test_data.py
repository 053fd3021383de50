"""The `data` verb: what it shows of a source, and that it leaves nothing in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cli_files import class_folder
from conftest import RunCli
from data.test_identity import classes, paired


def lines(text: str) -> dict[str, str]:
    """The rows of the printed tables: first column -> the rest."""
    rows = (line.partition("  ") for line in text.splitlines())
    return {name: rest.strip() for name, _, rest in rows}


@pytest.mark.parametrize("source", [".", "../set", "link"])
def test_looking_at_a_folder_leaves_nothing_in_it(run_cli: RunCli, tmp_path: Path, source: str) -> None:
    folder = paired(tmp_path / "set")
    (tmp_path / "link").symlink_to(folder)
    before = sorted(folder.iterdir())
    here = tmp_path if source == "link" else folder
    result = run_cli("data", source, cwd=here)
    assert (result.code, sorted(folder.iterdir())) == (0, before), result.err
    assert (f"no contact sheet: it would lie in {source}," in result.out) == (here == folder)
    assert (tmp_path / "contact-sheet.png").exists() == (here == tmp_path)
    for option, file in (("--sheet", "sheet.png"), ("--bad", "bad.jsonl")):
        result = run_cli("data", source, option, folder / file, cwd=here)
        assert (result.code, sorted(folder.iterdir())) == (2, before)
        assert result.err.startswith(f"pixelgrow: {option} {folder / file}: lies in {source}, where nothing is written")
        assert run_cli("data", source, "--sheet", tmp_path / "s.png", option, tmp_path / file, cwd=here).code == 0


def test_captions_that_the_recipe_cuts_are_counted(run_cli: RunCli, tmp_path: Path) -> None:
    folder = paired(tmp_path / "set")
    (folder / "1.txt").write_text("a caption of more words than so few tokens hold, by far")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
name: cut
text: {{encoder: minilm, max_tokens: 8}}
data: {{source: '{folder}'}}
stages: [{{train: {{name: core, size: tiny, resolution: 16, images: 8}}}}]
"""
    )
    row = "captions cut by the recipe's text encoder, after 8 tokens"
    assert lines(run_cli("data", folder, "--recipe", recipe, cwd=tmp_path).out)[row] == "1 of 4"
    assert row not in lines(run_cli("data", folder, cwd=tmp_path).out)
    away = recipe.read_text().replace("minilm", "someone/elsewhere")
    recipe.write_text(away)
    result = run_cli("data", folder, "--recipe", recipe, cwd=tmp_path)
    assert (result.code, "captions cut" in result.out) == (0, False)
    classes(tmp_path / "classes")
    assert run_cli("data", tmp_path / "classes", "--recipe", recipe, cwd=tmp_path).code == 0


def test_a_dry_run_looks_into_the_data_that_are_there(run_cli: RunCli, tmp_path: Path) -> None:
    classes(tmp_path / "set", 20)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
name: dry
text: {classes: 2}
data: {source: set}
stages:
  - train: {name: core, size: tiny, resolution: 16, images: 8}
  - train: {name: more, from: core, images: 8, data: elsewhere}
"""
    )
    dry = run_cli("run", recipe, "--dry-run", "--rate", "1e9", cwd=tmp_path)
    assert dry.code == 0, dry.err
    assert "data: set; held out: 10 of 20 images" in dry.out
    assert "core: sees 10 of 20 images: 10 held out" in dry.out
    assert "more: data elsewhere (not there yet)" in dry.out and "more: sees" not in dry.out
    plan = run_cli("plan", recipe, "--rate", "1e9", cwd=tmp_path)
    assert "held out: 2% of the data, 16 to 10,000 images of each source and at most half of it" in plan.out
    few = run_cli("plan", recipe, "--rate", "1e9", "--set", "heldout.at_most=2", cwd=tmp_path)
    assert "held out: 2% of the data, 2 images of each source and at most half of it" in few.out
    mistaken = run_cli("run", recipe, "--dry-run", "--rate", "1e9", "--set", "text={encoder: minilm}", cwd=tmp_path)
    assert (mistaken.code, "set has class folders, not captions" in mistaken.err) == (2, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "set"]


def test_what_a_recipe_would_see_and_refuse(run_cli: RunCli, tmp_path: Path) -> None:
    folder = classes(tmp_path / "set", 20)
    torn = folder / "a" / "0.png"
    torn.write_bytes(torn.read_bytes()[:-30])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
name: seen
text: {classes: 2}
data: {source: set}
stages: [{train: {name: core, size: tiny, resolution: 32, stride: 4, images: 8}}]
"""
    )
    found = lines(run_cli("data", "set", "--recipe", recipe, cwd=tmp_path).out)
    assert found["usable images"] == "19"
    assert found["32x32"] == "sees 0 of 20 images: 10 too small, 10 held out"
    small = run_cli("data", "set", "--recipe", recipe, "--sheet", tmp_path / "s.png", cwd=tmp_path)
    assert small.err == ""
    recipe.write_text(recipe.read_text().replace("{classes: 2}", "{encoder: minilm}"))
    result = run_cli("data", "set", "--recipe", recipe, cwd=tmp_path)
    assert (result.code, lines(result.out)["32x32"]) == (0, "sees 0 of 20 images: 20 too small")
    assert result.err.startswith("a run of seen would be refused: set has class folders, not captions")


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
