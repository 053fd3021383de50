"""Captions: lines of a .txt, other languages, encodings; what `data` says about them."""

import json
from pathlib import Path

import pytest

from data.test_sources import an_image, as_files, write_tar
from pixelgrow.data import Loader, open_source
from pixelgrow.data.images import BadImage
from pixelgrow.data.inspect import inspect_source
from pixelgrow.data.sources.captions import captions_in, from_json, from_text
from pixelgrow.data.sources.index import LANGUAGES, LINES


@pytest.mark.parametrize(
    ("raw", "captions", "foreign"),
    [
        ("a cat", ["a cat"], 0),
        ("a  cat \n", ["a cat"], 0),
        ("\n\n one\n \n\ttwo\n\n", ["one", "two"], 0),
        ("one\r\ntwo\r\n", ["one", "two"], 0),
        ("one\rtwo", ["one", "two"], 0),
        ("\ufeffone\ntwo", ["one", "two"], 0),
        ("ein\u2028paar Wörter\x85", ["ein paar Wörter"], 0),
        ("A cat.\nde=Eine Katze.\nfr=Un chat.\n", ["A cat."], 2),
        ("A cat.\nde.utf8=Eine Katze.\npt_BR.utf8=Um gato.\nsr@latin.utf8=Mačka.\nzh_tw.utf8=貓\n", ["A cat."], 4),
        ("de=Eine Katze\nA cat\nes=Un gato", ["A cat"], 2),
        ("de=Eine Katze\nen=A cat\n", ["A cat"], 1),
        ("a=b", ["a=b"], 0),
        ("de=Eine Katze", ["de=Eine Katze"], 0),
        ("a cat, focal=35\nfour words = a caption\nE=mc2\nabcd=e", None, 0),
    ],
)
def test_a_line_is_a_caption(raw: str, captions: list[str] | None, foreign: int) -> None:
    found = from_text(raw.encode())
    assert [w.text for w in found.wordings] == (captions if captions is not None else raw.split("\n"))
    assert found.foreign == foreign


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty caption"),
        (b" \n\r\n", "empty caption"),
        ("Grüße".encode("latin-1"), "caption is not UTF-8"),
        ("a cat".encode("utf-16"), "caption is not UTF-8"),
        (b"x" * 70_000, "caption longer than 64 KiB"),
        (b"de=Katze\nfr=chat\n", "caption in other languages only"),
    ],
)
def test_what_is_no_caption(raw: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        from_text(raw)


def test_the_first_of_text_caption_and_prompt_counts() -> None:
    row = {"prompt": "p", "caption": "c", "text": "t", "url": "u"}
    for key in ("text", "caption", "prompt"):
        assert captions_in(row)[0].text == from_json(json.dumps(row).encode()).wordings[0].text == row[key]
        row[key] = None  # type: ignore[assignment]
    with pytest.raises(BadImage, match=r"no caption \(none of text, caption, prompt has a value\)"):
        captions_in(row)


def test_lines_are_trained_on_and_counted(tmp_path: Path) -> None:
    for i, text in enumerate(("a\nb\nde=c\n", "d\n", "e\nf\ng\n")):
        (tmp_path / f"{i}.png").write_bytes(an_image(shade=i))
        (tmp_path / f"{i}.txt").write_text(text)
    source = open_source(str(tmp_path))
    loader = Loader(source, size=(8, 8), batch=30)
    assert set(loader.texts()) == {"a", "b", "d", "e", "f", "g"}
    assert set(next(loader.batches()).text) == {"a", "b", "d", "e", "f", "g"}
    notes = dict(inspect_source(source).notes)
    assert notes == {LINES: 2, LANGUAGES: 1}
    tar = as_files(write_tar(tmp_path / "tar" / "x.tar", [(p.name, p.read_bytes()) for p in tmp_path.glob("?.*")]))
    assert dict(tar.notes) == notes
    assert {tar.key(i): tar.wordings(i) for i in range(3)} == {f"{i}.png": source.wordings(i) for i in range(3)}  # type: ignore[attr-defined]
