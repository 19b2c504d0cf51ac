"""Which steps calibration looks at, going on with an unfinished calibration, and fair merging of unlike runs."""

import math

import pytest
import torch

from stepquant.errors import CalibrationError
from stepquant.hosts.unfinished import RUNS_DONE, runs_done
from stepquant.quant.calibration import Calibration, merge
from stepquant.quant.calibration_steps import StepChoice, choose_timesteps, timestep_entropy
from stepquant.quant.observer import LayerObserver

STEPS = [60, 45, 30, 15]


def statistics(sizes=(1, 1, 8, 8)):
    observer = LayerObserver(channels=16)
    generator = torch.Generator().manual_seed(0)
    for bucket, size in zip(STEPS, sizes, strict=True):
        observer.update(torch.randn(1, 64, 16, generator=generator) * size, [bucket])
    return {"middle_block.1.proj_in": observer.statistics()}


def test_choose_timesteps_adds_entropy_and_rarity_as_the_paper_does():
    """Worked by hand: 0.2 + 1.5 / 1 = 1.7, 1.0 + 1.5 / 3 = 1.5, 0.1 + 1.5 / 2 = 0.85."""
    entropy, used = {10: 1.0, 20: 0.2, 30: 0.1}, {10: 2, 30: 1}
    assert choose_timesteps(entropy, used, 2) == [20, 10]


def test_full_mode_observes_every_bucket_to_the_end():
    choice = StepChoice("full")
    for _ in range(3):
        assert choice.begin_run(statistics()) is None
        assert all(choice.observes(bucket) for bucket in STEPS)
        choice.end_run(STEPS)


def test_noisiest_mode_stops_after_the_first_step():
    choice = StepChoice("noisiest")
    assert choice.begin_run({}) == 1 and choice.observes(60)


def test_srm_mode_looks_at_the_first_run_whole_and_then_at_a_quarter():
    choice = StepChoice("srm")
    assert choice.begin_run({}) is None and all(choice.observes(bucket) for bucket in STEPS)
    choice.end_run(STEPS)
    seen = []
    for _ in range(8):
        stop = choice.begin_run(statistics())
        picked = [bucket for bucket in STEPS if choice.observes(bucket)]
        assert len(picked) == 1 and stop == 1 + STEPS.index(picked[0])
        seen += picked
        choice.end_run(STEPS[:stop])
    assert set(seen) == set(STEPS), "rarity brings every timestep its turn"


def test_timestep_entropy_is_known_for_every_visited_bucket():
    entropy = timestep_entropy(statistics())
    assert sorted(entropy) == sorted(STEPS)
    assert all(0 <= value <= math.log(4) + 1e-6 for value in entropy.values())


SUMMARY = {"steps": 4, "seed": 1}


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({**SUMMARY, RUNS_DONE: 8}, "finished already"),
        (SUMMARY, "finished already"),
        ({**SUMMARY, "steps": 5, RUNS_DONE: 2}, "has steps 5, now it is 4"),
    ],
    ids=["all runs", "no count", "other settings"],
)
def test_an_unfinished_calibration_must_be_the_same_one(found, sentence):
    with pytest.raises(CalibrationError, match=sentence):
        runs_done(Calibration({}, found), SUMMARY, 8)


def test_going_on_counts_the_finished_runs():
    assert runs_done(Calibration({}, {**SUMMARY, RUNS_DONE: 3}), SUMMARY, 8) == 3
    assert runs_done(None, SUMMARY, 8) == 0


def test_merge_keeps_rows_in_proportion_to_what_each_run_saw():
    """One call against fifteen: one sixteenth of the rows, not half of them."""
    observers = [LayerObserver(channels=8), LayerObserver(channels=8)]
    for observer, calls, value in zip(observers, (15, 1), (1.0, 2.0), strict=True):
        for _ in range(calls):
            observer.update(torch.full((1, 4096, 8), value), [3])
    short = observers[1]
    for _ in range(15):  # as many recorded rows from a sixteenth of the calls' pixels
        short.update(torch.full((1, 16, 8), 2.0), [3])
    merged = merge(*(Calibration({"a": observer.statistics()}) for observer in observers)).layers["a"]
    share = float((merged.rows[:, 0] == 2.0).float().mean())
    assert len(merged.rows) == 256 and share < 0.15
