"""The evaluation's arithmetic against SciPy, brute force and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fourdvq.evaluation.changes import auroc_largest, average_ranks, change_metrics, slope
from fourdvq.evaluation.conformal import merged_quantile, public_bins, score_counts
from fourdvq.evaluation.summary import bootstrap_interval, mean_interval, sums_of


def test_the_interval_is_students_t():
    x = np.random.default_rng(0).normal(0.3, 1.0, 17)
    expected = stats.t.interval(0.95, 16, loc=x.mean(), scale=stats.sem(x))
    np.testing.assert_allclose(mean_interval(sums_of("model", "a", x)), (x.mean(), *expected), rtol=1e-10)


def test_the_bootstrap_interval_is_near_scipys():
    x = np.random.default_rng(1).exponential(1.0, 60)
    ours = bootstrap_interval(x.tolist(), seed=0)
    theirs = stats.bootstrap((x,), np.mean, method="percentile", random_state=0).confidence_interval
    np.testing.assert_allclose(ours[1:], (theirs.low, theirs.high), atol=0.03)
    assert ours == bootstrap_interval(x.tolist(), seed=0)


def test_ranks_and_slope_equal_scipys_with_ties():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
    np.testing.assert_array_equal(average_ranks(x), stats.rankdata(x))
    np.testing.assert_allclose(slope(x, y), stats.linregress(x, y).slope)


def test_correlations_equal_scipys():
    rng = np.random.default_rng(3)
    last, target, prediction = (torch.tensor(rng.uniform(size=(4, 5, 6))) for _ in range(3))
    lung = torch.tensor(rng.random((4, 5, 6)) < 0.7)
    g, p = (target - last)[lung].numpy(), (prediction - last)[lung].numpy()
    found = change_metrics(prediction, last, target, lung)
    assert found["change_correlation"] == pytest.approx(stats.pearsonr(p, g).statistic)
    changed = np.abs(g) > 0.02
    assert found["change_spearman"] == pytest.approx(stats.spearmanr(p[changed], g[changed]).statistic)


def test_auroc_counts_ordered_pairs_and_half_of_ties():
    rng = np.random.default_rng(4)
    g, p = rng.normal(size=60), rng.integers(0, 4, 60).astype(float)
    top = g >= np.sort(g)[-3]
    pairs = [(a > b) + 0.5 * (a == b) for a in p[top] for b in p[~top]]
    assert auroc_largest(p, g, share=0.05) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize(("n", "coverage"), [(19, 0.9), (44, 0.5), (88, 0.9)])
def test_conformal_bands_from_three_sites_cover_what_they_promise(n, coverage):
    """Exact coverage of split conformal prediction is the mean of a beta distribution, ceil((n + 1) c) / (n + 1)."""
    rng = np.random.default_rng(n)
    edges = public_bins(20.0, 4000)
    covered = []
    for _ in range(400):
        sites = np.array_split(rng.exponential(1.0, n), 3)
        width = merged_quantile([score_counts(site, edges) for site in sites], edges, coverage)
        covered.append(1 - math.exp(-width))
    expected = math.ceil((n + 1) * coverage) / (n + 1)
    assert np.mean(covered) == pytest.approx(expected, abs=4 * np.std(covered) / 20 + 0.003)


def test_ninety_percent_needs_nine_calibration_patients():
    edges = public_bins(1.0, 10)
    assert merged_quantile([score_counts([0.2] * 8, edges)], edges, 0.9) == math.inf
    assert merged_quantile([score_counts([0.2] * 9, edges)], edges, 0.9) == pytest.approx(0.2)


def test_the_merged_quantile_is_the_pooled_order_statistic_rounded_up_to_a_bin():
    rng = np.random.default_rng(5)
    scores = rng.uniform(0, 0.9, 57)
    edges = public_bins(1.0, 50)
    pooled = np.sort(scores)[math.ceil(58 * 0.9) - 1]
    width = merged_quantile([score_counts(scores[:20], edges), score_counts(scores[20:], edges)], edges, 0.9)
    assert pooled <= width <= pooled + 1 / 50 + 1e-12
