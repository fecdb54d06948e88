"""What the latent ODE refuses, and the half-year grid of the published code."""

from __future__ import annotations

import math

import pytest
import torch

from fourdvq.errors import ModelError
from fourdvq.models.latent_ode import snap_times
from temporal_cases import patients, small_ode


@pytest.mark.parametrize(
    ("years", "asked"),
    [
        ([0.0, 0.0], [1.0]),
        ([1.0, 0.5], [2.0]),
        ([0.5, 1.0], [0.2]),
        ([0.0, 1.0], [math.nan]),
        ([0.0, 1.0], [math.inf]),
        ([0.0, math.nan], [1.0]),
    ],
    ids=["one day", "unsorted", "before the first", "not a number", "infinite", "scan without a time"],
)
def test_times_without_a_defined_result_are_refused(years, asked):
    z, t, observed = patients(1, years)
    with pytest.raises(ModelError, match="E_TIMES"):
        small_ode()(z, t, observed, torch.tensor([asked]))


def test_a_patient_without_any_observed_scan_is_refused():
    z, t, observed = patients(1, [0.0, 1.0])
    with pytest.raises(ModelError, match="E_TIMES"):
        small_ode()(z, t, ~observed, torch.tensor([[1.0]]))


def test_the_half_year_grid_rounds_to_half_years_and_the_exact_grid_does_not():
    assert snap_times([0.0, 0.7, 1.9], "halfyear") == [0.0, 0.5, 2.0]
    assert snap_times([0.0, 0.7, 1.9], "exact") == [0.0, 0.7, 1.9]
