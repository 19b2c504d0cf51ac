"""SQNR: the definition, and how steps and prompts are combined."""

import math

import pytest
import torch

from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.sqnr import StepSqnr, sqnr_db


def test_sqnr_db_of_one_percent_noise_energy_is_20_db():
    reference = torch.full((100,), 10.0)
    assert sqnr_db(reference, reference + 1.0) == pytest.approx(20.0)


def test_sqnr_db_at_the_extremes():
    reference = torch.ones(4)
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(reference, torch.tensor([1.0, float("nan"), 1.0, 1.0])) == -math.inf


def test_step_sqnr_sums_energies_over_prompts_before_taking_db():
    sums = StepSqnr()
    sums.add(0, torch.tensor([10.0]), torch.tensor([11.0]))  # alone: 20 dB
    sums.add(0, torch.tensor([1.0]), torch.tensor([2.0]))  # alone: 0 dB
    sums.add(1, torch.tensor([10.0]), torch.tensor([10.1]))
    assert sums.per_step_db() == pytest.approx([10 * math.log10(101 / 2), 40.0], abs=1e-4)
    assert sums.worst_db() == pytest.approx(17.03, abs=0.01)
    assert sums.mean_db() == pytest.approx((17.03 + 40) / 2, abs=0.01)


def test_mac_counter_gives_the_share_that_really_ran_as_integers():
    counter = MacCounter()
    counter.record("conv", 300, integer=True)
    counter.record("linear", 100, integer=False)
    assert counter.integer_share() == 0.75
    assert MacCounter().integer_share() == 0.0
