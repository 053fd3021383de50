"""The `grow` verb: a checkpoint, a report and samples; images of the model's kind of conditions."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cli_files import class_folder
from conftest import RunCli
from pixelgrow import checkpoint
from pixelgrow.errors import UserError
from pixelgrow.text.encoders import check_classes


def test_labels_must_mean_the_classes_of_the_model() -> None:
    names = ("cat", "dog")
    for text in ({"encoder": "labels:2"}, {"encoder": "labels:3"}, {"encoder": "labels:2", "classes": ["cat", "dog"]}):
        check_classes(text, names, "--data a")
    check_classes({"encoder": "minilm"}, (), "scenes")
    for text, found, message in (
        ({"encoder": "minilm"}, names, "--data a has classes, and the model was trained on captions"),
        ({"encoder": "labels:2"}, (), "has captions, and the model was trained on classes"),
        ({"encoder": "labels:1"}, names, r"has the classes cat, dog; expected at most 1"),
        ({"encoder": "labels:2", "classes": ["cat", "emu"]}, names, r"expected those of the model \(cat, emu\)"),
        ({"encoder": "labels:3", "classes": ["ant", "cat", "dog"]}, names, r"expected those of the model"),
    ):
        with pytest.raises(UserError, match=message):
            check_classes(text, found, "--data a")


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
    assert "grown from 16 to 32 px (preserve, exact until sigma 1 at the core)" in result.out
    assert "32 px on base, exact until sigma 1, patch 2" in run_cli("info", tmp_path / "big").out
    assert "32 px (base, exact until sigma 1)" in (tmp_path / "big" / "README.md").read_text(encoding="utf-8")
    assert "0 dropped" in result.out
    assert checkpoint.read_config(tmp_path / "big").lineage[-1]["to"] == 32
    report = json.loads((tmp_path / "big-growth" / "growth.json").read_text(encoding="utf-8"))
    assert report["resolution"] == [16, 32] and report["loaded"] and report["after"]
    assert (report["exact"], report["until"]) == (True, 1.0)
    before, after = (tmp_path / "big-growth" / f"{name}.png" for name in ("before", "after"))
    with Image.open(before) as low, Image.open(after) as high:
        assert high.width > low.width
