"""Risk groups of a frozen model over sites: curves, log-rank, calibration and paired C against lifelines and SciPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.statistics import logrank_test as lifelines_logrank
from lifelines.utils import concordance_index

from fourdvq.survival import CoxSiteState, Policy, Settings
from fourdvq.survival.curves import FrozenScore, PairedRun, RiskGroupRun
from fourdvq.survival.local import drive, share_masks
from fourdvq.survival.longitudinal import compare_concordance
from fourdvq.survival.messages import GridRequest, HelloRequest
from fourdvq.survival.shared import bin_index
from survival_data import KEY, TIGHT, cohorts

CODES = (0, 2)
HELLO = HelloRequest(folds=0, codes=CODES, purpose="km", run="r", sites=2)


def frame(site):
    columns = np.column_stack([site.X[:, CODES], site.C])
    return pd.DataFrame(columns, columns=list("abxyz")).assign(t=site.t, e=site.e.astype(int), site=site.name)


@pytest.fixture(scope="module")
def fitted():
    """Two sites and the Cox model of their rows, with the site as stratum, as a frozen score."""
    sites = cohorts([170, 150], codes=4, true=3, log_hr=0.5, seed=3)
    rows = pd.concat([frame(site) for site in sites], ignore_index=True)
    model = CoxPHFitter().fit(rows, "t", "e", strata=["site"], fit_options=TIGHT)
    columns = rows[list("abxyz")]
    mean, sd = columns.mean().to_numpy(), columns.std().to_numpy()
    return sites, rows, model, FrozenScore(beta=model.params_.to_numpy() * sd, mean=mean, sd=sd)


def risk(rows, score):
    return ((rows[list("abxyz")].to_numpy() - score.mean) / score.sd) @ score.beta


def grouped(sites, score, *, masked=False):
    states = [CoxSiteState(site, Policy(), KEY) for site in sites]
    if masked:
        share_masks(states, run="r")
    return drive(RiskGroupRun(HELLO, Settings.under(Policy()), score), states)


def test_curves_of_the_groups_equal_lifelines_on_times_rounded_up_to_bins_that_hold_five_or_none(fitted):
    sites, rows, _, score = fitted
    found = grouped(sites, score)
    for g, (group, curve) in enumerate(found.curves.items()):
        assert group == ("low", "high")[g]
        own = rows[(risk(rows, score) > 0) == bool(g)]
        rounded = curve.edges[bin_index(GridRequest(edges=curve.edges), own["t"].to_numpy())]
        theirs = KaplanMeierFitter().fit(rounded, own["e"])
        wanted = theirs.survival_function_at_times(curve.edges).to_numpy()
        np.testing.assert_allclose(curve.survival, wanted, rtol=0, atol=2e-15)
        assert len(curve.edges) > 2
        for site in sites:
            part = own[own["site"] == site.name]
            index = bin_index(GridRequest(edges=curve.edges), part["t"].to_numpy())
            leaving = np.bincount(index, minlength=len(curve.edges))
            deaths = np.bincount(index, part["e"], minlength=len(curve.edges))
            assert not ((leaving > 0) & (leaving < 5)).any()
            assert not ((deaths > 0) & (deaths < 5)).any()


def test_the_stratified_logrank_test_equals_lifelines_at_one_site_and_its_closed_form_over_two(fitted):
    sites, rows, _, score = fitted
    one = grouped(sites[:1], score)
    own = rows[rows["site"] == sites[0].name]
    high = risk(own, score) > 0
    theirs = lifelines_logrank(own["t"][high], own["t"][~high], own["e"][high], own["e"][~high])
    assert one.chi2 == pytest.approx(theirs.test_statistic, rel=1e-9)
    assert one.p == pytest.approx(theirs.p_value, rel=1e-9)
    # Score test of the group in a stratified Cox model = the stratified log-rank test, up to the tie correction.
    both = grouped(sites, score)
    parts = [grouped([site], score) for site in sites]
    assert max(part.chi2 for part in parts) < both.chi2 < sum(part.chi2 for part in parts) + 1e-9


def test_expected_survival_is_the_mean_prediction_of_the_stratified_model_of_lifelines(fitted):
    sites, rows, model, score = fitted
    found = grouped(sites, score)
    assert {row.asked_years for row in found.calibration} >= {1.0}
    for row in found.calibration:
        own = rows[(risk(rows, score) > 0) == (row.group == "high")]
        # Steps of its baselines at the bin's upper end: its own prediction would interpolate between death times.
        baseline = model.baseline_cumulative_hazard_.loc[: row.years * 365.25 + 1e-6].ffill().iloc[-1]
        hazard = own["site"].map(baseline) * model.predict_partial_hazard(own)
        assert row.expected == pytest.approx(float(np.exp(-hazard).mean()), abs=1e-8)
        assert row.patients == len(own)
        assert row.low <= row.observed <= row.high
        assert abs(row.years - row.asked_years) <= 0.25 * row.asked_years


def test_masks_move_neither_curves_nor_calibration(fitted):
    sites, _, _, score = fitted
    plain, masked = grouped(sites, score), grouped(sites, score, masked=True)
    for group, curve in plain.curves.items():
        np.testing.assert_array_equal(curve.survival, masked.curves[group].survival)
    assert masked.chi2 == pytest.approx(plain.chi2, rel=1e-9)
    ours, theirs = ([row.expected for row in found.calibration] for found in (plain, masked))
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def with_versions(site, seed):
    """The site's codes real, with noise, and with much noise, side by side."""
    rng, spread = np.random.default_rng(seed), site.X.std(axis=0)
    noisy = [site.X + size * spread * rng.normal(size=site.X.shape) for size in (0.4, 3.0)]
    return dataclasses.replace(site, X=np.column_stack([site.X, *noisy]))


