"""Laws of the federated Cox regression: derivatives, order, splitting, scale, ties, batches, masks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdvq.survival import CoxSiteState, ModelRun, Settings, fit_cox_batch, fit_federated_cox
from fourdvq.survival.cox import evaluate, prepare
from fourdvq.survival.local import drive, share_masks
from fourdvq.survival.messages import MESSAGES, CoxRequest, HelloRequest, Sums, combine
from fourdvq.survival.newton import unpack
from fourdvq.survival.scale import scale_from_moments, site_moments
from survival_data import KEY, cohort, cohorts, rows, stacked, with_folds

QUICK = settings(max_examples=20, deadline=None, derandomize=True)


def small(n: int, seed: int, *, folds: int = 2, codes: int = 3, step: float = 50.0):
    return with_folds(cohort(n, codes=codes, seed=seed, step=step, name=f"s{seed}"), folds)


def evaluated(sites, beta=None, *, ties="efron"):
    """The summed message of all models at a common beta."""
    scale = scale_from_moments(combine([site_moments(s) for s in sites]), rounded=False)
    active = np.ones((len(sites[0].train), sites[0].X.shape[1] + 1), dtype=bool)
    beta = np.full((active.sum(), 4), 0.3) if beta is None else beta
    request = CoxRequest(np.zeros(1, dtype=np.int64), active, beta)
    return combine([evaluate(prepare(s, scale, ties=ties), request) for s in sites])


def assert_same(a: Sums, b: Sums, tolerance: float = 1e-12):
    for name, value in a.arrays().items():
        other = b.arrays()[name]
        np.testing.assert_allclose(value, other, rtol=tolerance, atol=tolerance * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_gradient_and_information_are_derivatives_of_the_likelihood(ties):
    sites = [small(40, 1), small(30, 2)]
    rng = np.random.default_rng(0)
    at = rng.normal(0, 0.4, (8, 4))
    sums, h = evaluated(sites, at, ties=ties), 1e-5
    for k in range(4):
        up, down = at.copy(), at.copy()
        up[:, k] += h
        down[:, k] -= h
        above, below = evaluated(sites, up, ties=ties), evaluated(sites, down, ties=ties)
        slope = (above.log_likelihood - below.log_likelihood) / (2 * h)
        bend = (above.gradient - below.gradient) / (2 * h)
        np.testing.assert_allclose(sums.gradient[:, k], slope, atol=1e-6)
        np.testing.assert_allclose(unpack(sums.information, 4)[:, k], -bend, atol=1e-5)


@QUICK
@given(seed=st.integers(0, 10_000), n=st.integers(6, 60))
def test_order_of_rows_and_sites_changes_nothing(seed, n):
    sites = [small(n, seed), small(n + 5, seed + 1)]
    rng = np.random.default_rng(seed)
    mixed = [rows(s, rng.permutation(len(s.t))) for s in reversed(sites)]
    assert_same(evaluated(sites), evaluated(mixed))


@QUICK
@given(seed=st.integers(0, 10_000), parts=st.integers(2, 4), ties=st.sampled_from(["efron", "breslow"]))
def test_sum_of_site_messages_is_the_message_of_the_stacked_strata(seed, parts, ties):
    sites = [small(15 + 7 * k, seed + k) for k in range(parts)]
    assert_same(evaluated(sites, ties=ties), evaluated([stacked(sites)], ties=ties))


@QUICK
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 40))
def test_shared_baseline_does_not_depend_on_how_rows_are_split_over_sites(seed, cut):
    whole = cohort(40, codes=1, seed=seed, step=60.0)
    frame = pd.DataFrame(whole.C, columns=["a", "b", "c"]).assign(t=whole.t, e=whole.e)
    order = np.random.default_rng(seed).permutation(40)
    parts = [frame.iloc[order[:cut]], frame.iloc[order[cut:]]]
    one = fit_federated_cox([frame], "t", "e", ["a", "b", "c"], baseline="shared")
    two = fit_federated_cox(parts, "t", "e", ["a", "b", "c"], baseline="shared")
    assert list(one.status) == list(two.status)
    np.testing.assert_allclose(one.coef, two.coef, rtol=1e-9, atol=1e-10)
    assert one.concordance == two.concordance


@QUICK
@given(seed=st.integers(0, 10_000), factor=st.floats(1e-3, 1e3), shift=st.floats(-5, 5))
def test_scale_and_origin_of_a_column_change_no_p(seed, factor, shift):
    site = small(50, seed)
    other = dataclasses.replace(site, X=site.X * factor, C=site.C + shift)
    a, b = fit_cox_batch([site]), fit_cox_batch([other])
    both = a.converged & b.converged
    np.testing.assert_allclose(a.p[both], b.p[both], atol=1e-7)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.float32, object])
def test_dtype_of_a_binary_column_changes_nothing(dtype):
    site = small(40, 3)
    base = dataclasses.replace(site, X=(np.median(site.X, axis=0) < site.X).astype(float))
    other = dataclasses.replace(base, X=base.X.astype(dtype), e=base.e.astype(dtype))
    np.testing.assert_array_equal(fit_cox_batch([base]).coef, fit_cox_batch([other]).coef)


def test_efron_equals_breslow_without_tied_deaths():
    sites = [small(40, 5, step=1e-9), small(30, 6, step=1e-9)]
    assert len(np.unique(sites[0].t)) == 40
    efron, breslow = fit_cox_batch(sites), fit_cox_batch(sites, ties="breslow")
    np.testing.assert_allclose(efron.coef, breslow.coef, rtol=1e-10)


def test_a_site_without_deaths_adds_exactly_nothing():
    sites = [small(40, 7), small(30, 8)]
    silent = dataclasses.replace(small(25, 9), e=np.zeros(25))
    scale = scale_from_moments(combine([site_moments(s) for s in sites]), rounded=False)
    active = np.ones((2, 4), dtype=bool)
    message = evaluate(prepare(silent, scale), CoxRequest(np.zeros(1, dtype=np.int64), active, np.ones((8, 4))))
    assert all(not value.any() for value in message.arrays().values())


@pytest.mark.parametrize("n_codes", [1, 5, 300])
def test_a_batch_of_codes_equals_one_batch_per_code(n_codes):
    sites = [with_folds(s, 2) for s in cohorts([50, 40], codes=n_codes)]
    together = fit_cox_batch(sites)
    for code in {0, n_codes // 2, n_codes - 1}:
        alone = fit_cox_batch([dataclasses.replace(s, X=s.X[:, [code]]) for s in sites])
        np.testing.assert_allclose(together.coef[:, [code]], alone.coef, rtol=1e-8, atol=1e-12)
        assert (together.status[:, [code]] == alone.status).all()


def test_penalizer_is_divided_by_all_patients_also_with_strata():
    site = cohort(60, codes=1, seed=4)
    frame = pd.DataFrame(site.C, columns=["a", "b", "c"]).assign(t=site.t, e=site.e)
    free, tight = (
        fit_federated_cox([frame[:30], frame[30:]], "t", "e", ["a", "b", "c"], penalizer=p) for p in (0.0, 10.0)
    )
    assert np.abs(tight.coef).max() < 0.1 * np.abs(free.coef).max()
    assert tight.log_likelihood < free.log_likelihood


@pytest.mark.parametrize("n_sites", [2, 3, 5])
def test_masked_sums_give_the_unmasked_estimates(n_sites):
    sites = [with_folds(s, 2) for s in cohorts([50] * n_sites, codes=20)]
    fitted = []
    for masked in (False, True):
        states = [CoxSiteState(s, "off", KEY) for s in sites]
        if masked:
            share_masks(states, run="r1")
        fitted.append(drive(ModelRun(HelloRequest(folds=-1), Settings(), count="training"), states))
    plain, masked_fit = fitted
    ok = plain.fits.ok & masked_fit.fits.ok
    assert ok.sum() >= 0.8 * ok.size
    assert np.nanmax(np.abs(plain.fits.beta - masked_fit.fits.beta)[ok]) < 1e-11  # in SD
    both = ~np.isnan(plain.concordance) & ~np.isnan(masked_fit.concordance)
    np.testing.assert_array_equal(plain.concordance[both], masked_fit.concordance[both])


def test_every_answer_is_additive_and_survives_taking_apart():
    for request_type, answer_type in MESSAGES.values():
        assert hasattr(answer_type, "__add__")
        assert request_type.__doc__
    sums = evaluated([small(30, 1)])
    again = type(sums).from_parts(sums.arrays(), sums.scalars())
    assert_same(sums, again, 0.0)
    twice = sums + again
    np.testing.assert_array_equal(twice.gradient, 2 * sums.gradient)
