"""Streamed shards: the samples of the same shards in a folder, each fetched as it is needed, and no fault unsaid."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.test_index import OLD, all_of
from data.test_sources import an_image, reasons, write_tar
from pixelgrow.data import Batch, Loader, heldout_split, open_source
from pixelgrow.data.sources import keeping, remote
from pixelgrow.data.sources.base import Source
from pixelgrow.data.sources.keeping import FOLDER
from pixelgrow.data.sources.latents import Latents
from pixelgrow.data.sources.streamed import StreamedShards
from pixelgrow.errors import UserError
from servers import Files, s3_server, serving

SHARDS = 8
NAMES = "set/{00..07}.tar"
STEP = 16


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", [0.0, 0.0, 0.0])
    monkeypatch.setattr(keeping, "_MOST", 1)  # to start processes takes longer than to scan so little


def write_shards(folder: Path, shards: int = SHARDS) -> Path:
    number = 0
    for shard in range(shards):
        members = []
        for _ in range(4 + shard % 3):
            members += [(f"{number:04}.png", an_image(40, 32, number)), (f"{number:04}.txt", b"number %d" % number)]
            number += 1
        os.utime(write_tar(folder / f"{shard:02}.tar", members), (OLD, OLD))
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Files]:
    write_shards(tmp_path / "web" / "set")
    with serving(tmp_path / "web") as files:
        yield files


def opened(server: Files, **settings: object) -> StreamedShards:
    source = open_source({"source": f"{server.address}/{NAMES}", "lanes": 4, "window": 2, **settings})
    assert isinstance(source, StreamedShards)
    return source


def here(server: Files) -> object:
    return open_source({"source": str(server.root / "set"), "lanes": 4, "window": 2})


def a_loader(source: object, batch: int = STEP, **settings: object) -> Loader:
    return a_loader_of(heldout_split(source, at_least=4)[0], batch, **settings)  # type: ignore[arg-type]


def a_loader_of(train: Source, batch: int = STEP, **settings: object) -> Loader:
    size = (8, 8) if isinstance(train, Latents) else (16, 16)
    return Loader(train, size=size, batch=batch, group=STEP, seed=5, **settings)  # type: ignore[arg-type]


def some(loader: Loader, steps: int = 4, rank: int = 0, size: int = 1) -> list[Batch]:
    """The micro-batches that process `rank` of `size` takes of the first steps."""
    batches = loader.batches(rank * loader.batch, size * loader.batch)
    found = [next(batches) for _ in range(steps * STEP // loader.batch // size)]
    batches.close()
    return found


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a.text == b.text and a.index.equal(b.index) and a.image.equal(b.image) for a, b in pairs)


def forget(tmp_path: Path) -> None:
    """Remove the shards that are kept here."""
    for file in (tmp_path / "cache" / "pixelgrow" / "shards").iterdir():
        file.unlink()


# --- the same samples -------------------------------------------------------------------------------------------------


def test_streamed_is_what_the_folder_has(server: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_MOST", 3)
    found = all_of(opened(server))
    assert found == all_of(here(server))  # type: ignore[arg-type]
    assert len(found["keys"]) == 39  # type: ignore[arg-type]
    one = open_source(f"{server.address}/set/03.tar")
    assert all_of(one) == all_of(open_source(str(server.root / "set" / "03.tar")))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_the_same_and_each_shard_is_fetched_once(server: Files, tmp_path: Path, workers: int) -> None:
    source = opened(server)
    forget(tmp_path)
    server.asked.clear()
    found = some(a_loader(source, workers=workers))
    assert same(found, some(a_loader(here(server))))
    assert set(server.whole().values()) == {1} and not server.parts()


@pytest.mark.parametrize("size", [2, 4])
def test_a_process_fetches_the_shards_of_its_own_lanes(
    server: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Processes with a cache each; nothing but the samples that they see says what they need."""
    local = a_loader(here(server), batch=STEP // size)
    opened(server)
    index = next((tmp_path / "cache").rglob("*.index"))
    for rank in range(size):
        home = tmp_path / str(rank) / "pixelgrow" / index.parent.relative_to(tmp_path / "cache" / "pixelgrow")
        home.mkdir(parents=True)
        (home / index.name).write_bytes(index.read_bytes())
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(rank)))
        server.asked.clear()
        found = some(a_loader(opened(server), batch=STEP // size), 1, rank, size)
        assert same(found, some(local, 1, rank, size))
        seen = set()
        for step in range(10):  # this epoch and the next
            raw = local.load(step * STEP + rank * local.batch, decode=False)
            seen |= {f"set/{local.sources[0].key(int(item)).partition('/')[0]}" for _, item in raw.origin}
            if step == 0:
                first = set(seen)
        assert first <= set(server.whole()) <= seen and not server.parts()
        assert max(server.whole().values()) == 1
        if size == 4:
            assert len(server.whole()) < SHARDS


def test_a_source_goes_to_another_process(server: Files) -> None:
    source = opened(server)
    list(map(source.read, range(3)))
    other = pickle.loads(pickle.dumps(source))  # noqa: S301  # of our own making
    assert other.read(5) == source.read(5)


def test_what_is_not_in_the_lanes_is_read_by_its_bytes(server: Files, tmp_path: Path) -> None:
    source = opened(server)
    held = heldout_split(source, at_least=4)[1]
    forget(tmp_path)
    server.asked.clear()
    images = [held.image(i, (16, 16)) for i in range(len(held))]
    assert server.parts().total() == len(held) and not server.whole()
    assert [source.read(i) for i in range(3)] == [here(server).read(i) for i in range(3)]  # type: ignore[attr-defined]
    assert len(images) == len(held)


def test_a_server_that_knows_no_ranges(server: Files, tmp_path: Path) -> None:
    source = opened(server)
    forget(tmp_path)
    server.ranges = False
    server.asked.clear()
    assert [source.read(i) for i in range(8)] == [here(server).read(i) for i in range(8)]  # type: ignore[attr-defined]
    assert server.whole().total() <= 4


def test_latents_are_made_of_whole_shards(server: Files, tmp_path: Path) -> None:
    class Mean:
        factor, fingerprint = 4, "mean"

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(images, 4)[:, :1]

    streamed, local = opened(server), here(server)
    forget(tmp_path)
    server.asked.clear()
    made = []
    for name, source in (("a", streamed), ("b", local)):
        latents = Latents(heldout_split(source, at_least=4)[0], Mean(), 1, tmp_path / name)  # type: ignore[arg-type]
        latents.make((8, 8))
        made.append(a_loader_of(latents))
    assert set(server.whole().values()) == {1} and len(server.whole()) == SHARDS and not server.parts()
    assert same(some(made[0]), some(made[1]))


def test_what_makes_training_fetch_more_than_it_must_is_said(server: Files) -> None:
    source = opened(server)
    assert source.advice(STEP, 2, 0.5) == source.advice(STEP, 8, 1.0) == []
    (shared,) = source.advice(STEP, 8, 0.5)
    assert shared.endswith(
        "4 lanes for 8 micro-batches: several machines fetch the same shards; in a new run, lanes: 8 avoids it"
    )
    source = opened(server, cache=0.0001)  # for ten of the shards; four lanes of one window and the next have 16
    (small,) = source.advice(STEP, 4, 1.0)
    assert "0.0001 GB (cache:) have no room for the shards in use and those that come next, up to 0.000" in small
    assert source.advice(STEP, 4, 0.25) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_for_fewer_shards_than_are_in_use_changes_nothing(server: Files, tmp_path: Path, workers: int) -> None:
    def kept() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "cache" / "pixelgrow" / "shards").glob("*.tar"))

    source = opened(server, cache=0.00003)
    assert 0 < kept() <= 30_000
    assert same(some(a_loader(source, workers=workers), 6), some(a_loader(here(server)), 6))
    assert 0 < kept() <= 30_000


