"""The `grow` verb: the images that growth is measured on must have the model's kind of conditions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pixelgrow.cli.grow import _check_classes
from pixelgrow.data import open_source
from pixelgrow.errors import UserError


def classes(root: Path, *names: str) -> Any:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(root / name / "a.png")
    return open_source({"source": str(root), "kind": "classes"})


def model(**text: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(text=text))


def test_labels_must_mean_the_classes_of_the_model(tmp_path: Path) -> None:
    source = classes(tmp_path / "a", "cat", "dog")
    for text in ({"encoder": "labels:2"}, {"encoder": "labels:3"}, {"encoder": "labels:2", "classes": ["cat", "dog"]}):
        _check_classes(model(**text), source)
    _check_classes(model(encoder="minilm"), open_source("scenes"))
    for text, images, message in (
        ({"encoder": "minilm"}, source, "has classes, and the model was trained on captions"),
        ({"encoder": "labels:2"}, open_source("scenes"), "has captions, and the model was trained on classes"),
        ({"encoder": "labels:1"}, source, r"has the classes cat, dog; expected at most 1"),
        ({"encoder": "labels:2", "classes": ["cat", "emu"]}, source, r"expected those of the model \(cat, emu\)"),
        ({"encoder": "labels:3", "classes": ["ant", "cat", "dog"]}, source, r"expected those of the model"),
    ):
        with pytest.raises(UserError, match=message):
            _check_classes(model(**text), images)
