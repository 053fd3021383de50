"""Saving while a training goes on: a state is copied, and written by a thread while the steps go on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgrow.distributed import Team, parts
from pixelgrow.errors import UserError
from pixelgrow.training import state

logger = logging.getLogger(__name__)


class Saver:
    """Writes the states of a training into `folder`, one at a time. All processes call its methods together.

    sharded: each process writes its parts, and the state is there when `finish` has found that all are written. If not,
    the first process writes all, and the state is there as soon as it has.
    """

    def __init__(self, folder: Path, team: Team, sharded: bool) -> None:
        self.folder, self.team, self.sharded = folder, team, sharded
        self.thread = ThreadPoolExecutor(1, "state")
        self.flight: tuple[int, Mapping[str, Any], Future[Any] | None] | None = None

    def start(self, images: int, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Copy a state, and write it from now on. Waits for the one before.

        Raises UserError if that could not be written, or if there is no room for this one.
        """
        self.finish()
        team, folder = self.team, self.folder
        writing: Future[Any] | None = None
        if self.sharded:
            team.alone(partial(state.begin, folder, images))
            begins = parts.share(tensors, team)
            with team.together():
                copies = {n: _copy(parts.local(tensors[n])) for n in begins}
                name = f"{team.rank:05d}.safetensors"
                writing = self.thread.submit(state.write, folder, images, name, copies, parts.header(begins))
        else:
            with team.together():
                if team.first:
                    copies = {n: _copy(t) for n, t in tensors.items()}
                    writing = self.thread.submit(state.save, folder, images, copies, counters)
        self.flight = (images, counters, writing)

    @property
    def writing(self) -> bool:
        """Whether this process is writing."""
        return self.flight is not None and self.flight[2] is not None and not self.flight[2].done()

    def finish(self) -> None:
        """Wait until the state is on the disk, if one is being written. Raises UserError if it could not be."""
        if self.flight is None:
            return
        (images, counters, writing), self.flight = self.flight, None
        team = self.team
        try:
            with team.together():
                written = writing.result() if writing is not None else None
            if self.sharded:
                files = {name: of for some in team.gather(written) for name, of in (some or {}).items()}
                team.alone(partial(state.commit, self.folder, images, files, counters))
        except UserError:
            if self.sharded and team.first:
                state.abandon(self.folder, images)
            raise

    def close(self) -> None:
        """Wait until this process writes no more, as a training ends by an error that is raised already."""
        self.thread.shutdown()
        if self.flight is not None and self.flight[2] is not None and (error := self.flight[2].exception()):
            logger.warning("%s", error)


def _copy(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype).copy_(t.detach())