# --- the index --------------------------------------------------------------------------------------------------------


def test_a_start_asks_the_server_for_nothing_once_there_is_an_index(server: Files, tmp_path: Path) -> None:
    found = all_of(opened(server))
    assert server.whole() == {f"set/{shard:02}.tar": 1 for shard in range(SHARDS)} | {f"set/{FOLDER}/shards.index": 1}
    server.asked.clear()
    source = opened(server)
    assert len(source) == 39 and not server.asked
    assert all_of(source) == found


def test_an_index_beside_the_shards_is_used(server: Files) -> None:
    found = all_of(here(server))  # type: ignore[arg-type]
    assert (server.root / "set" / FOLDER / "shards.index").exists()
    source = opened(server)
    assert server.whole() == {f"set/{FOLDER}/shards.index": 1}
    assert all_of(source) == found
    server.asked.clear()
    opened(server)
    assert not server.asked


def test_an_index_beside_the_shards_spares_those_that_it_has(server: Files) -> None:
    late = server.root / "set" / "05.tar"
    late.rename(server.root / "05.tar")
    here(server)
    (server.root / "05.tar").rename(late)
    source = opened(server)
    assert server.whole() == {f"set/{FOLDER}/shards.index": 1, "set/05.tar": 1}
    assert all_of(source) == all_of(here(server))  # type: ignore[arg-type]


