"""The scalars of phantom patients: growth, survival, visits and identifiers, over cohorts large enough to tell."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from fourdvq.data.phantom import draw_patients, extent_at, hazard_at
from fourdvq.data.phantom.patients import PER_EXTENT
from fourdvq.errors import ConfigError

MANY = draw_patients(3000, 11)


@pytest.mark.parametrize(("site", "prefix"), [("leuven", "LEU"), ("southampton", "SOU"), ("external", "EXT")])
def test_ids_carry_the_prefix_of_their_site_and_never_repeat(site, prefix):
    ids = [p.patient_id for p in draw_patients(500, 3, site=site)]
    assert all(re.fullmatch(rf"{prefix}-\d{{6}}", text) for text in ids)
    assert len(set(ids)) == 500


def test_a_site_without_a_style_takes_the_first_three_letters_of_its_name():
    assert draw_patients(1, 3, site="3-gent")[0].patient_id.startswith("GEN-")


def test_patient_i_is_the_same_in_a_larger_cohort():
    assert draw_patients(5, 8) == draw_patients(40, 8)[:5]


def test_another_seed_or_site_gives_other_patients():
    base = draw_patients(5, 8)
    assert draw_patients(5, 9) != base
    assert [p.extent_at_start for p in draw_patients(5, 8, site="southampton")] != [p.extent_at_start for p in base]


def test_extent_rises_all_the_time_and_stays_below_one():
    years = np.linspace(0, 15, 200)
    for patient in MANY[:50]:
        extents = [extent_at(patient, t) for t in years]
        assert np.all(np.diff(extents) > 0)
        assert extents[-1] < 1.0


@pytest.mark.parametrize(("subtype", "low", "high"), [("slow", 0.03, 0.06), ("fast", 0.10, 0.20)])
def test_extent_grows_at_the_rate_of_the_subtype(subtype, low, high):
    step = 1e-4
    for patient in [p for p in MANY if p.subtype == subtype][:100]:
        slope = (extent_at(patient, step) - extent_at(patient, 0.0)) / step
        assert low - 1e-3 <= slope <= high + 1e-3


def test_baseline_extents_spread_over_their_range():
    extents = np.array([p.extent_at_start for p in MANY])
    assert extents.min() >= 0.05
    assert extents.max() <= 0.35
    assert np.percentile(extents, 90) - np.percentile(extents, 10) > 0.12


def test_hazard_rises_with_the_true_extent():
    hazards = [hazard_at(p, 0.0) for p in MANY]
    assert spearmanr([p.extent_at_start for p in MANY], hazards).statistic > 0.7


def test_time_to_death_follows_the_cumulative_hazard():
    # If T is drawn from h, the integral of h up to T is a unit exponential, censored where T is.
    fine = np.linspace(0.0, 1.0, 201)
    exposure = deaths = 0.0
    for patient in MANY:
        years = patient.time_days / 365.25
        extents = np.array([extent_at(patient, t) for t in fine * years])
        hazard = hazard_at(patient, 0.0) * np.exp(PER_EXTENT * (extents - extents[0]))
        exposure += float(np.trapezoid(hazard, fine * years))
        deaths += patient.event == "death"
    assert deaths == pytest.approx(exposure, rel=4 / np.sqrt(deaths))


def test_about_half_of_the_patients_die_under_observation():
    share = np.mean([p.event == "death" for p in MANY])
    assert 0.4 < share < 0.6
    assert {p.event for p in MANY} == {"death", "censored", "transplant"}


def test_every_scan_lies_before_the_end_of_follow_up_and_days_rise():
    for patient in MANY:
        days = [v.days for v in patient.visits]
        assert days[0] == 0
        assert all(b > a for a, b in itertools.pairwise(days))
        assert days[-1] <= patient.time_days


def test_visits_record_the_true_extent_and_hazard_of_their_day():
    for patient in MANY[:100]:
        for visit in patient.visits:
            assert visit.extent == pytest.approx(extent_at(patient, visit.years), abs=1e-4)
            assert visit.hazard == pytest.approx(hazard_at(patient, visit.years), rel=2e-3, abs=1e-5)


def test_the_longitudinal_share_decides_who_has_more_than_one_scan():
    patients = draw_patients(400, 5, longitudinal_share=0.5, scans_per_patient=(2, 3))
    counts = np.array([len(p.visits) for p in patients])
    assert set(counts) == {1, 2, 3}
    assert 0.4 < np.mean(counts > 1) < 0.6


@pytest.mark.parametrize(
    "wrong",
    [
        {"patients": 0},
        {"seed": -1},
        {"size": (8, 64, 64)},
        {"scans_per_patient": (3, 2)},
        {"longitudinal_share": 1.5},
        {"site": "a/b"},
    ],
)
def test_impossible_arguments_are_refused_by_name(wrong):
    arguments: dict[str, Any] = {"patients": 2, "seed": 1} | wrong
    with pytest.raises(ConfigError) as caught:
        draw_patients(arguments.pop("patients"), arguments.pop("seed"), **arguments)
    assert caught.value.code == "E_VALUE"
    assert next(iter(wrong)) in caught.value.where
