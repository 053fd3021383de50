"""What is measured while a network trains: hooks, sample grids, seams, FLOPs, speed, memory."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pixelgrow import precision
from pixelgrow.distributed import Shards
from pixelgrow.errors import UserError
from pixelgrow.models.flops import counted
from pixelgrow.pictures import grid, to_uint8
from pixelgrow.training import cpu
from pixelgrow.training.ema import Ema
from pixelgrow.training.objective import Objective
from pixelgrow.training.periods import crossed
from pixelgrow.writing import atomic

logger = logging.getLogger(__name__)
UNSEEN = 1e-8  # squared difference of pixels in [-1, 1]; an 8-bit step is 6e-5


@dataclass(frozen=True)
class Hook:
    """Something to run at certain image counts, with the averaged weights, in eval mode, without gradients.

    run: called with the images seen; returns numbers to log under `name/`. Must be a function of the images and the
    weights alone, as it may run again after resuming, and must not change the networks.
    every: period in images, 0 for never. The hook also runs at the end, and before the first step if `at_start`.
    """

    name: str
    every: int
    run: Callable[[int], Mapping[str, float]]
    at_start: bool = False

    def due(self, before: int, now: int, end: int) -> bool:
        """Whether the hook runs after the step from `before` to `now` images of a training of `end`."""
        if not self.every:
            return False
        return now >= end or (now == 0 and self.at_start) or crossed(self.every, before, now)


@contextmanager
def averaged(
    objective: Objective,
    averages: Mapping[str, Sequence[Ema]],
    device: torch.device,
    dtype: torch.dtype,
    shards: Shards | None = None,
) -> Iterator[None]:
    """Within, the parts hold their first averages, in eval mode, without gradients; random numbers are restored.

    averages: of each part. dtype: what its forward passes compute in. shards: the parts of which the whole network
    holds them, in the first process; all processes enter then.
    """
    split = shards.parts if shards else {}
    modules = [split[part].plain if part in split else module for part, module in objective.modules.items()]
    training = [m for module in modules for m in module.modules() if m.training]

    def back() -> None:
        for m in training:
            m.training = True

    with ExitStack() as stack:
        for part, emas in averages.items():
            if emas:
                stack.enter_context(emas[0].applied())
            elif part in split:
                stack.enter_context(split[part].holding(dict(objective.modules[part].named_parameters())))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(back)
        for module in modules:
            module.eval()
        with torch.no_grad(), precision.autocast(device, dtype):
            yield


@dataclass(frozen=True)
class Row:
    """A row of a sample grid: n images (3, h, w) in [-1, 1], `what` they are, and their prompts, in words.

    made: whether the network that trains made them.
    """

    images: Sequence[Tensor]
    what: str
    prompts: Sequence[str]
    made: bool = True


def grid_hook(rows: Callable[[], Sequence[Row]], folder: Path, every: int, patches: Sequence[int] = (8,)) -> Hook:
    """Write the grid `samples/<images>.png` and `samples/prompts.txt`, and log the energy ratios at seams.

    rows: makes the grid's rows, from the same noise and conditions each time. patches: sides of the network's patches
    in pixels; the ratio at each, of the rows that it made, is logged as `seams_<side>`. If sampling fails, training
    goes on, and a warning says why.
    """

    def run(images: int) -> Mapping[str, float]:
        try:
            made = rows()
        except UserError as error:
            logger.warning("no sample grid at %s images: %s", f"{images:,}", error)
            return {}
        save_rows(made, folder / "samples" / f"{images:09d}.png")
        found = Seams(patches)
        for row in made:
            if row.made:
                for group in alike(row.images):
                    found.add(group)
        return found.ratios()

    return Hook("samples", every, run)


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows of images as one PNG, and what they are into it and into `prompts.txt` beside it."""
    columns, text, last = max(len(row.images) for row in rows), "", None
    for number, row in enumerate(rows, 1):
        text += f"row {number}: {row.what}\n"
        if row.prompts != last:
            text += "".join(f"  {' '.join(prompt.split())}\n" for prompt in row.prompts)
        last = row.prompts
    h, w = (max(image.shape[axis] for row in rows for image in row.images) for axis in (1, 2))
    images = torch.ones(len(rows), columns, 3, h, w)  # white
    for cells, row in zip(images, rows, strict=True):
        for cell, image in zip(cells, row.images, strict=False):
            top, left = (h - image.shape[1]) // 2, (w - image.shape[2]) // 2
            cell[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    save_grid(images.flatten(0, 1), path, columns, text)
    with atomic(path.with_name("prompts.txt")) as part:
        part.write_text(text, encoding="utf-8")


def alike(images: Sequence[Tensor]) -> list[Tensor]:
    """Images (C, h, w) in groups of one size, (n, C, h, w) each."""
    sizes = dict.fromkeys(image.shape for image in images)
    return [torch.stack([image for image in images if image.shape == size]) for size in sizes]


def save_grid(images: Tensor, path: Path, columns: int = 8, rows: str = "") -> None:
    """Write (B, 3, H, W) in [-1, 1] as one PNG, row by row, whole or not at all. `rows`: what they are, kept in it."""
    info = PngInfo()
    info.add_text("pixelgrow", json.dumps({"rows": rows}))
    with atomic(path) as part:
        grid(to_uint8(images), columns, len(images)).save(part, format="PNG", pnginfo=info)


class Seams:
    """Ratio of the energy of differences across patch boundaries to that inside patches, of images added in batches.

    patches: sides of patches in pixels. The energy is the mean squared difference of neighbouring pixels: of each pair
    of rows and of columns, then of all pairs.
    """

    def __init__(self, patches: Sequence[int]) -> None:
        self.across = {side: [0.0, 0.0] for side in patches}  # sum and number of squared differences
        self.inside = {side: [0.0, 0.0] for side in patches}

    def add(self, images: Tensor) -> None:
        """Images (B, C, H, W) in [-1, 1]."""
        for axis in (2, 3):
            energy = (
                images.double().diff(dim=axis).square().mean(dim=5 - axis).sum(dim=(0, 1)).cpu()
            )  # (H - 1,), (W - 1,)
            size = images.shape[0] * images.shape[1]
            for side in self.across:
                seam = (torch.arange(len(energy)) + 1) % side == 0
                for sums, where in ((self.across[side], seam), (self.inside[side], ~seam)):
                    sums[0] += float(energy[where].sum())
                    sums[1] += int(where.sum()) * size

    def ratios(self) -> dict[str, float]:
        """{"seams_8": ratio} for each patch side; 1 where no seam shows.

        Differences far below an 8-bit step count as none, so that patches of one tone each give a large number.
        """
        found = {}
        for side, (across, n_across) in self.across.items():
            inside, n_inside = self.inside[side]
            both = n_across and n_inside
            found[f"seams_{side}"] = (across / n_across + UNSEEN) / (inside / n_inside + UNSEEN) if both else 1.0
        return found


def seams(images: Tensor, patches: Sequence[int]) -> dict[str, float]:
    """`Seams.ratios` of one batch of images (B, C, H, W) in [-1, 1]."""
    found = Seams(patches)
    found.add(images)
    return found.ratios()


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3, side: int | None = None) -> float:
    """The device's rate of matrix products in FLOP/s: the best of repeated square products of `side`."""
    n = side or (1536 if device.type == "cpu" else 8192)
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    out, best, began = a @ b, float("inf"), time.perf_counter()
    synchronize(device)
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def flops_per_image(objective: Objective, batch: Any) -> float:
    """FLOPs of matrix products, convolutions and attention per image, forward and backward, of all parts.

    batch: a frozen dataclass whose fields are tensors or tuples over images, or None. Its first two images are used.
    Gradients and buffers are left as they were.
    """
    few = dataclasses.replace(
        batch, **{f.name: v[:2] for f in dataclasses.fields(batch) if (v := getattr(batch, f.name)) is not None}
    )

    def work() -> None:
        for part in objective.modules:
            objective.loss(few, part).loss.backward()

    buffers = [b for module in objective.modules.values() for b in module.buffers()]
    kept = [b.clone() for b in buffers]
    total = counted(work)
    for b, was in zip(buffers, kept, strict=True):  # counting is no step, and a run that resumes counts again
        b.copy_(was)
    for module in objective.modules.values():
        module.zero_grad(set_to_none=True)
    return total / min(2, len(batch.index))


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle; for reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Start `peak_memory` anew; for a CPU only where the system can (Linux, proc(5))."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cpu.trim()
    with suppress(OSError):  # elsewhere there is no such file; in a sandbox it may not be writable
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Images per second, the share of time spent waiting for data, the share of the matrix-product rate achieved."""

    def __init__(self, flops: float | None, rate: float) -> None:
        self.flops, self.rate = flops, rate
        self.window = [0, 0.0, 0.0]
        self.total = [0, 0.0]
        self.values: dict[str, float] = {}
        self.note = ""

    def add(self, images: int, seconds: float, waited: float) -> None:
        """Add a step: its images, its seconds, and the seconds that it waited for its batch."""
        self.window = [self.window[0] + images, self.window[1] + seconds, self.window[2] + waited]
        self.total = [self.total[0] + images, self.total[1] + seconds + waited]

    def read(self, loss: float | None) -> None:
        """Compute `values` and `note` of the time since the last `read`."""
        images, seconds, waited = self.window
        speed = images / (seconds + waited)
        self.values = {"images_per_second": speed, "waited": waited / (seconds + waited)}
        if self.flops:
            self.values["matmul_share"] = self.flops * images / seconds / self.rate
        self.note = (f"loss {loss:.4g}, " if loss is not None else "") + f"{speed:.3g} images/s"
        self.window = [0, 0.0, 0.0]

    @property
    def speed(self) -> float:
        """Images per second since the start."""
        return self.total[0] / self.total[1] if self.total[0] else 0.0

    @property
    def share(self) -> float | None:
        """Share of the matrix-product rate achieved since the start, waiting included."""
        return self.flops * self.speed / self.rate if self.flops else None
