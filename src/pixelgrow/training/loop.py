"""One training loop for every objective: steps, averages, hooks, saving, exact resume.

All progress is in images. What a step does is a function of the weights, the batch and (seed, images); so a run that is
stopped anywhere and started again ends with the bytes of one that never stopped (on a CPU, with as many threads).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from pixelgrow import precision
from pixelgrow.errors import UserError
from pixelgrow.rng import seed_of
from pixelgrow.training import monitor, optim, process, state
from pixelgrow.training.ema import Ema
from pixelgrow.training.log import Averages, Display, Log
from pixelgrow.training.monitor import Hook
from pixelgrow.training.objective import Objective, Terms, noise_levels
from pixelgrow.training.periods import SaveClock, crossed
from pixelgrow.training.settings import TrainSettings
from pixelgrow.training.stopping import Interrupted, asked_to_stop

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint"  # where in a run's folder its result is
Keep = Callable[[Path, int], None]


@dataclass
class Counters:
    """How far a run is; saved with its state."""

    images: int = 0
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    lines: int = 0


@dataclass(frozen=True)
class TrainResult:
    """A finished run. averages: by part, one per length of the settings. Speed and share: since the last start."""

    images: int
    steps: int
    skipped: int
    seconds: float
    images_per_second: float
    matmul_share: float | None
    peak_memory: int
    averages: dict[str, list[Ema]]


def train(
    objective: Objective,
    batches: Callable[[int], Iterator[Any]],
    settings: TrainSettings,
    folder: Path,
    *,
    seed: int = 0,
    hooks: Sequence[Hook] = (),
    name: str = "train",
    flops: float | None = None,
    console: Console | None = None,
    keep: Keep | None = None,
    until: int | None = None,
    after: Path | None = None,
) -> TrainResult:
    """Train until `settings.images` have been seen, going on from `folder/state` if there is one.

    A run in phases, each with other frozen tensors, is several calls with the same settings, so that one schedule runs
    through them: the first ends at `until` images, the second goes on `after` the first's folder.

    batches: the stream of micro-batches (`settings.micro_batch` images each) from a stream position on.
    folder: gets `state/`, `log.jsonl`, `tensorboard/`, `snapshots/`. The modules hold the last weights at the end.
    flops: per image, forward and backward; counted on the first batch if None.
    keep: called as keep(folder / "checkpoint", images seen) if bad data or steps that are not finite stop the run after
    it has learnt something: writes the modules, which then hold the first averages, as a result to use.
    until: images of the whole run after which this phase ends; `settings.images` if None.
    after: folder of the phase before, used while `folder` has no state. Its counters, weights, averages and optimizer
    state are carried on. Tensors that were frozen in it start from the module's weights, with averages equal to them
    and an empty optimizer state.
    Raises UserError (damaged state, full disk, bad data, too many steps that are not finite) and Interrupted.
    """
    run = Training(objective, settings, Path(folder), seed, keep, until, after)
    return run.run(batches, hooks, name, flops, console)


class Training:
    """A run in progress: an objective, its optimizers and averages, and how far they are."""

    def __init__(
        self,
        objective: Objective,
        settings: TrainSettings,
        folder: Path,
        seed: int,
        keep: Keep | None = None,
        until: int | None = None,
        after: Path | None = None,
    ) -> None:
        self.objective, self.settings, self.folder, self.seed, self.keep = objective, settings, folder, seed, keep
        self.until = settings.images if until is None else until
        self.device = next(p for m in objective.modules.values() for p in m.parameters()).device
        self.dtype = precision.training_dtype(settings.precision, self.device)
        self.parameters = {part: optim.trainable(m) for part, m in objective.modules.items()}
        for part, parameters in self.parameters.items():
            if not parameters:
                raise UserError(f"nothing to train in {part}: all of its tensors are frozen; unfreeze some")
        self.optimizers = {part: optim.optimizers(m, settings) for part, m in objective.modules.items()}
        self.averages = {part: [Ema(m, s) for s in settings.ema] for part, m in objective.modules.items()}
        self.counters = Counters()
        self.means = Averages()
        self.bad = 0  # steps in a row that were not finite; never saved, as what is saved is before them
        self.saved, self.clock = -1, SaveClock()
        self.resume(after)
        self.good = self._now(self.counters.lines)

    # --- state -----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors of the state by name. Frozen parameters are not among them: they are the parent's."""
        named: dict[str, Tensor] = {}
        for part, module in self.objective.modules.items():
            kept = module.state_dict().keys()
            named |= {f"weights/{part}/{n}": p for n, p in self.parameters[part].items()}
            named |= {f"buffers/{part}/{n}": b for n, b in module.named_buffers() if n in kept}
            for ema in self.averages[part]:
                named |= {f"ema/{ema.length}/{part}/{n}": t for n, t in ema.tensors.items()}
            for n, p in self.parameters[part].items():
                for opt in self.optimizers[part]:
                    named |= {f"optimizer/{slot}/{part}/{n}": t for slot, t in opt.state.get(p, {}).items()}
        return named

    def _now(self, lines: int) -> tuple[Counters, Averages, list[int]]:
        return replace(self.counters, lines=lines), self.means.copy(), self._writes()

    def _writes(self) -> list[int]:
        """How often each buffer was written."""
        return [b._version for m in self.objective.modules.values() for b in m.buffers()]

    def save(self, log: Log) -> None:
        """Write the state after the last good step, unless it was, or the tensors have moved since."""
        c, means, writes = self.good
        # A skipped step leaves the tensors as they were, unless another part was updated in it, or buffers.
        if self.saved == c.images or (self.bad and (len(self.parameters) > 1 or writes != self._writes())):
            return
        began = self.clock.clock()
        log.flush()
        state.save(self.folder / "state", c.images, self.tensors(), asdict(c) | {"means": means.stored()})
        self.saved = c.images
        self.clock.saved(began)

    def _rescue(self, log: Log) -> None:
        """Before a mistake stops the run: save what was done since the last time, keep a result that can be used."""
        if not self.good[0].images:
            return
        try:
            self.save(log)
            if self.keep is not None:
                with self.averaged():
                    self.keep(self.folder / CHECKPOINT, self.good[0].images)
        except UserError as error:  # the mistake itself is what the user has to know
            logger.warning("%s", error)

    @torch.no_grad()
    def resume(self, after: Path | None = None) -> None:
        """Load the newest state, if there is one; else the last one of the phase before, whose folder is `after`."""
        folder = self.folder
        found = state.load(folder / "state")
        if found is None and after is not None:
            folder = after
            found = state.load(folder / "state")
        if found is None:
            return
        self.means = Averages(found.counters.pop("means"))
        self.counters = Counters(**found.counters)
        if folder == after:
            self.counters.lines = 0  # this phase has a log of its own
        self.saved = self.counters.images
        stored = dict(found.tensors)
        slots: dict[nn.Parameter, dict[str, Tensor]] = {}
        for key in [k for k in stored if k.startswith("optimizer/")]:
            _, slot, part, name = key.split("/", 3)
            p = self.parameters.get(part, {}).get(name)
            if p is not None:
                slots.setdefault(p, {})[slot] = stored.pop(key)
        live = {n: t for n, t in self.tensors().items() if not n.startswith("optimizer/")}
        if folder == after:  # what was frozen there has no state
            live = {n: t for n, t in live.items() if n in stored}
        odd = sorted(live.keys() ^ stored.keys())
        odd += [
            n
            for n in live.keys() & stored.keys()
            if (live[n].shape, live[n].dtype) != (stored[n].shape, stored[n].dtype)
        ]
        odd += [n for n, t in found.tensors.items() if n.startswith("optimizer/") and t.dtype != torch.float32]
        if odd:
            raise UserError(
                f"{folder / 'state'} is of another network, or of another precision: {len(odd)} tensors differ, "
                f"{min(odd)} the first; delete that folder to start this stage again"
            )
        for n, t in live.items():
            t.copy_(stored[n])
        for opts in self.optimizers.values():
            for opt in opts:
                optim.restore(opt, slots)

    # --- one step --------------------------------------------------------------------------------------------------

    def step(self, micro: Sequence[Any]) -> None:
        """One update of every part from the micro-batches of one batch."""
        c, s = self.counters, self.settings
        torch.manual_seed(seed_of(self.seed, "step", c.images))
        middle = c.images + s.batch / 2
        good = True
        for part in self.objective.modules:
            optim.set_rate(self.optimizers[part], s.lr * self.objective.rates[part] * optim.rate(middle, s))
            terms = self._gradients(micro, part)
            grads = [p.grad for p in self.parameters[part].values() if p.grad is not None]
            # the only values a step waits for: whether it is sound, and by how much to clip
            loss, norm = torch.stack(
                [torch.stack([t.loss.detach() for t in terms]).double().sum(), get_total_norm(grads, foreach=True)]
            ).tolist()
            if math.isfinite(loss) and math.isfinite(norm):
                if s.clip and norm > s.clip:
                    torch._foreach_mul_(grads, s.clip / norm)
                for opt in self.optimizers[part]:
                    opt.step()
                for ema in self.averages[part]:
                    ema.update(c.images, c.images + s.batch)
                prefix = f"{part}/" if len(self.objective.modules) > 1 else ""
                self.means.add({f"{prefix}loss": loss / len(terms), f"{prefix}grad_norm": norm})
                for t in terms:
                    self.means.add({prefix + n: v for n, v in t.logs.items()})
            else:
                good = False
                self._stumbled(part, loss, norm, terms)
            for m in self.objective.modules.values():
                m.zero_grad(set_to_none=True)
        c.images += s.batch
        c.steps += 1
        c.skipped += not good
        self.bad = 0 if good else self.bad + 1

    def _gradients(self, micro: Sequence[Any], part: str) -> list[Terms]:
        terms = []
        for batch in micro:
            with precision.autocast(self.device, self.dtype):
                one = self.objective.loss(batch, part)
            (one.loss / len(micro)).backward()
            terms.append(one)
        return terms

    def _stumbled(self, part: str, loss: float, norm: float, terms: Sequence[Terms]) -> None:
        c, limit = self.counters, self.settings.max_bad_steps
        where = f"step {c.steps + 1} ({c.images:,} images) of {part}: loss {loss:.3g}, gradient norm {norm:.3g}"
        where += noise_levels(terms)
        if self.bad + 1 >= limit:
            self.bad += 1
            raise UserError(f"not finite {limit} times in a row, last at {where}; {self._remedy()}")
        logger.warning("skipped %s", where)

    def _remedy(self) -> str:
        other = "a lower lr, or precision: fp32"
        if not self.good[0].images:
            return f"nothing was learnt before: delete {self.folder} and begin again with {other}"
        if self.keep is None:
            return f"the last good state is kept in {self.folder / 'state'}: begin a new run with {other}"
        return (
            f"what was learnt before is kept in {self.folder / CHECKPOINT}: put a train stage of another name in this "
            f"one's place, with that folder as its from: and {other}"
        )

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(
        self,
        batches: Callable[[int], Iterator[Any]],
        hooks: Sequence[Hook],
        name: str,
        flops: float | None,
        console: Console | None,
    ) -> TrainResult:
        """See `train`."""
        c, s = self.counters, self.settings
        log = Log(self.folder, keep=c.lines, images=c.images)
        before = c.images - s.batch if c.images else 0
        rate = monitor.matmul_rate(self.device, self.dtype)
        meter = monitor.Meter(flops, rate)
        stream: Iterator[Any] | None = None
        fresh = True
        try:
            with (
                process.settings(self.device, s.compile),
                asked_to_stop() as stop,
                Display(name, self.until, c.images, console) as display,
            ):
                while True:
                    done = c.images >= self.until
                    if not self.bad:
                        self.good = self._now(log.lines)
                    if stop or done or (c.images and (self.clock.due or crossed(s.save_every, before, c.images))):
                        self.save(log)
                    if stop:
                        raise Interrupted(stop[0], max(self.saved, 0))
                    self._look(hooks, before, log)
                    if done:
                        break
                    try:
                        if stream is None:
                            stream = batches(c.images)
                        waited = time.perf_counter()
                        micro = [_next(stream, c.images + i * s.micro_batch) for i in range(s.accumulate)]
                        waited = time.perf_counter() - waited
                        if fresh:
                            fresh = False
                            if meter.flops is None:
                                meter.flops = monitor.flops_per_image(self.objective, micro[0])
                            self._compile()
                        began = time.perf_counter()
                        before = c.images
                        self.step(micro)
                        worked = time.perf_counter() - began
                    except UserError:  # bad data, a worker that died, or steps that are not finite
                        self._rescue(log)
                        raise
                    meter.add(s.batch, worked, waited)
                    c.seconds += worked + waited
                    if crossed(s.log_every, before, c.images) or c.images >= self.until:
                        self._report(log, meter)
                    display.update(c.images, meter.note)
        finally:
            if stream is not None and hasattr(stream, "close"):
                stream.close()
            log.close()
        peak = monitor.peak_memory(self.device)
        return TrainResult(c.images, c.steps, c.skipped, c.seconds, meter.speed, meter.share, peak, self.averages)

    def _compile(self) -> None:
        if self.settings.compile:
            for module in self.objective.modules.values():
                module.compile(dynamic=False)  # few shapes; the dynamic ones fail on a CPU (torch 2.13)

    def _report(self, log: Log, meter: monitor.Meter) -> None:
        first = next(iter(self.optimizers))
        values = self.means.read() | {"lr": self.optimizers[first][0].param_groups[0]["lr"]}
        values |= {"skipped": float(self.counters.skipped), "memory_mib": monitor.peak_memory(self.device) / 2**20}
        meter.read(values.get("loss", values.get(f"{first}/loss")))
        log.write(self.counters.images, values | meter.values)

    def _look(self, hooks: Sequence[Hook], before: int, log: Log) -> None:
        """Call the hooks that are due and keep a snapshot of the averages if one is."""
        c, s = self.counters, self.settings
        if s.snapshot_every and c.images and (crossed(s.snapshot_every, before, c.images) or c.images >= self.until):
            for part, emas in self.averages.items():
                kept = {f"{e.length}/{n}": t.half() for e in emas for n, t in e.tensors.items()}
                state.write_tensors(self.folder / "snapshots" / part / f"{c.images:012d}.safetensors", kept)
        for hook in hooks:
            if hook.due(before, c.images, self.until):
                with self.averaged():
                    values = hook.run(c.images)
                if values:
                    log.write(c.images, {f"{hook.name}/{n}": v for n, v in values.items()})

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules with the first averages as weights, in eval mode, without gradients, randomness set aside."""
        modules = self.objective.modules
        training = [m for module in modules.values() for m in module.modules() if m.training]

        def back() -> None:
            for m in training:
                m.training = True

        with ExitStack() as stack:
            for emas in self.averages.values():
                if emas:
                    stack.enter_context(emas[0].applied())
            stack.enter_context(torch.random.fork_rng([self.device] if self.device.type == "cuda" else []))
            stack.callback(back)
            for module in modules.values():
                module.eval()
            with torch.no_grad(), precision.autocast(self.device, self.dtype):
                yield


def _next(stream: Iterator[Any], images: int) -> Any:
    batch = next(stream, None)
    assert batch is not None, f"the stream of batches ended at {images} images; it must be endless"
    assert int(batch.index[0]) == images, f"got a batch of index {int(batch.index[0])} on, expected {images}"
    return batch
