"""When an unfinished calibration is kept, and what a run that was interrupted costs."""

import pytest

from stepquant.hosts import unfinished
from stepquant.hosts.unfinished import RESTS_PER_SAVE, Keeper


@pytest.fixture
def clock(monkeypatch):
    """The time that Keeper sees: clock[0]."""
    now = [100.0]
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: now[0])
    return now


def _keeper(clock, seconds: float, done: int = 0):
    kept = []

    def keep(calibration):
        clock[0] += seconds
        kept.append(calibration)

    return Keeper(keep, done), kept


def test_every_run_is_kept_where_writing_is_quick(clock):
    keeper, kept = _keeper(clock, 0.0)
    for done in (1, 2, 3):
        keeper.run_ended(done, lambda done=done: done)
    assert kept == [1, 2, 3]


def test_writing_takes_a_tenth_of_the_time_at_most(clock):
    keeper, kept = _keeper(clock, 2.0)
    start = clock[0]
    for done in range(1, 101):
        clock[0] += 1.0  # a run
        keeper.run_ended(done, lambda done=done: done)
    assert len(kept) >= 4 and 2.0 * len(kept) <= (clock[0] - start) / (RESTS_PER_SAVE + 1) + 2.0


def test_an_interrupted_run_keeps_what_was_not_kept_yet(clock):
    keeper, kept = _keeper(clock, 2.0)
    for done in (1, 2):
        keeper.run_ended(done, lambda done=done: done)
    keeper.interrupted(2, lambda: 2)
    keeper.interrupted(2, lambda: "again")
    assert kept == [1, 2]


def test_nothing_new_is_not_written_over_what_is_there(clock):
    keeper, kept = _keeper(clock, 0.0, done=2)
    keeper.interrupted(2, lambda: "less")
    Keeper(None, 0).run_ended(1, lambda: pytest.fail("nobody wants it"))
    assert not kept
