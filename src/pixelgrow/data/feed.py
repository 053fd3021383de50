"""From worker processes to the device: arrays through shared, pinned memory, copied while the device computes."""

import contextlib
import logging
import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelgrow.data.workers import Workers

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Packet:
    """What a worker makes of a task: `arrays`, to become tensors on the device, and the `rest`, without arrays."""

    arrays: Mapping[str, np.ndarray]
    rest: Any = None

    @property
    def room(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def fed(
    work: Callable[[int], Packet], tasks: Iterator[int], workers: int, room: int, device: torch.device = CPU
) -> Generator[tuple[dict[str, Tensor], Any], None, None]:
    """The tensors on `device` and the rest of the packet of each of the endless `tasks`, in order.

    `workers`: processes that work ahead; 0: this process works. `room`: the most bytes of a packet's arrays. Close it
    to stop the workers.

    The next packet, if it is there already, is sent to a GPU before the one before it is handed out: on a stream of its
    own, out of pinned memory, so that nothing waits for it.
    """
    if not workers:
        for packet in map(work, tasks):
            yield {name: torch.from_numpy(array).to(device) for name, array in packet.arrays.items()}, packet.rest
        return
    to_device = _ToGpu(device, workers) if device.type == "cuda" else _ToCpu()
    with contextlib.closing(Workers(work, tasks, workers, room)) as packets, to_device.pinned(packets.memory):
        ahead: deque[tuple[Callable[[], dict[str, Tensor]], Any]] = deque()

        def send() -> None:
            to_device.wait()
            packet = next(packets)
            ahead.append((to_device.send(packet.arrays), packet.rest))

        while True:
            if not ahead:
                send()
            taken, rest = ahead.popleft()
            if packets.ready():
                send()
            yield taken(), rest


class _ToCpu:
    """Copies out of shared memory, which the workers use again."""

    def wait(self) -> None:
        """Nothing is under way."""

    def send(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], dict[str, Tensor]]:
        tensors = {name: torch.from_numpy(array).clone() for name, array in arrays.items()}
        return lambda: tensors

    def pinned(self, memory: mmap.mmap | None) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class _ToGpu:
    """Copies to a GPU on a stream of their own."""

    def __init__(self, device: torch.device, workers: int) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.under_way: deque[torch.cuda.Event] = deque(maxlen=max(1, workers))

    def wait(self) -> None:
        """Before another packet is asked for: its worker may then write where its packet before lies."""
        if len(self.under_way) == self.under_way.maxlen:
            self.under_way[0].synchronize()

    def send(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], dict[str, Tensor]]:
        with torch.cuda.stream(self.stream):
            tensors = {n: torch.from_numpy(a).to(self.device, non_blocking=True) for n, a in arrays.items()}
            copied = self.stream.record_event()
        self.under_way.append(copied)

        def taken() -> dict[str, Tensor]:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(copied)
            for tensor in tensors.values():
                tensor.record_stream(here)  # its memory is of the other stream
            return tensors

        return taken

    @contextlib.contextmanager
    def pinned(self, memory: mmap.mmap | None) -> Iterator[None]:
        """Pin the memory within, after the workers have been forked: out of other memory, each copy is waited for."""
        start, done = 0, 1
        if memory is not None:
            start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
            done = int(torch.cuda.cudart().cudaHostRegister(start, len(memory), 1))  # 1: for all GPUs
            if done:
                logger.warning("memory could not be pinned (CUDA error %d): copies to the GPU are slower", done)
        try:
            yield
        finally:
            self.stream.synchronize()
            if not done:
                torch.cuda.cudart().cudaHostUnregister(start)
