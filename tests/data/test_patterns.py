"""Many shards by one name: braces and globs."""

from pathlib import Path

import pytest

from data.test_sources import an_image, as_files, reasons, write_tar
from pixelgrow.data.sources.patterns import MOST, paths_in
from pixelgrow.errors import UserError


def shard(path: Path, *names: str) -> Path:
    return write_tar(path, [(f"{n}.{s}", d) for n in names for s, d in (("png", an_image()), ("txt", n.encode()))])


def test_braces_count_with_zeros_and_list(tmp_path: Path) -> None:
    assert paths_in("x{08..11}.tar") == ["x08.tar", "x09.tar", "x10.tar", "x11.tar"]
    assert paths_in("{b,a}/{0..1}.tar") == ["b/0.tar", "b/1.tar", "a/0.tar", "a/1.tar"]
    names = paths_in("data/{00000..99999}.tar")
    assert (len(names), names[0], names[-1]) == (100_000, "data/00000.tar", "data/99999.tar")
    for name in ("10.tar", "9.tar", "notes.txt"):
        (tmp_path / name).touch()
    assert paths_in(f"{tmp_path}/*.tar") == [f"{tmp_path}/10.tar", f"{tmp_path}/9.tar"]
    assert paths_in(f"{tmp_path}/{{9,1*,9}}.tar") == [f"{tmp_path}/9.tar", f"{tmp_path}/10.tar"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{9..0}.tar", "counts down"),
        (f"{{0..{MOST}}}.tar", "stands for 1,000,001 names"),
        ("{0..999}{0..1000}.tar", "stands for 1,001,000 names"),
        ("{}.tar", "got {}, expected {00..12} or {one,other}"),
        ("nowhere/*.tar", "no file has such a name"),
    ],
)
def test_a_pattern_that_means_nothing_is_one_line(pattern: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        paths_in(pattern)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_pattern_is_a_source_in_its_own_order(tmp_path: Path) -> None:
    for folder, number in (("b", 0), ("a", 0), ("a", 1)):
        shard(tmp_path / folder / f"{number}.tar", f"{folder}{number}")
    source = as_files(tmp_path / "{b,a}" / "{0..1}.tar")
    assert [source.text(i) for i in range(len(source))] == ["b0", "a0", "a1"]
    assert source.key(0) == "b/0.tar/b0.png"
    assert reasons(source) == {"b/1.tar": "shard: no such file; about 1 samples are lost (an estimate)"}
    assert (source.image(1, (8, 8)) == (0, 90, 200)).all()
    assert len(as_files(tmp_path / "*" / "0.tar")) == 2
    assert len(as_files(tmp_path / "a" / "*.tar")) == len(as_files(tmp_path / "a")) == 2


def test_a_pattern_is_for_shards(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(an_image())
    with pytest.raises(UserError, match=r"stands for .*a\.png; expected plain \.tar files"):
        as_files(tmp_path / "*.png")
