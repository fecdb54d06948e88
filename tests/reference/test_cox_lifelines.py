"""Federated Cox regression against lifelines on pooled rows, on five public data sets and on simulated code shares."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pytest

from fourdvq.survival import CoxSite, CoxSiteState, ModelRun, Policy, Settings, fit_cox_batch, fit_federated_cox
from fourdvq.survival.messages import GridRequest, HelloRequest, combine
from fourdvq.survival.shared import bin_index
from survival_data import KEY, TIGHT, cohorts, stacked, with_folds


@functools.cache
def public(name: str) -> tuple[pd.DataFrame, str, str]:
    """(table, duration, event) of a data set that lifelines ships."""
    from lifelines import datasets

    if name == "rossi":
        return datasets.load_rossi(), "week", "arrest"
    if name == "lung":
        columns = ["time", "status", "age", "sex", "ph.ecog", "wt.loss"]
        return datasets.load_lung().dropna()[columns].reset_index(drop=True), "time", "status"
    if name == "gbsg2":
        d = datasets.load_gbsg2()
        kept = d[["time", "cens", "age", "tsize", "pnodes", "estrec"]]
        return kept.assign(hormone=d.horTh == "yes"), "time", "cens"
    if name == "kidney":
        return datasets.load_kidney_transplant(), "time", "death"
    return datasets.load_larynx(), "time", "death"


@functools.cache
def reference(name: str, ties: int, strata: int, penalizer: float):
    from lifelines import CoxPHFitter

    data, duration, event = table(name, ties)
    options = {}
    if strata > 1:
        data = data.assign(stratum=np.arange(len(data)) % strata)
        options = {"strata": ["stratum"]}
    return CoxPHFitter(penalizer=penalizer).fit(data, duration, event, fit_options=TIGHT, **options)


@functools.cache
def table(name: str, ties: int) -> tuple[pd.DataFrame, str, str]:
    data, duration, event = public(name)
    if ties:
        data = data.assign(**{duration: np.ceil(data[duration] / ties) * ties})
    return data, duration, event


def frame(site: CoxSite, code: int) -> pd.DataFrame:
    return pd.DataFrame({"b": site.X[:, code], **{f"c{k}": site.C[:, k] for k in range(3)}, "t": site.t, "e": site.e})


def training(site: CoxSite) -> np.ndarray:
    assert site.train is not None
    return site.train


CASES = [
    ("rossi", 0, 2, "site", 0.0),
    ("rossi", 0, 3, "shared", 0.0),
    ("rossi", 10, 5, "site", 0.1),
    ("lung", 0, 1, "site", 0.0),
    ("lung", 30, 2, "shared", 0.0),
    ("lung", 0, 3, "site", 0.1),
    ("gbsg2", 30, 5, "site", 0.0),
    ("gbsg2", 0, 2, "shared", 0.1),
    ("kidney", 0, 2, "site", 0.0),
    ("kidney", 30, 5, "shared", 0.0),
    ("larynx", 0, 2, "site", 0.0),
    ("larynx", 0, 3, "shared", 0.0),
]


@pytest.mark.parametrize(("name", "ties", "sites", "baseline", "penalizer"), CASES)
def test_cox_over_sites_equals_lifelines_on_pooled_rows(name, ties, sites, baseline, penalizer):
    data, duration, event = table(name, ties)
    covariates = [c for c in data.columns if c not in (duration, event)]
    parts = [data[np.arange(len(data)) % sites == k] for k in range(sites)]
    ours = fit_federated_cox(parts, duration, event, covariates, baseline=baseline, penalizer=penalizer)
    theirs = reference(name, ties, sites if baseline == "site" else 1, penalizer)
    se = theirs.standard_errors_.to_numpy()
    assert np.abs((ours.coef - theirs.params_.to_numpy()) / se).max() < 1e-8
    assert np.abs(ours.se / se - 1).max() < 1e-7
    assert np.abs(ours.p - theirs.summary["p"].to_numpy()).max() < 1e-8
    np.testing.assert_allclose(ours.covariance, theirs.variance_matrix_.to_numpy(), rtol=1e-6, atol=1e-12)
    assert ours.concordance == theirs.concordance_index_
    assert set(ours.status) == {"ok"}
    if not penalizer:  # lifelines keeps the penalised likelihood
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood_, abs=1e-8)


def test_likelihood_at_zero_equals_lifelines_null_likelihood():
    data, duration, event = table("rossi", 0)
    ours = fit_federated_cox([data], duration, event, ["age", "prio"])
    assert ours.log_likelihood_null == pytest.approx(reference("rossi", 0, 1, 0.0)._ll_null_, abs=1e-9)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_batch_of_codes_equals_single_fits_per_fold(ties):
    sites = [with_folds(s, 3) for s in cohorts([60, 45], codes=6, step=40.0)]
    batch = fit_cox_batch(sites, ties=ties)
    for fold in range(3):
        for code in range(6):
            frames = [frame(s, code)[training(s)[fold]] for s in sites]
            one = fit_federated_cox(frames, "t", "e", ["b", "c0", "c1", "c2"], ties=ties)
            assert np.abs((batch.coef[fold, code] - one.coef) / one.se).max() < 1e-9
            assert np.abs(batch.p[fold, code] - one.p).max() < 1e-8
            assert batch.log_likelihood[fold, code] == pytest.approx(one.log_likelihood, abs=1e-9)


def test_batch_over_sites_equals_lifelines_stratified_by_site():
    from lifelines import CoxPHFitter

    sites = [with_folds(s, 2) for s in cohorts([80, 60], codes=5, step=30.0)]
    batch, pooled = fit_cox_batch(sites), stacked(sites)
    for code in range(5):
        data = frame(pooled, code).assign(site=pooled.strata)[training(pooled)[1]]
        data["b"] /= data["b"].std()  # lifelines is not as tight on raw shares
        theirs = CoxPHFitter().fit(data, "t", "e", strata=["site"], fit_options=TIGHT)
        z = batch.coef[1, code] / batch.se[1, code]
        assert np.abs(z - theirs.summary["z"].to_numpy()).max() < 1e-7
        assert np.abs(batch.p[1, code] - theirs.summary["p"].to_numpy()).max() < 1e-8


@pytest.mark.parametrize("transform", ["log", "identity"])
def test_proportional_hazards_test_equals_lifelines_with_strata(transform):
    from lifelines import CoxPHFitter
    from lifelines.statistics import proportional_hazard_test

    data, duration, event = table("rossi", 0)
    data = data.assign(stratum=np.arange(len(data)) % 2)
    covariates = [c for c in data.columns if c not in (duration, event, "stratum")]
    fitted = CoxPHFitter().fit(data, duration, event, strata=["stratum"], fit_options=TIGHT)
    theirs = proportional_hazard_test(fitted, data, time_transform=transform)
    theirs = theirs.summary["test_statistic"].loc[covariates].to_numpy()
    parts = [data[data["stratum"] == k].drop(columns="stratum") for k in range(2)]
    ours = fit_federated_cox(parts, duration, event, covariates, ph=transform)
    np.testing.assert_allclose(ours.ph_chi2, theirs, rtol=1e-6)


def test_shared_baseline_under_a_policy_equals_lifelines_on_times_rounded_to_the_agreed_grid():
    from lifelines import CoxPHFitter

    sites = cohorts([90, 80], codes=4)
    states = [CoxSiteState(s, Policy(), KEY) for s in sites]
    hello = HelloRequest(folds=0, baseline="shared", purpose="model", run="r1")
    run, grid = ModelRun(hello, Settings.under(Policy())), None
    while (request := run.request()) is not None:
        grid = request if isinstance(request, GridRequest) else grid
        run.update(combine([s.answer(request) for s in states]))
    assert grid is not None
    fitted, pooled = run.result(), stacked(sites)
    data = frame(pooled, 0).assign(t=grid.edges[bin_index(grid, pooled.t)])
    sd = fitted.study.units[0]
    data[["b", "c0", "c1", "c2"]] /= sd
    theirs = CoxPHFitter().fit(data, "t", "e", fit_options=TIGHT)
    assert (
        np.abs((fitted.fits.beta[0, 0] - theirs.params_.to_numpy()) / theirs.standard_errors_.to_numpy()).max() < 1e-8
    )
