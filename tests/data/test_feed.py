"""From workers to the device: what arrives is what was sent, whatever memory it went through."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext

import numpy as np
import pytest
import torch

from pixelgrow.data import feed
from pixelgrow.data.feed import Packet, fed
from pixelgrow.data.workers import Workers

SHAPE = (2, 3, 5)
ToGpu = feed._ToGpu


def made(task: int) -> Packet:
    """A packet of two arrays of different types, and a text; every third task takes a while."""
    time.sleep(0.01 * (task % 3 == 0))
    arrays = {"image": np.full(SHAPE, task % 256, np.uint8), "latent": np.full((3, 7), task / 3, np.float16)}
    return Packet(arrays, f"task {task}")


ROOM = made(0).room


def check(packets: Iterator[tuple[dict[str, torch.Tensor], str]], count: int) -> None:
    """The first packets are those of `made`; all are kept until the end, when their memory was used again."""
    kept = list(itertools.islice(packets, count))
    for task, (tensors, rest) in enumerate(kept):
        want = made(task)
        assert rest == want.rest and tensors.keys() == want.arrays.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor.cpu(), torch.from_numpy(want.arrays[name])), (task, name)


@pytest.mark.parametrize(("workers", "room"), [(0, ROOM), (1, ROOM), (3, ROOM), (2, 0)])
def test_packets_arrive_in_order_and_last(workers: int, room: int) -> None:
    with closing(fed(made, itertools.count(), workers, room)) as packets:
        check(packets, 12)


def test_arrays_go_through_shared_memory_and_not_through_the_pipe() -> None:
    def many(task: int) -> Packet:
        return Packet({"image": np.full(1 << 20, task, np.uint8)})

    with closing(Workers(many, itertools.count(), 2, 1 << 20)) as workers:
        assert workers.memory is not None and len(workers.memory) > 6 << 20
        first = next(workers).arrays["image"]
        start = np.frombuffer(workers.memory, np.uint8).ctypes.data
        assert start <= first.ctypes.data < start + len(workers.memory)
        second = next(workers).arrays["image"]
        time.sleep(0.3)  # both have all tasks that they may work ahead: neither writes where these lie
        assert (first == 0).all() and (second == 1).all()


def test_more_than_the_room_is_no_silent_copy() -> None:
    with closing(Workers(made, itertools.count(), 1, 8)) as workers:
        assert next(workers).rest == "task 0"  # there is some slack

    def large(task: int) -> Packet:
        return Packet({"image": np.zeros(1 << 16, np.uint8)})

    with closing(Workers(large, itertools.count(), 1, 8)) as workers, pytest.raises(RuntimeError, match="has room for"):
        next(workers)
    assert not multiprocessing.active_children()


def test_the_next_packet_is_sent_before_one_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Watched(feed._ToCpu):
        def wait(self) -> None:
            events.append("wait")

        def send(self, arrays):  # type: ignore[no-untyped-def]
            events.append(f"send {int(arrays['image'].flat[0])}")
            return super().send(arrays)

    monkeypatch.setattr(feed, "_ToCpu", Watched)
    monkeypatch.setattr(Workers, "ready", lambda self: True)
    with closing(fed(made, itertools.count(), 2, ROOM)) as packets:
        for task in range(4):
            next(packets)
            events.append(f"take {task}")
    sent = ["wait", "send 0", "wait", "send 1", "take 0", "wait", "send 2", "take 1", "wait", "send 3", "take 2"]
    assert events[: len(sent)] == sent


def test_memory_of_copies_under_way_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended GPU: the copy of a packet has ended before the packet that goes into its memory is asked for."""
    done: list[str] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            done.append(f"waited for {self.number}")

    class Stream:
        copies = 0

        def record_event(self) -> Event:
            self.copies += 1
            return Event(self.copies - 1)

        def wait_event(self, event: Event) -> None:
            done.append(f"queued after {event.number}")

        def synchronize(self) -> None:
            done.append("waited for all")

    class Runtime:
        def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
            done.append("pinned")
            return 0

        def cudaHostUnregister(self, start: int) -> int:
            done.append("not pinned")
            return 0

    streams = {"Stream": lambda device: Stream(), "stream": nullcontext, "current_stream": lambda device: Stream()}
    for name, value in {**streams, "cudart": Runtime}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(Workers, "ready", lambda self: True)
    real = Workers.__next__

    def asked(self: Workers[Packet]) -> Packet:
        packet = real(self)
        done.append(f"asked for {packet.rest.removeprefix('task ')}")
        return packet

    monkeypatch.setattr(Workers, "__next__", asked)
    monkeypatch.setattr(feed, "_ToGpu", lambda device, workers: ToGpu(torch.device("cpu"), workers))
    with closing(fed(made, itertools.count(), 2, ROOM, torch.device("cuda"))) as packets:
        for number in range(4):
            assert int(next(packets)[0]["image"].flatten()[0]) == number
    assert done[:1] == ["pinned"] and done[-2:] == ["waited for all", "not pinned"]
    for number in range(3):  # what a worker has just been asked for lies where its result before lay
        assert done.index(f"waited for {number}") < done.index(f"asked for {number + 2}")
        assert done.index(f"asked for {number + 1}") < done.index(f"queued after {number}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_packets_arrive_on_a_gpu(workers: int) -> None:
    device = torch.device("cuda")
    with closing(fed(made, itertools.count(), workers, ROOM, device)) as packets:
        assert next(packets)[0]["image"].device.type == "cuda"
    with closing(fed(made, itertools.count(), workers, ROOM, device)) as packets:
        check(packets, 40)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shared_memory_is_pinned_for_a_gpu() -> None:
    with closing(Workers(made, itertools.count(), 2, ROOM)) as workers:
        with feed._ToGpu(torch.device("cuda"), 2).pinned(workers.memory):
            assert torch.from_numpy(next(workers).arrays["image"]).is_pinned()
        assert not torch.from_numpy(next(workers).arrays["image"]).is_pinned()
