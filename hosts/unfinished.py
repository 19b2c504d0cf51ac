"""Going on with a calibration that was cancelled: how far it came, and that it is the same one. Reads no files."""

from __future__ import annotations

from ..errors import CalibrationError
from ..quant.calibration import Calibration

RUNS_DONE = "runs_done"


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