def test_a_damaged_index_beside_the_shards_is_said(server: Files, caplog: pytest.LogCaptureFixture) -> None:
    (server.root / "set" / FOLDER).mkdir()
    (server.root / "set" / FOLDER / "shards.index").write_bytes(b"no index")
    assert len(opened(server)) == 39
    assert "is not used: it is no index; it is written anew" in caplog.text


def test_a_pass_that_was_interrupted_goes_on(server: Files) -> None:
    server.always["set/03.tar"] = 503
    with pytest.raises(UserError, match=r"03.tar: cannot be read, after 4 tries .*503.*; run the same command again"):
        opened(server)
    server.always.clear()
    server.asked.clear()
    source = opened(server)
    assert not {"set/00.tar", "set/01.tar", "set/02.tar"} & set(server.whole())
    assert all_of(source) == all_of(here(server))  # type: ignore[arg-type]


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "slow", 503, 429, "cut twice"])
def test_faults_that_pass_change_nothing(server: Files, tmp_path: Path, fault: str | int) -> None:
    faults: list[str | int] = ["cut", "cut"] if fault == "cut twice" else [fault]
    server.faults = {f"set/{shard:02}.tar": list(faults) for shard in (1, 4, 6)}
    source = opened(server)
    assert all_of(source) == all_of(here(server))  # type: ignore[arg-type]
    forget(tmp_path)
    server.faults = {f"set/{shard:02}.tar": list(faults) for shard in range(SHARDS)}
    found = some(a_loader(source, workers=2))
    assert same(found, some(a_loader(here(server))))
    assert not any(server.faults.values())


def test_fewer_bytes_than_a_library_says_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        def get_file(self, url: str, path: str, callback: Any) -> None:
            callback.set_size(10)
            Path(path).write_bytes(b"12345")

        def cat_file(self, url: str, start: int, end: int) -> bytes:
            return b"12345"

    monkeypatch.setattr(remote, "_file_system", lambda url: Short())
    for once in (lambda: remote.fetch("x://a", tmp_path / "a"), lambda: remote.read("x://a", 0, 10)):
        with pytest.raises(UserError, match=r"x://a: cannot be read, after 4 tries .5 of 10 bytes came."):
            once()
    assert remote.read("x://a", 0, 5) == b"12345"


