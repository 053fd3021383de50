"""`run --dry-run`: what would be done."""

from __future__ import annotations

from pathlib import Path

from conftest import RunCli


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
