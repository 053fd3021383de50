"""The ring of shards: within its size, never without one in use, each fetched once, whatever is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pixelgrow.data.sources.ring import Ring

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return Ring(tmp_path / "shards", 100)


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    """Those to be closed at the end."""
    found: list[int] = []
    yield found
    for fd in found:
        os.close(fd)


def take(ring: Ring, name: str, size: int = 40, ahead: bool = False) -> int | None:
    return ring.take(name, lambda part: part.write_bytes(name.encode() * size) and None, size, ahead)


def passed(ring: Ring, name: str) -> None:
    """Take a file and let it go."""
    fd = take(ring, name)
    assert fd is not None and os.pread(fd, 3, 0) == name.encode() * 3
    os.close(fd)
    time.sleep(0.002)  # times of use differ


def kept(ring: Ring) -> set[str]:
    return {path.name for path in ring.folder.iterdir()} - {"lock"}


def test_what_was_used_longest_ago_goes_first(ring: Ring) -> None:
    passed(ring, "a")
    passed(ring, "b")
    passed(ring, "a")  # used again, not fetched
    passed(ring, "c")
    assert kept(ring) == {"a.tar", "c.tar"}


def test_what_is_in_use_stays_and_what_is_needed_is_fetched_all_the_same(ring: Ring, descriptors: list[int]) -> None:
    for name in "abc":
        descriptors.append(take(ring, name) or -1)
    assert kept(ring) == {"a.tar", "b.tar", "c.tar"}
    assert take(ring, "d", ahead=True) is None and len(kept(ring)) == 3
    os.close(descriptors.pop(1))
    passed(ring, "e")
    assert kept(ring) == {"a.tar", "c.tar", "e.tar"}
    assert [os.pread(fd, 1, 39) for fd in descriptors] == [b"a", b"c"]


def test_what_another_fetched_is_in_use_by_who_found_it(ring: Ring, descriptors: list[int]) -> None:
    first = take(ring, "a")
    descriptors.append(take(ring, "a") or -1)
    assert first is not None
    os.close(first)
    passed(ring, "b")
    passed(ring, "c")
    assert kept(ring) == {"a.tar", "c.tar"}


def test_a_fetch_that_fails_leaves_nothing(ring: Ring) -> None:
    def fails(part: Path) -> None:
        part.write_bytes(b"half")
        raise ValueError

    with pytest.raises(ValueError):
        ring.take("a", fails)
    assert not kept(ring)


def test_another_size_is_another_file(ring: Ring) -> None:
    passed(ring, "a")
    fd = take(ring, "a", 30)
    assert fd is not None and os.fstat(fd).st_size == 30
    os.close(fd)


def _hold(ring: Ring, name: str, pipe: object) -> None:
    def slow(part: Path) -> None:
        part.write_bytes(b"x" * 20)
        pipe.send("half")  # type: ignore[attr-defined]
        time.sleep(0.3)
        part.write_bytes(b"x" * 40)

    fd = ring.take(name, slow, 40)
    pipe.send(fd)  # type: ignore[attr-defined]
    time.sleep(60)


def test_processes_wait_for_the_one_that_fetches_and_keep_what_another_uses(ring: Ring) -> None:
    ours, theirs = FORK.Pipe()
    other = FORK.Process(target=_hold, args=(ring, "a", theirs))
    other.start()
    assert ours.recv() == "half"
    assert take(ring, "a", ahead=True) is None
    passed(ring, "b")
    passed(ring, "c")  # the part counts with the size that it will have, and is not removed
    assert kept(ring) & {"a.40.part", "a.tar"} and "b.tar" not in kept(ring)

    def never(part: Path) -> None:
        raise AssertionError

    fd = ring.take("a", never, 40)
    assert fd is not None and os.pread(fd, 40, 0) == b"x" * 40
    os.close(fd)
    ours.recv()
    passed(ring, "d")
    passed(ring, "e")
    assert kept(ring) == {"a.tar", "e.tar"}
    other.kill()
    other.join()
    passed(ring, "f")
    assert kept(ring) == {"e.tar", "f.tar"}


def test_a_part_of_a_process_that_was_killed_is_fetched_anew_and_goes(ring: Ring) -> None:
    for name in "ab":
        ours, theirs = FORK.Pipe()
        other = FORK.Process(target=_hold, args=(ring, name, theirs))
        other.start()
        ours.recv()
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert kept(ring) == {"a.40.part", "b.40.part"}
    passed(ring, "a")
    assert kept(ring) == {"a.tar", "b.40.part"}
    passed(ring, "c")
    assert kept(ring) == {"a.tar", "c.tar"}


def test_threads_of_one_process_fetch_a_file_once(ring: Ring) -> None:
    fetched: list[str] = []

    def fetch(part: Path) -> None:
        fetched.append(part.name)
        time.sleep(0.1)
        part.write_bytes(b"x" * 40)

    def one() -> None:
        fd = ring.take("a", fetch, 40)
        assert fd is not None
        os.close(fd)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["a.40.part"]
