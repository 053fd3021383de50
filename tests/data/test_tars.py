"""Tar shards: what is in them, what is lost where one is damaged, and archives that are none."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from data.test_sources import an_image, as_files, passed, reasons, write_tar
from pixelgrow.data import open_source
from pixelgrow.data.badfiles import BadFiles
from pixelgrow.data.inspect import inspect_source
from pixelgrow.data.sources.index import BESIDE
from pixelgrow.data.sources.shards import REPEATED
from pixelgrow.data.sources.tars import BELOW, TarShards
from pixelgrow.errors import UserError


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_shards_as_img2dataset_writes_them(tmp_path: Path, format: int) -> None:
    long = "k" * 80 + "/" + "l" * 80 if format == tarfile.USTAR_FORMAT else "ü" * 150
    for shard in range(2):
        members = []
        for i in range(3):
            key = long if i == 2 else f"{shard:05}{i:04}"
            members.append((f"{key}.jpg", an_image(40, 50, i)))
            if shard == 0:
                members.append((f"{key}.txt", f"text {i}".encode()))
            members.append((f"{key}.json", json.dumps({"caption": f"json {shard} {i}", "width": 1}).encode()))
        write_tar(tmp_path / f"{shard:05}.tar", members, format)
    (tmp_path / "00000_stats.json").write_text("{}")
    source = as_files(tmp_path)
    assert isinstance(source, TarShards)
    assert [source.text(i) for i in range(6)] == ["text 0", "text 1", "text 2", "json 1 0", "json 1 1", "json 1 2"]
    assert source.key(3) == "00001.tar/000010000.jpg"
    assert source.key(2) == f"00000.tar/{long}.jpg"
    assert source.size(0) == (50, 40)
    assert (source.image(4, (8, 8)) == (1, 90, 200)).all()
    assert len(as_files(tmp_path / "00001.tar")) == 3


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_claims_the_moon_ends_its_shard(tmp_path: Path, kind: bytes) -> None:
    whole = write_tar(tmp_path / "x.tar", [("a.jpg", an_image()), ("a.txt", b"a")]).read_bytes()
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 2**62
    end = whole.rstrip(b"\0")
    end += bytes(-len(end) % 512)
    (tmp_path / "x.tar").write_bytes(end + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    source = as_files(tmp_path / "x.tar")
    assert [source.text(i) for i in range(len(source))] == ["a"]
    assert reasons(source) == {
        "x.tar": f"shard: a header that claims {2**62} bytes; the number of lost samples is unknown"
    }


def test_what_can_be_wrong_in_a_shard(tmp_path: Path) -> None:
    good = [("ok.jpg", an_image()), ("ok.txt", b"fine")]
    bad = [
        *(("nocaption.jpg", an_image()), ("noimage.txt", b"text"), ("gif.gif", b"GIF89a"), ("gif.txt", b"text")),
        *(("two.jpg", an_image()), ("two.png", an_image()), ("two.txt", b"text")),
        *(("latin.jpg", an_image()), ("latin.txt", "ü".encode("latin-1"))),
        *(("notjson.jpg", an_image()), ("notjson.json", b"{")),
        *(("null.jpg", an_image()), ("null.json", b'{"caption": null, "text": "zz"}')),
        *(("list.jpg", an_image()), ("list.json", b"[]")),
        *(("nokey.jpg", an_image()), ("nokey.json", b'{"url": ""}')),
        *(("broken.jpg", b"\xff\xd8\xff"), ("broken.txt", b"text")),
        *(("empty.jpg", an_image()), ("empty.txt", b" \n")),
    ]
    write_tar(tmp_path / "a.tar", good + bad)
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(os.urandom(2000))
    whole = write_tar(tmp_path / "d.tar", [*good, ("late.jpg", an_image() * 9), ("late.txt", b"text")]).read_bytes()
    at = whole.index(b"late.jpg")
    (tmp_path / "d.tar").write_bytes(whole[: at + 700])
    (tmp_path / "e.tar").write_bytes(whole[:at] + b"junk" * 256 + whole[at:])
    (tmp_path / "f.tar").mkdir()
    source = as_files(tmp_path)
    keys = ["a.tar/ok.jpg", "a.tar/two.jpg", "a.tar/two.png", "a.tar/null.jpg", "d.tar/ok.jpg", "e.tar/ok.jpg"]
    assert [source.key(i) for i in range(len(source))] == keys
    assert source.text(3) == "zz"
    found = reasons(source)
    expected = {
        "a.tar/nocaption.jpg": "no caption",
        "a.tar/noimage.txt": "caption without an image",
        "a.tar/gif.gif": "a GIF file, not a JPEG",
        "a.tar/latin.jpg": "caption is not UTF-8",
        "a.tar/notjson.jpg": "caption file is not JSON",
        "a.tar/list.jpg": "caption file is not a JSON object",
        "a.tar/nokey.jpg": "no caption",
        "a.tar/broken.jpg": "not a JPEG",
        "a.tar/empty.jpg": "empty caption",
        "b.tar": "shard: empty file",
        "c.tar": "shard: ",
        "d.tar": "shard: ends within late.jpg",
        "e.tar": "shard: damaged from byte",
        "f.tar": "shard: is a directory",
    }
    assert found.keys() == expected.keys()
    for key, reason in expected.items():
        assert found[key].startswith(reason), (key, found[key])
    assert source.files == len(source) + sum(bad.samples for bad in source.bad)


def shard(path: Path, count: int = 20, first: int = 0) -> bytes:
    members = []
    for i in range(first, first + count):
        members += [(f"{i:03}.png", an_image(shade=i)), (f"{i:03}.txt", f"number {i}".encode())]
    return write_tar(path, members).read_bytes()


def offset_of(path: Path, member: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(member).offset


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("cut", ["between samples", "between members", "one block of the end", "no block of the end"])
def test_a_shard_without_the_mark_of_its_end_is_listed_and_used(cut: str, format: int, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    members = [m for i in range(8) for m in ((f"{i}.png", an_image(shade=i)), (f"{i}.txt", b"caption"))]
    whole = write_tar(path, members, format).read_bytes()
    end = len(whole.rstrip(b"\0")) + -len(whole.rstrip(b"\0")) % 512
    at = {
        "between samples": offset_of(path, "4.png"),
        "between members": offset_of(path, "4.txt"),
        "one block of the end": end + 512,
        "no block of the end": end,
    }[cut]
    path.write_bytes(whole[:at])
    source = as_files(path)
    assert len(source) == (4 if cut.startswith("between") else 8)
    assert "ends without the mark of an end" in reasons(source)["x.tar"]
    assert reasons(source)["x.tar"].endswith("the number of lost samples is unknown")
    path.write_bytes(whole[: end + 1024])
    assert "x.tar" not in reasons(as_files(path))


def test_losses_are_counted_in_samples(tmp_path: Path) -> None:
    """Half of ten shards have a tenth of their samples: 450 of 1,000 in the issue, 90 of 200 here."""
    whole = shard(tmp_path / "set/0.tar")
    at = offset_of(tmp_path / "set/0.tar", "002.png")
    for number in range(10):
        cut = {1: whole[: at + 520], 3: whole[:at], 5: whole[: at + 10], 7: whole[: at + 512], 9: whole[: at + 600]}
        (tmp_path / f"set/{number}.tar").write_bytes(cut.get(number, whole))
    source = as_files(tmp_path / "set")
    assert len(source) == 5 * 20 + 5 * 2
    assert [bad.samples for bad in source.bad] == [18] * 5
    assert source.files == 200
    with pytest.raises(
        UserError, match=r"90 of 200 samples are bad or lost, the limit is 0\.01 .*about 18 samples are lost"
    ):
        BadFiles([source])
    assert "(90 of 200 samples of " in BadFiles([source], 0.5).report()
    found = inspect_source(source, decode=0)
    assert sum(reason.samples for reason in found.reasons()) == 90


def test_what_cannot_be_read_is_estimated_by_its_bytes(tmp_path: Path) -> None:
    whole = bytearray(shard(tmp_path / "x.tar", 40))
    at = offset_of(tmp_path / "x.tar", "010.png")
    whole[at : at + 512] = b"junk" * 128
    (tmp_path / "x.tar").write_bytes(whole)
    source = as_files(tmp_path / "x.tar")
    assert len(source) == 10
    (bad,) = source.bad
    assert bad.reason.startswith(f"shard: damaged from byte {at} on; about ")
    assert 28 <= bad.samples <= 31


def test_an_empty_shard_lacks_as_much_as_others_have(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"{number}.tar")
    (tmp_path / "3.tar").write_bytes(b"")
    source = as_files(tmp_path)
    assert [(bad.key, bad.reason, bad.samples) for bad in source.bad] == [
        ("3.tar", "shard: empty file; about 20 samples are lost (an estimate)", 20)
    ]


def test_archives_that_were_joined_are_listed(tmp_path: Path) -> None:
    one = shard(tmp_path / "x.tar")
    two = shard(tmp_path / "y.tar", first=20)
    (tmp_path / "x.tar").write_bytes(one + two)
    source = as_files(tmp_path / "x.tar")
    assert len(source) == 20
    (bad,) = source.bad
    assert "goes on behind the mark of its end" in bad.reason
    assert 19 <= bad.samples <= 21


def test_the_last_of_several_members_with_one_name_counts(tmp_path: Path) -> None:
    members = [("a.png", an_image(20, 20)), ("a.txt", b"old"), ("a.txt", b"new"), ("a.png", an_image(30, 30))]
    source = as_files(write_tar(tmp_path / "x.tar", members))
    assert (source.text(0), source.size(0)) == ("new", (30, 30))
    assert passed(source) == {REPEATED: (2, "a.txt")}


def test_captions_with_several_lines_and_with_json(tmp_path: Path) -> None:
    members = [("a.png", an_image()), ("a.txt", b"one\n\ntwo\r\nde=drei\n")]
    members += [("b.png", an_image()), ("b.json", json.dumps({"prompt": ["x", "y"]}).encode())]
    source = as_files(write_tar(tmp_path / "x.tar", members))
    assert [[w.text for w in source.wordings(i)] for i in range(2)] == [["one", "two"], ["x", "y"]]
    assert source.several


PACK = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz", "x.zip", "x.tar.bz2", "X.TAR.XZ", "x.7z"])
@pytest.mark.parametrize("kind", [*PACK, "zip"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("cut", [False, True])
def test_other_archives_are_refused_by_name(name: str, kind: str, inside: bool, cut: bool, tmp_path: Path) -> None:
    shard(tmp_path / "plain.tar", 2)
    data = (tmp_path / "plain.tar").read_bytes()
    packed = zipped(data) if kind == "zip" else PACK[kind](data)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(packed[: len(packed) // 2] if cut else packed)
    with pytest.raises(UserError, match=rf"{name}.* archive; expected .*unpack it") as caught:
        open_source(str(tmp_path / "set" / name if not inside else tmp_path / "set"))
    assert "\n" not in str(caught.value)


def test_one_compressed_shard_among_plain_ones_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar")
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress(shard(tmp_path / "1.tar")))
    with pytest.raises(UserError, match=r"1\.tar\.gz is a compressed archive"):
        open_source(str(tmp_path))


def test_a_compressed_archive_beside_images_is_passed_over(tmp_path: Path) -> None:
    for key in ("cat/1", "dog/2"):
        (tmp_path / key).parent.mkdir()
        (tmp_path / f"{key}.png").write_bytes(an_image())
    (tmp_path / "backup.tar.gz").write_bytes(b"")
    source = as_files(tmp_path)
    assert source.classes == ("cat", "dog")
    assert [(over.count, over.example) for over in source.passed] == [(1, "backup.tar.gz")]


def test_what_lies_beside_shards_is_counted(tmp_path: Path) -> None:
    shard(tmp_path / "a.TAR")
    shard(tmp_path / "below/b.tar")
    (tmp_path / "view.png").write_bytes(an_image())
    source = as_files(tmp_path)
    assert len(source) == 20
    assert passed(source) == {BESIDE: (1, "view.png"), BELOW: (1, "below/b.tar")}


def test_shards_and_captioned_images_in_one_folder_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "old.tar")
    (tmp_path / "a.png").write_bytes(an_image())
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        UserError, match=r"tar shards \(old\.tar\) and captioned images \(a\.png\).*kind: tar or kind: folder"
    ):
        open_source(str(tmp_path))
    assert len(as_files_of(tmp_path, "tar")) == 20
    assert len(as_files_of(tmp_path, "folder")) == 1


def as_files_of(path: Path, kind: str) -> object:
    return open_source({"source": str(path), "kind": kind})