def test_a_shard_that_is_not_there_is_a_bad_file_and_looked_for_again(server: Files) -> None:
    lost = server.root / "set" / "03.tar"
    lost.rename(server.root / "03.tar")
    source = opened(server)
    assert reasons(source) == {"03.tar": "shard: no such file; about 5 samples are lost (an estimate)"}
    assert source.files == len(source) + 5
    local = open_source({"source": f"{server.root}/{NAMES}", "lanes": 4, "window": 2})
    assert all_of(source) == all_of(local)  # type: ignore[arg-type]
    assert same(some(a_loader(source, bad_limit=0.5)), some(a_loader(local, bad_limit=0.5)))
    (server.root / "03.tar").rename(lost)
    server.asked.clear()
    assert len(opened(server)) == 39
    assert server.whole() == {"set/03.tar": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_goes_later_is_counted_and_replaced(server: Files, tmp_path: Path, workers: int) -> None:
    source = opened(server)
    forget(tmp_path)
    (server.root / "set" / "03.tar").unlink()
    loader = a_loader(source, bad_limit=0.5, bad_path=tmp_path / "bad.jsonl", workers=workers)
    found = some(loader, 6)
    lost = {f"03.tar/{number:04}.png" for number in range(15, 19)}
    assert {bad.reason for bad in loader.bad.files()} == {"its shard is gone: no such file"}
    assert {bad.key for bad in loader.bad.files()} <= lost and len(loader.bad) >= 3
    assert not {f"number {n}" for n in range(15, 19)} & {text for batch in found for text in batch.text}
    again = a_loader(opened(server), bad_limit=0.5)
    assert same(some(again, 6), found)
    with pytest.raises(UserError, match=r"samples are bad or lost, the limit is 0.01 of them"):
        some(a_loader(opened(server)), 6)


def test_a_server_that_stays_away_stops_the_run_in_one_line(server: Files, tmp_path: Path) -> None:
    source = opened(server)
    forget(tmp_path)
    server.always = {f"set/{shard:02}.tar": 503 for shard in range(SHARDS)}
    with pytest.raises(UserError, match=r"\.tar: cannot be read, after 4 tries .*503.*") as error:
        some(a_loader(source))
    assert "\n" not in str(error.value)


def test_another_shard_in_its_place_is_refused(server: Files, tmp_path: Path) -> None:
    source = opened(server)
    forget(tmp_path)
    write_tar(server.root / "set" / "02.tar", [("0010.png", an_image()), ("0010.txt", b"number 10")])
    words = r"02.tar: has [\d,]+ bytes, and had [\d,]+ when its index was made: put it back as it was, or delete .*"
    with pytest.raises(UserError, match=words):
        some(a_loader(source), 6)


def test_other_images_in_a_shard_of_the_same_size_are_refused(server: Files, tmp_path: Path) -> None:
    source = opened(server)
    forget(tmp_path)
    path = server.root / "set" / "02.tar"
    first, second = an_image(40, 32, 10), an_image(40, 32, 11)
    assert len(first) == len(second)
    path.write_bytes(path.read_bytes().replace(first, second))
    with pytest.raises(UserError, match=r"02.tar: changed since the run began .another image in the place of"):
        some(a_loader(source), 6)


@pytest.mark.parametrize("how", ["scanned", "beside"])
def test_shards_that_were_kept_from_before_they_changed_are_fetched_anew(
    server: Files, tmp_path: Path, how: str
) -> None:
    opened(server)
    path = server.root / "set" / "02.tar"
    changed = path.read_bytes().replace(b"number 1", b"letter 1")
    path.write_bytes(changed.replace(an_image(40, 32, 10), an_image(40, 32, 99)))
    os.utime(path, (OLD + 1, OLD + 1))
    if how == "beside":
        here(server)
    next((tmp_path / "cache").rglob("*.index")).unlink()
    source = opened(server)
    local = here(server)
    assert same(some(a_loader(source), 6), some(a_loader(local), 6))
    assert [source.read(i) for i in range(len(source))] == [local.read(i) for i in range(39)]  # type: ignore[attr-defined]
    assert "letter 12" in [source.text(i) for i in range(len(source))]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("{server}/secret/{{0..3}}.tar", "/secret/0.tar: the server refuses it .status 403.: check the address, and"),
        ("{server}/bad/0.tar", "/bad/0.tar: the server answers with status 400: check the address"),
        ("{server}/set/none.tar", "none of its 1 files is usable .first: none.tar: shard: no such file"),
        ("{server}/set/0.zip", "0.zip: expected plain .tar files: https://host/shards-{0000..0999}.tar"),
        ("{server}/set/", "expected plain .tar files"),
        ("{server}/set/{{0..2}}.jpg", "stands for .*/0.jpg; expected plain .tar files"),
        (
            "https://host.invalid/{{0..3}}.tar",
            "3}.tar: there is no host of that name: check the address, and the",
        ),
        ("nonsense://host/0.tar", "Protocol not known: nonsense; expected https://, s3:// or another protocol"),
        ("{server}/gz/0.tar", "/gz/0.tar: a gzip archive; expected a plain .tar: unpack it"),
    ],
)
def test_mistakes_are_one_line(server: Files, url: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **settings: Any) -> Any:
        if host == "host.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return asked(host, *args, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    server.always = {f"secret/{n}.tar": 403 for n in range(4)} | {"bad/0.tar": 400}
    (server.root / "gz").mkdir()
    (server.root / "gz" / "0.tar").write_bytes(gzip.compress((server.root / "set" / "00.tar").read_bytes()))
    with pytest.raises(UserError, match=words) as error:
        open_source(url.format(server=server.address))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["fsspec", "aiohttp"])
def test_what_must_be_installed_is_said(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fsspec.core", raising=False)
    with pytest.raises(UserError, match=rf"0.tar: .*{module}.*: pip install 'pixelgrow\[stream\]'"):
        open_source("http://127.0.0.1:1/0.tar")


def test_a_url_is_of_shards(server: Files) -> None:
    with pytest.raises(UserError, match="kind is 'folder', and a URL is of tar shards; drop it"):
        open_source({"source": f"{server.address}/{NAMES}", "kind": "folder"})


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_shards_on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    folder = write_shards(tmp_path / "set")
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    local = all_of(open_source({"source": str(folder), "lanes": 4, "window": 2}))  # type: ignore[arg-type]
    with s3_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for path in sorted(folder.glob("*.tar")):
            client.put_object(Bucket="shards", Key=f"set/{path.name}", Body=path.read_bytes())
        source = open_source({"source": "s3://shards/set/{00..07}.tar", "lanes": 4, "window": 2})
        assert all_of(source) == local  # type: ignore[arg-type]
        every = open_source({"source": "s3://shards/set/*.tar", "lanes": 4, "window": 2})
        assert all_of(every) == local  # type: ignore[arg-type]
        forget(tmp_path)
        plain = open_source({"source": str(folder), "lanes": 4, "window": 2})
        assert same(some(a_loader(source, workers=2)), some(a_loader(plain)))
        with pytest.raises(UserError, match="no file has such a name; expected tar shards"):
            open_source("s3://shards/other/*.tar")
        with pytest.raises(UserError, match=r"none of its 1 files is usable .first: 0.tar: shard: no such file"):
            open_source("s3://shards/other/0.tar")
