"""Tables that cannot mislead, and sums that travel."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from fourdvq.errors import ConfigError, ModelError
from fourdvq.evaluation.conformal import horizon_counts, public_bins, score_counts
from fourdvq.evaluation.reconstruction import score_reconstruction
from fourdvq.evaluation.summary import (
    CONTROL_ROWS,
    RowSums,
    combine,
    format_table,
    from_key,
    mean_interval,
    sums_of,
    table,
    verdict,
)
from fourdvq.evaluation.trajectory import LongitudinalPatient, horizon_label, score_patient, score_trajectories
from fourdvq.metrics import mse
from fourdvq.plan import Plan
from temporal_cases import lung_box, scan_at, small_world

PLAN = Plan(name="test", profile_sha256="")


def patient(seed: int = 0) -> LongitudinalPatient:
    return LongitudinalPatient(f"p{seed}", (0.0, 1.0, 2.0), lambda i: scan_at(float(i), seed=seed)[None], lung_box())


@pytest.fixture(scope="module")
def sums() -> list[RowSums]:
    return score_trajectories(small_world(), [patient(0), patient(1)], PLAN)


def test_the_table_shows_the_model_between_its_controls(sums):
    text = format_table(sums)
    for label in ("copy of the last scan", "linear in the codes", "autoencoder ceiling", "not a forecast score"):
        assert label in text
    assert "2 patients, 2 predicted scans" in text
    assert "copying (95 % interval of skill)" in text
    assert "warning: fewer than 64 patients" in text


@pytest.mark.parametrize("row", CONTROL_ROWS)
def test_a_table_without_one_of_its_control_rows_cannot_be_printed(sums, row):
    with pytest.raises(ModelError, match="E_CONTROLS"):
        format_table([s for s in sums if s.row != row])
    with pytest.raises(ModelError, match="E_CONTROLS"):
        table([s for s in sums if s.row != row])


def test_row_names_travel_and_come_back(sums):
    allowed = re.compile(r"[a-z][a-z0-9_./<>+ -]{0,79}")  # what a message lets a row be called
    for one in sums:
        assert allowed.fullmatch(one.key), one.key
        assert from_key(one.key, one.n, one.total, one.total_sq) == one


def test_population_change_is_a_row_only_if_its_rate_is_given(sums):
    assert "population_change" not in {s.row for s in sums}
    found = score_trajectories(small_world(), [patient()], PLAN, population_rate=torch.zeros(4))
    by_key = {s.key: s.total for s in found}
    still = by_key["population_change/extrapolation/mse/lung"]
    assert still == pytest.approx(by_key["persistence_decoded/extrapolation/mse/lung"])


def test_a_foreign_model_cannot_take_the_name_of_a_control():
    with pytest.raises(ConfigError, match="E_VALUE"):
        score_patient(small_world(), patient(), PLAN, forecasters={"persistence": lambda s, g, y, m: [s[-1, 0]]})


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="E_VALUE"):
        score_patient(small_world(), patient(), PLAN, mode="guess")


def test_better_than_copying_is_said_only_if_the_interval_excludes_zero():
    assert verdict(sums_of("model", "s", [0.2, 0.3, 0.25, 0.22])) == "better than copying"
    assert verdict(sums_of("model", "s", [0.9, -0.5, 0.3])) == "not better than copying"
    assert verdict(sums_of("model", "s", [-0.9, -0.8, -0.85])) == "worse than copying"
    assert verdict(sums_of("model", "s", [5.0])) == "not better than copying"
    assert verdict(sums_of("model", "s", [])) == "not better than copying"


def test_undefined_values_are_left_out_and_lower_n():
    one = sums_of("model", "s", [1.0, math.nan, 2.0])
    assert (one.n, one.total, one.total_sq) == (2, 3.0, 5.0)
    assert all(math.isnan(x) for x in mean_interval(sums_of("model", "s", [])))


def test_sums_of_different_rows_do_not_add():
    with pytest.raises(ValueError, match="different rows"):
        sums_of("model", "a", [1.0]) + sums_of("model", "b", [1.0])
    assert len(combine([sums_of("model", "a", [1.0]), sums_of("model", "b", [1.0])])) == 2


@pytest.mark.parametrize(
    ("years", "label"), [(0.3, "0-0.5"), (0.5, "0-0.5"), (0.7, "0.5-1"), (2.0, "1-2"), (3.1, "2+")]
)
def test_horizons_fall_into_bins_with_the_upper_end_included(years, label):
    assert horizon_label(years, (0.5, 1.0, 2.0)) == label


def test_reconstruction_is_the_mean_over_scans():
    world = small_world()
    scans = [scan_at(float(i))[None] for i in range(3)]
    found = {s.key: s for s in score_reconstruction(world.vqgan, scans, lung_of=lambda i: lung_box())}
    with torch.no_grad():
        errors = [mse((world.vqgan(s[None] - 0.5).recon[0, 0] + 0.5).clamp(0, 1), s[0]) for s in scans]
    one = found["reconstruction/reconstruction/mse/whole"]
    assert one.n == 3
    assert one.total / one.n == pytest.approx(np.mean(errors), rel=1e-5)
    assert "reconstruction/reconstruction/ssim/lung" in found


def test_conformal_counts_put_failures_beyond_all_bins():
    counts = score_counts([0.1, -0.2, math.nan, 5.0], public_bins(1.0, 5))
    assert counts.tolist() == [2, 0, 0, 0, 0, 2]


def test_conformal_counts_are_apart_for_each_horizon():
    counts = horizon_counts([0.1, 0.3, 0.5], [0.4, 0.9, 3.0], public_bins(1.0, 5), (0.5, 1.0, 2.0))
    assert counts.sum(axis=1).tolist() == [1, 1, 0, 1]


def test_bins_need_a_width():
    with pytest.raises(ConfigError, match="E_VALUE"):
        public_bins(0.0)
