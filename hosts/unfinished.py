"""Calibrations that end before their last run: kept between runs, and gone on with if they are the same. Reads no files."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import CalibrationError
from ..quant.calibration import Calibration

RUNS_DONE = "runs_done"
RESTS_PER_SAVE = 9  # times as long as it took: a large model's calibration is a gigabyte


class Keeper:
    """Keeps an unfinished calibration between two runs: a crash, which nobody can catch, then costs the runs since the last time."""

    def __init__(self, keep: Callable[[Calibration], None] | None, done: int) -> None:
        """keep: writes it; None keeps nothing. done: runs that are kept already."""
        self._keep, self._kept, self._due = keep, done, 0.0

    def run_ended(self, done: int, make: Callable[[], Calibration]) -> None:
        """make: gives the calibration of `done` runs."""
        if time.monotonic() >= self._due:
            self.interrupted(done, make)

    def interrupted(self, done: int, make: Callable[[], Calibration]) -> None:
        """Cancelled, or out of memory, in a later run: that one is repeated."""
        if self._keep is None or done <= self._kept:
            return
        start = time.monotonic()
        self._keep(make())
        end = time.monotonic()
        self._kept, self._due = done, end + RESTS_PER_SAVE * (end - start)


def runs_done(start: Calibration | None, summary: dict[str, object], runs: int) -> int:
    """How many of the runs an unfinished calibration has seen already; 0 without one.

    Args: summary: of the calibration that is to go on from `start`.
    Raises: CalibrationError if `start` is finished or was made with other settings.
    """
    if start is None:
        return 0
    done = start.summary.get(RUNS_DONE)
    if not isinstance(done, int) or not 0 <= done < runs:
        raise CalibrationError("Calibrate: the calibration to go on from is finished already. Give another file name, or start anew.")
    before = {key: value for key, value in start.summary.items() if key != RUNS_DONE}
    for key in sorted(before.keys() | summary.keys()):
        if before.get(key) != summary.get(key):
            raise CalibrationError(
                f"Calibrate: the calibration to go on from has {key} {before.get(key)!r}, now it is {summary.get(key)!r}. "
                "Use the same settings, or start anew."
            )
    return done
