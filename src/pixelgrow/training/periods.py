"""When something is due: periods counted in images, and in wall time for what changes no weight."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

LOG_SECONDS = 300.0  # between lines of a log, of trainings whose steps are slow
SAVE_SECONDS = 900.0  # between saves; a run that is killed loses that much, and what it did while the last was written
SAVE_SHARE = 0.05  # of the time at most do steps pause for saves that are due by wall time alone


def crossed(every: int | None, before: int, now: int) -> bool:
    """Whether the step from `before` to `now` images reached or passed a multiple of `every`; never for 0 or None."""
    return bool(every) and now // every > before // every  # type: ignore[operator]


class SaveClock:
    """Says when a save is due by wall time: SAVE_SECONDS after the last one, or later if saving is slow (SAVE_SHARE).

    A state holds all that later steps depend on, so the times of saves change no result.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.clock = clock
        self.last, self.cost = clock(), 0.0

    @property
    def due(self) -> bool:
        return self.clock() - self.last >= max(SAVE_SECONDS, self.cost / SAVE_SHARE)

    def saved(self, began: float) -> None:
        """Note a save for which steps paused from `began`, by this clock, until now."""
        self.last = self.clock()
        self.cost = self.last - began
