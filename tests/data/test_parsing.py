"""Captions of the built-in scenes, read back."""

import pytest

from pixelgrow.data.scenes.parsing import read
from pixelgrow.data.scenes.questions import questions
from pixelgrow.data.scenes.source import Scenes


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_caption_reads_back_as_its_scene(split: str) -> None:
    source = Scenes(split=split, n=3000, captions=3000)
    wrong = [s.caption for s in map(source.scene, range(3000)) if (r := read(s.caption)) is None or r != s.spec]
    assert wrong == []


def test_what_is_no_such_caption_is_none() -> None:
    for words in ("a cat", "", "a red circle beside a blue star", "two red", "a red circle on a purple sea", "circle"):
        assert read(words) is None
    spec = read("A red circle above two blue stars.")
    assert spec is not None and next(q.args for q in questions(spec)) == ("white",) and spec.relation == "above"
