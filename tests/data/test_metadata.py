"""metadata.jsonl, .csv and .parquet: rows, captions, and names that find their files or say why not."""

import builtins
import csv
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.test_sources import an_image, as_files, passed, reasons, write_metadata
from pixelgrow.data import Loader, open_source
from pixelgrow.data.sources.index import NEITHER, UNNAMED
from pixelgrow.data.sources.metadata import MetadataFolder
from pixelgrow.errors import UserError

Rows = list[dict[str, Any]]


def write_csv(folder: Path, rows: Rows) -> None:
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(folder: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")


def write_jsonl(folder: Path, rows: Rows) -> None:
    write_metadata(folder, list(rows))


WRITERS = [write_jsonl, write_csv, write_parquet]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_same_rows_in_any_form(write: Callable[[Path, Rows], None], column: str, tmp_path: Path) -> None:
    texts = ["plain", 'with, commas; and "quotes"', "two\nlines", "Grüße 猫"]
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(an_image(shade=i))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.png").write_bytes(an_image())
    (tmp_path / "readme").write_text("")
    write(tmp_path, [{"id": i, "file_name": f"./{i}.png", column: text} for i, text in enumerate(texts)])
    source = as_files(tmp_path)
    assert isinstance(source, MetadataFolder)
    assert [source.key(i) for i in range(4)] == [f"{i}.png" for i in range(4)]
    assert [source.text(i) for i in range(4)] == ["plain", texts[1], "two lines", texts[3]]
    assert passed(source) == {UNNAMED: (1, "sub/other.png"), NEITHER: (1, "readme")}
    assert not source.bad
    batch = next(Loader(source, size=(8, 8), batch=4, workers=1).batches())
    assert set(batch.text) <= {source.text(i) for i in range(4)}


def test_a_parquet_list_is_several_captions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(an_image())
    write_parquet(tmp_path, [{"file_name": "a.png", "text": ["one", "two"]}])
    assert [w.text for w in as_files(tmp_path).wordings(0)] == ["one", "two"]


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(an_image())
    write_parquet(tmp_path, [{"file_name": "a.png", "text": "a"}])
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"metadata\.parquet: .*pip install 'pixelgrow\[parquet\]'") as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["metadata.parquet", "metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("data", [b"", b"PAR1", os.urandom(200), "file_name,text\na.png,a\n".encode("utf-16"), b"\n\n"])
def test_a_damaged_file_is_one_line(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(an_image())
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name) as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_as_spreadsheets_write_it(delimiter: str, bom: str, end: str, tmp_path: Path) -> None:
    rows = [["file_name", "text"], ["a.png", f'"one{delimiter} two"'], [], ["b.png", '"say ""x"""'], ["c.png", "ü"]]
    text = bom + end.join(delimiter.join(row) for row in rows)
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(an_image())
    source = as_files(tmp_path)
    assert [source.text(i) for i in range(3)] == [
        "one two" if delimiter == "\t" else f"one{delimiter} two",
        'say "x"',
        "ü",
    ]
    assert not source.bad


def test_bad_rows_of_a_csv_are_counted_with_the_lines_that_they_swallow(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(an_image(shade=i))
    lines = [f"{i}.png,number {i}".encode() for i in range(10)]
    lines[1] = b"1.png,one, two"
    lines[2] = "2.png,Grüße".encode("latin-1")
    lines[3] = b"3.png,"
    lines[5] = b'5.png,"never closed'
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n" + b"\n".join(lines) + b"\n")
    source = as_files(tmp_path)
    assert [source.key(i) for i in range(len(source))] == ["0.png", "4.png"]
    assert {bad.key: (bad.reason.split(" (")[0], bad.samples) for bad in source.bad} == {
        "metadata.csv:3": ("3 cells in 2 columns: put a caption with commas into quotes", 1),
        "metadata.csv:4": ("line is not UTF-8", 1),
        "metadata.csv:5": ("empty caption", 1),
        "metadata.csv:7": ("line is not CSV", 5),
    }


def test_a_missing_image_of_a_row_of_several_lines_is_one_sample(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(an_image())
    write_csv(tmp_path, [{"file_name": f"{i}.png", "text": "three\nlines\nof text"} for i in range(2)])
    assert [(bad.key, bad.samples) for bad in as_files(tmp_path).bad] == [("1.png", 1)]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_another_encoding_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes("file_name,text\na.png,a\n".encode("utf-16"))
    with pytest.raises(UserError, match="it is UTF-16; expected UTF-8"):
        open_source(str(tmp_path))


def test_rows_of_a_csv_are_read_again(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(an_image(shade=i))
    write_csv(tmp_path, [{"file_name": f"{i}.png", "text": f"line {i}\nmore"} for i in range(2)])
    source = as_files(tmp_path)
    text = (tmp_path / "metadata.csv").read_bytes()
    (tmp_path / "metadata.csv").write_bytes(text.replace(b"line 1", b"lime 1"))
    assert source.text(0) == "line 0 more"
    with pytest.raises(UserError, match=r"metadata\.csv: changed since the run began"):
        source.text(1)


@pytest.mark.parametrize("header", ["image,text", "file,label", ""])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
def test_columns_are_named_where_the_right_ones_are_missing(name: str, header: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(an_image())
    if name == "metadata.csv":
        (tmp_path / name).write_text(f"{header}\na.png,a\n")
    elif header:
        write_parquet(tmp_path, [dict.fromkeys(header.split(","), "a.png")])
    else:
        pytest.skip("a parquet file has columns")
    got = header.replace(",", ", ") or "none"
    with pytest.raises(UserError, match=f"its columns are {got}; expected file_name and one of text, caption, prompt"):
        open_source(str(tmp_path))


def test_two_metadata_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(an_image())
    write_csv(tmp_path, [{"file_name": "a.png", "text": "a"}])
    write_metadata(tmp_path, [{"file_name": "a.png", "text": "b"}])
    with pytest.raises(UserError, match=r"it has metadata\.csv and metadata\.jsonl; expected one of them"):
        open_source(str(tmp_path))


def test_the_name_of_a_metadata_file_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(an_image())
    (tmp_path / "Metadata.CSV").write_text("file_name,text\na.png,a\n")
    source = as_files(tmp_path)
    assert (source.kind, source.text(0), source.passed) == ("metadata.csv", "a", ())


def test_absolute_names_into_the_folder_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    for i in range(3):
        (tmp_path / "set" / "sub" / f"{i}.png").write_bytes(an_image(shade=i))
    names = [tmp_path / "set/sub/0.png", tmp_path / "link/sub/1.png", "sub/../sub/2.png"]
    write_metadata(tmp_path / "set", [{"file_name": str(name), "text": "x"} for name in names])
    monkeypatch.chdir(tmp_path)
    for path, count in ((tmp_path / "set", 2), (tmp_path / "link", 3), ("./set", 2), ("link/.", 3)):
        source = as_files(path)
        assert [source.key(i) for i in range(len(source))] == [
            f"sub/{i}.png" for i in (0, 1, 2) if count == 3 or i != 1
        ]
        assert {bad.reason for bad in source.bad} <= {"path leaves the folder"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sub\\a.png", "no such file: its name has backslashes, expected / between folders"),
        ("C:\\set\\a.png", "no such file: its name has backslashes, expected / between folders"),
        ("Sub/a.png", "no such file: there is one in another case of letters"),
        ("sub/A.png", "no such file: there is one in another case of letters"),
        ("sub/É.PNG", "no such file: there is one in another case of letters"),
        ("sub/b.png", "no such file"),
        ("other/a.png", "no such file"),
        ("../set/sub/a.png", "path leaves the folder"),
        ("/a.png", "path leaves the folder"),
    ],
)
def test_a_name_that_finds_no_file_says_why(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.png").write_bytes(an_image())
    (tmp_path / "sub" / unicodedata.normalize("NFD", "é.png")).write_bytes(an_image())
    write_metadata(tmp_path, [{"file_name": "sub/a.png", "text": "a"}, {"file_name": name, "text": "b"}])
    assert list(reasons(as_files(tmp_path)).values()) == [reason]
    write_metadata(tmp_path, [{"file_name": name, "text": "b"}])
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path))
    if reason.startswith("no such"):
        assert f"(the first: {name}: {reason})" in str(caught.value)


@pytest.mark.parametrize(("row", "disk"), [("a.jpg", "a.JPG"), ("a.JPG", "a.jpg"), ("sub/é.PNG", "sub/é.png")])
def test_the_case_of_a_suffix_and_the_unicode_form_find_the_file(row: str, disk: str, tmp_path: Path) -> None:
    path = tmp_path / unicodedata.normalize("NFD", disk)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(an_image())
    write_metadata(tmp_path, [{"file_name": row, "text": "x"}])
    source = as_files(tmp_path)
    assert source.key(0) == row
    assert source.image(0, (8, 8)).shape == (8, 8, 3)
    assert not source.passed


def test_one_name_for_two_files_is_not_guessed(tmp_path: Path) -> None:
    for name in ("a.JPG", "a.Jpg", "b.png"):
        (tmp_path / name).write_bytes(an_image())
    rows: list[object] = [{"file_name": "a.jpg", "text": "x"}, {"file_name": "b.png", "text": "y"}]
    assert "a.jpg" in reasons(as_files(write_metadata(tmp_path, rows)))
