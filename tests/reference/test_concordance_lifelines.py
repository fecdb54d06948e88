"""Pair counts, Kaplan-Meier and log-rank sums against lifelines, with ties in times, events and risks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from lifelines import KaplanMeierFitter
from lifelines.statistics import logrank_test as lifelines_logrank
from lifelines.utils import concordance_index

from fourdvq.survival import CoxSiteState, Policy, Settings
from fourdvq.survival.concordance import comparable, count
from fourdvq.survival.curves import CurveRun, FrozenRun, FrozenScore
from fourdvq.survival.kaplan_meier import km_curve, km_sums, logrank_sums, logrank_test
from fourdvq.survival.local import drive
from fourdvq.survival.messages import GridRequest, HelloRequest, combine
from fourdvq.survival.shared import bin_index
from survival_data import KEY, cohorts


def tied_data(seed: int, n: int = 40):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, 12, n).astype(float)
    return t, rng.random(n) < 0.6, rng.integers(0, 5, n).astype(float), rng


def test_concordance_equals_lifelines_on_200_sets_with_ties():
    compared = 0
    for seed in range(200):
        t, e, risk, _ = tied_data(seed)
        i, j = comparable(t, e, np.zeros(40, dtype=int), np.ones(40, dtype=bool))
        concordant, tied = count(risk[:, None], i, j)
        ours = (concordant[0] + 0.5 * tied[0]) / len(i)
        assert ours == concordance_index(t, -risk, e)
        compared += 1
    assert compared == 200


def test_two_deaths_at_one_time_are_no_pair_and_a_censored_patient_at_a_death_is():
    t, e = np.array([5.0, 5.0, 5.0]), np.array([True, True, False])
    i, j = comparable(t, e, np.zeros(3, dtype=int), np.ones(3, dtype=bool))
    assert list(zip(i, j, strict=True)) == [(0, 2), (1, 2)]


def test_kaplan_meier_over_sites_equals_lifelines_on_pooled_rows():
    for seed in range(20):
        t, e, _, rng = tied_data(seed, 60)
        site = rng.integers(0, 3, 60)
        grid = GridRequest(edges=np.unique(t[e]), exact=True)
        total = combine([km_sums(t[site == k], e[site == k], grid) for k in range(3)])
        theirs = KaplanMeierFitter().fit(t, e).survival_function_at_times(grid.edges).to_numpy()
        assert np.abs(km_curve(total, grid.edges).survival - theirs).max() < 2e-15


def test_kaplan_meier_on_public_bins_equals_lifelines_on_times_rounded_up():
    sites = cohorts([90, 80], codes=2)
    states = [CoxSiteState(s, Policy(), KEY) for s in sites]
    curve = drive(CurveRun(HelloRequest(folds=0, purpose="km", run="r"), Settings.under(Policy())), states)
    t, e = np.concatenate([s.t for s in sites]), np.concatenate([s.e for s in sites])
    rounded = curve.edges[bin_index(GridRequest(edges=curve.edges), t)]
    fitted = KaplanMeierFitter().fit(rounded, e)
    np.testing.assert_allclose(
        curve.survival, fitted.survival_function_at_times(curve.edges).to_numpy(), rtol=0, atol=2e-15
    )
    leaving = -np.diff(np.append(curve.at_risk, 0))
    used = leaving > 0
    interval = fitted.confidence_interval_.loc[curve.edges[used]].to_numpy()
    np.testing.assert_allclose(np.column_stack([curve.low, curve.high])[used], interval, atol=1e-12)
    assert (leaving[used] >= 5).all()
    assert ((curve.deaths == 0) | (curve.deaths >= 5)).all()
    assert (np.diff(curve.edges, prepend=0) >= 30).all()


def test_stratified_logrank_equals_lifelines_for_one_site_and_adds_over_sites():
    parts = []
    for seed in range(3):
        t, e, risk, _ = tied_data(seed, 50)
        group = risk > 2
        sums = logrank_sums(t, e, group, np.zeros(50, dtype=int))
        theirs = lifelines_logrank(t[group], t[~group], e[group], e[~group])
        assert logrank_test(sums)[0] == pytest.approx(theirs.test_statistic, rel=1e-10)
        assert logrank_test(sums)[1] == pytest.approx(theirs.p_value, rel=1e-10)
        parts.append((t, e, group, sums))
    total = combine([p[3] for p in parts])
    t, e, group = (np.concatenate([p[k] for p in parts]) for k in range(3))
    together = logrank_sums(t, e, group, np.repeat(np.arange(3), 50))
    np.testing.assert_allclose(total.observed_minus_expected, together.observed_minus_expected)
    np.testing.assert_allclose(total.variance, together.variance)


def frozen_score(sites, codes):
    columns = np.concatenate([np.column_stack([s.X[:, codes], s.C]) for s in sites])
    return FrozenScore(beta=np.linspace(0.5, -0.3, 5), mean=columns.mean(axis=0), sd=columns.std(axis=0, ddof=1))


def test_frozen_coefficients_at_an_external_site_need_pair_counts_only():
    sites, codes = cohorts([70], codes=6), (4, 1)
    score = frozen_score(sites, list(codes))
    state = CoxSiteState(sites[0], Policy(), KEY)
    run = FrozenRun(HelloRequest(folds=0, codes=codes, purpose="external", run="r"), score)
    c = drive(run, [state])
    frame = pd.DataFrame(np.column_stack([sites[0].X[:, codes], sites[0].C]))
    risk = ((frame - score.mean) / score.sd * score.beta).sum(axis=1)
    assert c == pytest.approx(concordance_index(sites[0].t, -risk, sites[0].e), abs=1e-12)
    assert [line.kind for line in state.audit] == ["HelloRequest", "ScaleRequest", "PairRequest"]


def test_within_site_concordance_sums_counts_and_does_not_average():
    big, small = cohorts([80, 12], codes=6)
    small = dataclasses.replace(small, t=np.arange(12.0), e=np.arange(12) < 2)
    score = frozen_score([big, small], [0, 1])
    hello = HelloRequest(folds=0, codes=(0, 1))
    alone = [drive(FrozenRun(hello, score), [CoxSiteState(s, "off")]) for s in (big, small)]
    both = drive(FrozenRun(hello, score), [CoxSiteState(s, "off") for s in (big, small)])
    pairs = [len(comparable(s.t, s.e, np.zeros(len(s.t), dtype=int), s.t >= 0)[0]) for s in (big, small)]
    assert both == pytest.approx(np.average(alone, weights=pairs), abs=1e-12)
    assert abs(both - np.mean(alone)) > 1e-3