def paired(sites, score, policy="off"):
    hello = dataclasses.replace(HELLO, purpose="longitudinal", source="paired", versions=3, sites=len(sites))
    return drive(PairedRun(hello, score), [CoxSiteState(site, policy, KEY) for site in sites])


def test_paired_concordance_and_its_interval_agree_with_the_delete_one_jackknife_at_one_site(fitted):
    sites, _, _, score = fitted
    site = with_versions(sites[0], 4)
    found = paired([site], score, Policy())
    k = site.X.shape[1] // 3
    risks = []
    for version in range(3):
        part = dataclasses.replace(site, X=site.X[:, version * k : (version + 1) * k])
        risks.append(risk(frame(part), score))
        c = concordance_index(site.t, -risks[-1], site.e)
        assert found.concordance[version].value == pytest.approx(c, abs=1e-12)
    for other, difference in zip(risks[1:], found.differences, strict=True):
        theirs = compare_concordance(site, risks[0], other)
        assert difference.value == pytest.approx(theirs.difference, abs=1e-12)
        assert difference.high - difference.low == pytest.approx(theirs.high - theirs.low, rel=0.03)
    assert (found.patients, found.deaths) == (len(site.t), int(site.e.sum()))


def test_the_interval_over_sites_is_that_of_one_site_with_as_many_strata(fitted):
    sites, _, _, score = fitted
    apart = [with_versions(site, k) for k, site in enumerate(sites)]
    one = dataclasses.replace(
        apart[0],
        X=np.concatenate([s.X for s in apart]),
        C=np.concatenate([s.C for s in apart]),
        t=np.concatenate([s.t for s in apart]),
        e=np.concatenate([s.e for s in apart]),
        ids=None,
        strata=np.repeat([0, 1], [len(s.t) for s in apart]),
    )
    ours, theirs = paired(apart, score), paired([one], score)
    assert ours == theirs


def test_equal_versions_differ_by_nothing_and_a_site_without_pairs_adds_nothing(fitted):
    sites, _, _, score = fitted
    site = dataclasses.replace(sites[0], X=np.column_stack([sites[0].X] * 3))
    found = paired([site], score)
    assert all((d.value, d.low, d.high) == (0.0, 0.0, 0.0) for d in found.differences)
    silent = dataclasses.replace(site, e=np.zeros(len(site.t), dtype=bool))
    assert paired([site, silent], score) == found
    assert np.isnan(paired([silent], score).concordance[0].value)
