"""One training loop for every objective: steps, averages, hooks, saving, exact resume.

Progress is counted in images. A step is a function of the state, the batch and (seed, images). So a run that is stopped
anywhere and resumed ends with the same bytes as one that was never stopped (on a CPU, with the same number of threads).

Several processes share the micro-batches of each step and have the same weights (`distributed.Team`). The first of them
writes all files and runs the hooks, except that of sharded weights each writes its parts of a state.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from pixelgrow import precision
from pixelgrow.data.badfiles import BadFiles
from pixelgrow.distributed import Lost, Shards, Team
from pixelgrow.errors import UserError
from pixelgrow.rng import seed_of
from pixelgrow.training import monitor, optim, periods, process, state
from pixelgrow.training.ema import Ema
from pixelgrow.training.log import Averages, Display, Log, numbers
from pixelgrow.training.monitor import Hook
from pixelgrow.training.objective import Objective, Stepped, Terms, in_words, noise_levels
from pixelgrow.training.periods import SaveClock, crossed
from pixelgrow.training.saving import Saver
from pixelgrow.training.settings import TrainSettings
from pixelgrow.training.stopping import Interrupted, stop_signals

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint"  # the result, in a run's folder
Keep = Callable[[Path, int], None]
Batches = Callable[[int, int], Iterator[Any]]


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
    """A finished run. averages: by part, one per length of the settings. images_per_second and matmul_share: since the
    run was last started or resumed; peak_memory: bytes."""

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
    batches: Batches,
    settings: TrainSettings,
    folder: Path,
    *,
    seed: int = 0,
    hooks: Sequence[Hook] = (),
    name: str = "train",
    flops: float | None = None,
    console: Console | None = None,
    keep: Keep | None = None,
    stop_at: int | None = None,
    after: Path | None = None,
    team: Team | None = None,
    shards: Shards | None = None,
    bad: BadFiles | None = None,
) -> TrainResult:
    """Train until `settings.images` have been seen; resumes from `folder/state` if there is one.

    A run in phases with different frozen tensors takes one call for each phase, with the same settings: one schedule
    runs through them all. The first phase ends at `stop_at` images; the second names the first's folder in `after`.

    batches: (start, step) -> the micro-batches at the stream's positions start, start + step, ..., of
    `settings.micro_batch` images each.
    folder: gets `state/`, `log.jsonl`, `tensorboard/`, `snapshots/`. The modules hold the last weights at the end.
    flops: per image, forward and backward; counted on the first batch if None.
    keep: writes a checkpoint of the modules. If bad data or non-finite steps stop the run, it is called as
    keep(folder / "checkpoint", images seen) while the modules hold the first averages. Not called before any good step.
    stop_at: images of the whole run after which this phase ends; `settings.images` if None.
    after: folder of the phase before, read if `folder` has no state. Counters, weights, averages and optimizer state
    are taken from there. Tensors that were frozen in it start from the module's weights, with averages equal to them
    and an empty optimizer state.
    team: the processes that share the steps; `settings.accumulate` is a multiple of their number. The weights at the
    start are those of the first one.
    shards: the parts whose weights the processes share. Hooks, `keep` and the caller see the whole networks, in the
    first process.
    bad: the bad files that `batches` meets; those of all processes are counted by the first.
    Raises UserError (damaged state, full disk, bad data, too many non-finite steps) and Interrupted.
    """
    run = Training(objective, settings, Path(folder), seed, keep, stop_at, after, team, shards)
    return run.run(batches, hooks, name, flops, console, bad)


class Training:
    """A run in progress: an objective, its optimizers and averages, and how far they are."""

    def __init__(
        self,
        objective: Objective,
        settings: TrainSettings,
        folder: Path,
        seed: int,
        keep: Keep | None = None,
        stop_at: int | None = None,
        after: Path | None = None,
        team: Team | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.team, self.shards = team or Team(), shards or Shards()
        assert settings.accumulate % self.team.size == 0
        self.objective, self.settings, self.folder, self.seed, self.keep = objective, settings, folder, seed, keep
        self.stop_at = settings.images if stop_at is None else stop_at
        self.device = next(p for m in objective.modules.values() for p in m.parameters()).device
        self.dtype = precision.training_dtype(settings.precision, self.device)
        every = [m for part, m in objective.modules.items() if part not in self.shards]  # those come spread
        self.team.spread(t for m in every for t in (*m.parameters(), *m.buffers()))
        self.parameters = {part: optim.trainable(m) for part, m in objective.modules.items()}
        for part, parameters in self.parameters.items():
            if not parameters:
                raise UserError(f"nothing to train in {part}: all of its tensors are frozen; unfreeze some")
        self.optimizers = {part: optim.optimizers(m, settings) for part, m in objective.modules.items()}
        split = self.shards.parts
        self.averages = {
            part: [Ema(m, s, split.get(part)) for s in settings.ema] for part, m in objective.modules.items()
        }
        self.counters = Counters()
        self.means = Averages()
        self.bad = 0  # steps in a row that were not finite; not saved, as a state is that before them
        self.broken = False  # whether other processes wait for weights that this one will not send
        self.saver, self.saved, self.clock = Saver(folder / "state", self.team, bool(self.shards)), -1, SaveClock()
        self.logged = time.monotonic()
        state.check_common(folder, self.team)
        self._resume(after)
        self.good = self._now(self.counters.lines)

    # --- state -----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state by name, not copied. Frozen parameters are left out: they are those of the start."""
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
        """The number of writes to each buffer so far."""
        return [b._version for m in self.objective.modules.values() for b in m.buffers()]

    def save(self, log: Log | None) -> None:
        """Begin to write the state after the last good step, unless that is done, or the tensors have changed since.

        All processes call this, the first one with a log.
        """
        c, means, writes = self.good
        # A skipped step changes no tensor, except that it may update another part, or buffers.
        if self.saved == c.images or (self.bad and (len(self.parameters) > 1 or writes != self._writes())):
            return
        began = self.clock.clock()
        with self.team.together():
            if log is not None:
                log.flush()
        self.saver.start(c.images, self.tensors(), asdict(c) | {"means": means.stored()})
        self.saved = c.images
        self.clock.saved(began)

    def _rescue(self, log: Log | None) -> None:
        """Before a UserError stops the run: save the state, and write a checkpoint that can be used."""
        if not self.good[0].images or self.broken:
            return
        try:
            self.save(log)
            self.saver.finish()
            if self.keep is not None and (log is not None or self.shards):
                with self._averaged():
                    if log is not None:
                        self.keep(self.folder / CHECKPOINT, self.good[0].images)
        except UserError as error:  # what is raised is the error that stopped the run
            logger.warning("%s", error)

    def _averaged(self) -> AbstractContextManager[None]:
        return monitor.averaged(self.objective, self.averages, self.device, self.dtype, self.shards)

    @torch.no_grad()
    def _resume(self, after: Path | None) -> None:
        """Load the newest state, if there is one; else the last one of the phase before, in the folder `after`."""
        with self.team.together():
            folder, found = self.folder, state.load(self.folder / "state", self.team)
            if found is None and after is not None:
                folder, found = after, state.load(after / "state", self.team)
        with self.team.together():
            if found is not None:
                self._take(found, folder, folder == after)

    def _take(self, found: state.State, folder: Path, other: bool) -> None:
        """Go on from a state in `folder`, which is of an `other` phase or not."""
        stored = dict(found.tensors)
        slots: dict[nn.Parameter, dict[str, Tensor]] = {}
        into: dict[str, Tensor] = {}
        for key in [k for k in stored if k.startswith("optimizer/")]:
            _, slot, part, name = key.split("/", 3)
            p = self.parameters.get(part, {}).get(name)
            if p is not None:
                slots.setdefault(p, {})[slot] = into[key] = self.shards.room(stored.pop(key), p)
        live = {n: t for n, t in self.tensors().items() if not n.startswith("optimizer/")}
        if other:  # tensors that were frozen there are not in its state
            live = {n: t for n, t in live.items() if n in stored}
        odd = state.odd(live, stored)
        odd += [n for n, t in found.tensors.items() if n.startswith("optimizer/") and t.dtype != torch.float32]
        if odd:
            raise UserError(
                f"{folder / 'state'} is of another network, or of another precision: {len(odd)} tensors differ, "
                f"{min(odd)} the first; delete that folder to start this stage again"
            )
        found.fill(live | into)
        for opts in self.optimizers.values():
            for opt in opts:
                optim.restore(opt, slots)
        self.means = Averages(found.counters.pop("means"))
        self.counters = Counters(**found.counters)
        if other:
            self.counters.lines = 0  # this phase has a log of its own
        self.saved = self.counters.images

    # --- one step --------------------------------------------------------------------------------------------------

    def step(self, micro: Sequence[Any]) -> None:
        """One update of every part from the micro-batches of one batch; those of this process are given."""
        c, s, team = self.counters, self.settings, self.team
        middle = c.images + s.batch / 2
        good = True
        for module in self.objective.modules.values():
            if isinstance(module, Stepped):
                module.begin_step()
        for part in self.objective.modules:
            optim.set_rate(self.optimizers[part], s.lr * self.objective.rates[part] * optim.rate(middle, s))
            with self._computing():
                terms = self._gradients(micro, part)
            parameters = list(self.parameters[part].values())
            losses = torch.stack([t.loss.detach() for t in terms]).double()
            own = () if part in self.shards else parameters
            zero = team.add_up(own, losses.sum() * 0)  # NaN in all processes if a loss is not finite in one
            grads = [p.grad for p in parameters if p.grad is not None]
            # The only values that a step waits for: whether it is finite, by how much to clip, and what to log.
            mine, (fault, norm) = numbers(
                [{"loss": t.loss} | t.logs for t in terms], zero, self.shards.whole(get_total_norm(grads, foreach=True))
            )
            logs = team.interleave(mine)  # of all micro-batches
            loss = sum(values.pop("loss") for values in logs) / len(logs)
            if math.isfinite(fault) and math.isfinite(norm):
                if s.clip and norm > s.clip:
                    torch._foreach_mul_(grads, s.clip / norm)
                for opt in self.optimizers[part]:
                    opt.step()
                for ema in self.averages[part]:
                    ema.update(c.images, c.images + s.batch)
                prefix = f"{part}/" if len(self.objective.modules) > 1 else ""
                self.means.add({f"{prefix}loss": loss, f"{prefix}grad_norm": norm})
                for values in logs:
                    self.means.add({prefix + n: v for n, v in values.items()})
            else:
                good = False
                self._skip(part, loss * len(logs), norm, terms)
            for m in self.objective.modules.values():
                m.zero_grad(set_to_none=True)
        c.images += s.batch
        c.steps += 1
        c.skipped += not good
        self.bad = 0 if good else self.bad + 1

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Around forward and backward passes: what fails in one process is raised in all.

        Of sharded weights, the others wait for those of the process that failed. Nothing more can be said to them; they
        end when it has ended.
        """
        if not self.shards:
            with self.team.together():
                yield
            return
        self.broken = True
        with self.shards.exchanging():
            yield
        self.broken = False

    def _gradients(self, micro: Sequence[Any], part: str) -> list[Terms]:
        terms, team = [], self.team
        for i, batch in enumerate(micro):
            torch.manual_seed(seed_of(self.seed, "step", self.counters.images, part, team.rank + i * team.size))
            with precision.autocast(self.device, self.dtype):
                one = self.objective.loss(batch, part)
            (one.loss / (len(micro) * team.size)).backward()
            terms.append(one)
        return terms

    def _skip(self, part: str, loss: float, norm: float, terms: Sequence[Terms]) -> None:
        """Log a step that is not finite; UserError if there were too many in a row."""
        c, limit = self.counters, self.settings.max_bad_steps
        where = f"step {c.steps + 1} ({c.images:,} images) of {part}: loss {loss:.3g}, gradient norm {norm:.3g}"
        where += in_words(self.team.gather(noise_levels(terms)))
        if self.bad + 1 >= limit:
            self.bad += 1
            raise UserError(f"not finite {limit} times in a row, last at {where}; {self._remedy()}")
        logger.warning("skipped %s", where)

    def _remedy(self) -> str:
        other = "a lower lr" + (", or precision: fp32" if self.dtype == torch.bfloat16 else "")
        if not self.good[0].images:
            return f"no step before was good: delete {self.folder} and begin again with {other}"
        if self.keep is None:
            return f"the last good state is kept in {self.folder / 'state'}: begin a new run with {other}"
        return (
            f"the result so far is kept in {self.folder / CHECKPOINT}: replace this stage by a train stage of another "
            f"name, with from: that folder, and {other}"
        )

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(
        self,
        batches: Batches,
        hooks: Sequence[Hook],
        name: str,
        flops: float | None,
        console: Console | None,
        bad: BadFiles | None = None,
    ) -> TrainResult:
        """See `train`."""
        c, s, team = self.counters, self.settings, self.team
        log = Log(self.folder, keep=c.lines, images=c.images) if team.first else None
        before = c.images - s.batch if c.images else 0
        stream: Iterator[Any] | None = None
        fresh = True
        try:
            with process.settings(self.device, s.compile), stop_signals() as stop, ExitStack() as stack:
                display = stack.enter_context(Display(name, self.stop_at, c.images, console)) if team.first else None
                rate = monitor.matmul_rate(self.device, self.dtype) if team.first else 1.0
                meter = monitor.Meter(flops and flops / team.size, rate)
                while True:
                    done = c.images >= self.stop_at
                    if not self.bad:
                        self.good = self._now(log.lines if log else 0)
                    due = any(hook.due(before, c.images, self.stop_at) for hook in hooks)  # they are the first's
                    signum, met, late, looks, writing = team.most(
                        stop[0] if stop else 0,
                        0 if bad is None else bad.unshared,
                        self.clock.due,
                        due,
                        self.saver.writing,
                    )
                    if not writing:
                        self.saver.finish()
                    if done or (c.images and (late or crossed(s.save_every, before, c.images))):
                        self.save(log)
                        if done:
                            self.saver.finish()
                        signum = signum or team.most(stop[0] if stop else 0)[0]  # one that came during the save
                    if bad is not None and met:
                        with self._rescuing(log):
                            bad.share(team)
                    if signum:
                        self.save(log)
                        self.saver.finish()
                        team.wait()
                        raise Interrupted(signum, max(self.saved, 0))
                    self._look(hooks, bool(looks), before, log)
                    if done:
                        break
                    with self._rescuing(log):
                        if stream is None:
                            first = c.images + team.rank * s.micro_batch
                            stream = batches(first, team.size * s.micro_batch)
                        waited = time.perf_counter()
                        micro = self._micro_batches(stream, bad)
                        waited = time.perf_counter() - waited
                        if fresh:
                            fresh = False
                            if meter.flops is None and (team.first or self.shards):
                                meter.flops = self._flops(micro[0]) / team.size
                            self._compile()
                        began = time.perf_counter()
                        before = c.images
                        self.step(micro)
                        worked = time.perf_counter() - began
                    meter.add(s.batch, worked, waited)
                    c.seconds += worked + waited
                    if log and self._to_report(before):
                        self._report(log, meter)
                    if display:
                        display.update(c.images, meter.note)
        finally:
            self.saver.close()
            if stream is not None and hasattr(stream, "close"):
                stream.close()
            if log:
                log.close()
        for part, split in self.shards.parts.items():
            split.take(self.parameters[part])
        peak = monitor.peak_memory(self.device)
        return TrainResult(c.images, c.steps, c.skipped, c.seconds, meter.speed, meter.share, peak, self.averages)

    def _micro_batches(self, stream: Iterator[Any], bad: BadFiles | None) -> list[Any]:
        """This process's micro-batches of the next step."""
        c, s, team = self.counters, self.settings, self.team
        try:
            with team.together():
                mine = range(team.rank, s.accumulate, team.size)
                return [_next(stream, c.images + i * s.micro_batch) for i in mine]
        except UserError:
            if bad is not None:
                bad.share(team)
            raise

    @contextmanager
    def _rescuing(self, log: Log | None) -> Iterator[None]:
        """Save before a UserError ends all processes: bad data, a worker that died, too many non-finite steps."""
        try:
            yield
        except Lost:
            raise
        except UserError:
            self._rescue(log)
            if not self.broken:
                self.team.wait()  # for the first process, which writes: when one has ended, torchrun ends the others
            raise

    def _flops(self, batch: Any) -> float:
        with self.shards.exchanging(), precision.autocast(self.device, self.dtype):
            flops = monitor.flops_per_image(self.objective, batch)
        for module in self.objective.modules.values():  # weights that were whole hid the gradients of their parts
            module.zero_grad(set_to_none=True)
        return flops

    def _compile(self) -> None:
        if self.settings.compile:
            for part, whole in self.objective.modules.items():
                for module in self.shards.parts[part].blocks if part in self.shards else [whole]:
                    module.compile(dynamic=False)  # there are few shapes; dynamic ones fail on a CPU (torch 2.13)

    def _to_report(self, before: int) -> bool:
        """Whether a line of the log is due after the step that began at `before` images."""
        images, late = self.counters.images, time.monotonic() - self.logged >= periods.LOG_SECONDS
        return late or images >= self.stop_at or crossed(self.settings.log_every, before, images)

    def _report(self, log: Log, meter: monitor.Meter) -> None:
        first = next(iter(self.optimizers))
        values = self.means.read() | {"lr": self.optimizers[first][0].param_groups[0]["lr"]}
        values |= {"skipped": float(self.counters.skipped), "memory_mib": monitor.peak_memory(self.device) / 2**20}
        meter.read(values.get("loss", values.get(f"{first}/loss")))
        log.write(self.counters.images, values | meter.values)
        self.logged = time.monotonic()

    def _look(self, hooks: Sequence[Hook], looks: bool, before: int, log: Log | None) -> None:
        """Write a snapshot of the averages and run hooks, if due, in the process with a log. looks: whether any is."""
        c, s = self.counters, self.settings
        if log is None and not self.shards:
            return
        if s.snapshot_every and c.images and (crossed(s.snapshot_every, before, c.images) or c.images >= self.stop_at):
            for part, emas in self.averages.items():
                half = {f"{e.length}/{n}": t.half() for e in emas for n, t in e.tensors.items()}
                kept = self.shards.gathered(half, log is not None)
                if log is not None:
                    state.write_tensors(self.folder / "snapshots" / part / f"{c.images:012d}.safetensors", kept)
        if looks:
            with self._averaged():
                for hook in hooks if log else ():
                    if hook.due(before, c.images, self.stop_at) and (values := hook.run(c.images)) and log:
                        log.write(c.images, {f"{hook.name}/{n}": v for n, v in values.items()})


def _next(stream: Iterator[Any], images: int) -> Any:
    batch = next(stream, None)
    assert batch is not None, f"the stream of batches ended at {images} images; it must be endless"
    assert int(batch.index[0]) == images, f"got a batch of index {int(batch.index[0])} on, expected {images}"
    return batch
