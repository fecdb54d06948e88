"""What becomes of columns, sites and folds that cannot be fitted: a status, never a crash and never a number."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from fourdvq.errors import SurvivalError
from fourdvq.survival import fit_cox_batch, fit_federated_cox
from fourdvq.survival.newton import STATUSES
from survival_data import cohort, cohorts, with_folds


def frame(n: int = 80, seed: int = 3) -> pd.DataFrame:
    site = cohort(n, codes=2, seed=seed)
    return pd.DataFrame(site.C, columns=["a", "b", "c"]).assign(t=site.t, e=site.e)


def batch(change, n_codes: int = 3, folds: int = 4):
    """The batch after `change(sites)` replaced the code column 1 of the sites."""
    sites = [with_folds(s, folds) for s in cohorts([50, 40], codes=n_codes)]
    return fit_cox_batch([change(s, k) for k, s in enumerate(sites)])


def with_code(site, values):
    X = site.X.copy()
    X[:, 1] = values
    return dataclasses.replace(site, X=X)


def no_number(result, fold, code):
    return all(np.isnan(values[fold, code]).all() for values in (result.coef, result.se, result.p))


def test_a_constant_code_is_dead_in_every_fold_and_the_others_are_fitted():
    for constant in (0.0, 0.00412345):
        result = batch(lambda s, k, c=constant: with_code(s, c))
        assert (result.status[:, 1] == "dead").all()
        assert no_number(result, 0, 1)
        assert result.converged[:, [0, 2]].all()


def test_a_code_that_varies_only_in_one_validation_fold_is_dead_in_that_fold_alone():
    # A mutation that decides per code instead of per fold and code fails here.
    def only_fold_2(site, _):
        values = np.where(site.train[2], 0.0, np.arange(len(site.t)) + 1.0)
        return with_code(site, values)

    result = batch(only_fold_2)
    assert result.status[2, 1] == "dead"
    assert (result.status[[0, 1, 3], 1] != "dead").all()


def test_a_code_whose_carriers_are_all_censored_is_infinite_and_has_no_p():
    result = batch(lambda s, k: with_code(s, (~s.e) * (np.arange(len(s.t)) % 3 == 0)))
    assert set(result.status[:, 1]) <= {"infinite", "capped"}
    assert no_number(result, 0, 1)
    assert not result.converged[:, 1].any()


def test_a_code_that_repeats_a_covariate_is_not_converged():
    result = batch(lambda s, k: with_code(s, s.C[:, 0]))
    assert (result.status[:, 1] == "not_converged").all()
    assert result.converged[:, [0, 2]].all()


def test_a_fold_without_deaths_has_too_few_events():
    def censored_fold_0(site, _):
        return dataclasses.replace(site, e=site.e & ~site.train[0])

    result = batch(censored_fold_0)
    assert (result.status[0] == "too_few_events").all()
    assert (result.status[1:] == "ok").all()


def test_statuses_are_the_declared_ones_and_converged_is_ok():
    result = batch(lambda s, k: with_code(s, (~s.e) * 1.0))
    assert set(result.status.ravel()) <= set(STATUSES)
    np.testing.assert_array_equal(result.converged, result.status == "ok")
    np.testing.assert_array_equal(result.converged, ~np.isnan(result.coef).any(axis=2))


def test_a_constant_covariate_is_left_out_and_the_others_equal_the_fit_without_it():
    data = frame().assign(k=7.0)
    with_it = fit_federated_cox([data[:40], data[40:]], "t", "e", ["a", "k", "b"])
    without = fit_federated_cox([data[:40], data[40:]], "t", "e", ["a", "b"])
    assert list(with_it.status) == ["ok", "dead", "ok"]
    assert np.isnan([with_it.coef[1], with_it.se[1], with_it.p[1]]).all()
    np.testing.assert_allclose(with_it.coef[[0, 2]], without.coef, rtol=1e-9)
    assert with_it.concordance == without.concordance


def test_a_column_that_runs_away_is_marked_and_the_others_reach_the_profile_likelihood():
    data = frame(120)
    data["carrier"] = (~data["e"] & (np.arange(120) % 2 == 0)).astype(float)
    fitted = fit_federated_cox([data], "t", "e", ["a", "carrier", "b"])
    assert list(fitted.status) == ["ok", "infinite", "ok"]
    # Carriers never die: in the limit they leave every risk set.
    limit = fit_federated_cox([data[data["carrier"] == 0]], "t", "e", ["a", "b"])
    np.testing.assert_allclose(fitted.coef[[0, 2]], limit.coef, atol=1e-4)


def test_collinear_columns_are_marked_and_the_other_is_fitted():
    data = frame().assign(twice=lambda d: 2 * d["a"])
    fitted = fit_federated_cox([data], "t", "e", ["a", "twice", "b"])
    assert list(fitted.status) == ["not_converged", "not_converged", "ok"]
    assert fitted.coef[2] == pytest.approx(fit_federated_cox([data], "t", "e", ["a", "b"]).coef[1], abs=1e-4)


@pytest.mark.parametrize("baseline", ["site", "shared"])
def test_empty_sites_and_sites_without_deaths_do_not_raise(baseline):
    data = frame()
    silent = data[:20].assign(e=False)
    plain = fit_federated_cox([data[20:50], data[50:]], "t", "e", ["a", "b"], baseline=baseline)
    padded = fit_federated_cox([data[:0], data[20:50], data[50:]], "t", "e", ["a", "b"], baseline=baseline)
    np.testing.assert_allclose(plain.coef, padded.coef, rtol=1e-10)
    nobody = fit_federated_cox([silent], "t", "e", ["a", "b"], baseline=baseline)
    assert set(nobody.status) == {"too_few_events"}
    assert np.isnan(nobody.coef).all()
    assert np.isnan(nobody.concordance)
    assert set(fit_federated_cox([data[:0]], "t", "e", ["a"], baseline=baseline).status) == {"too_few_events"}


def test_more_parameters_than_deaths_gives_statuses_and_no_crash():
    rng = np.random.default_rng(0)
    data = pd.DataFrame(rng.normal(size=(12, 8)), columns=list("abcdefgh"))
    data = data.assign(t=rng.exponential(size=12), e=np.arange(12) < 5)
    fitted = fit_federated_cox([data], "t", "e", list("abcdefgh"))
    assert set(fitted.status) <= set(STATUSES)
    ridge = fit_federated_cox([data], "t", "e", list("abcdefgh"), penalizer=0.1)
    assert set(ridge.status) == {"ok"}


def test_a_death_at_time_zero_is_allowed():
    data = frame()
    data.loc[0, ["t", "e"]] = [0.0, True]
    assert set(fit_federated_cox([data], "t", "e", ["a", "b"]).status) == {"ok"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"t": -1.0}, "column t"),
        ({"t": np.nan}, "column t"),
        ({"t": np.inf}, "column t"),
        ({"e": 2}, "column e"),
        ({"a": np.nan}, "column a"),
        ({"a": "x"}, "column a"),
    ],
)
def test_a_broken_value_is_a_value_error_that_names_column_and_rule_but_not_the_value(change, named):
    data = frame().astype(object)
    ((column, value),) = change.items()
    data.loc[7, column] = value
    with pytest.raises(ValueError, match=named) as caught:
        fit_federated_cox([frame(), data], "t", "e", ["a", "b"])
    assert isinstance(caught.value, SurvivalError)
    assert "site 1" in str(caught.value)
    assert f"found {value}" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"baseline": "x"}, {"ties": "exact"}, {"disclosure": "on"}, {"penalizer": -1.0}, {"ph": "rank"}],
    ids=lambda o: next(iter(o)),
)
def test_unknown_options_are_value_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fit_federated_cox([frame()], "t", "e", ["a"], **options)


@pytest.mark.parametrize("covariates", [[], ["a", "a"], ["a", "no such column"]])
def test_covariates_must_be_distinct_columns(covariates):
    with pytest.raises(ValueError, match=r"column|covariates"):
        fit_federated_cox([frame()], "t", "e", covariates)


def test_sites_that_disagree_in_shape_are_named():
    one, two = cohorts([20, 20], codes=3)
    with pytest.raises(ValueError, match="X"):
        fit_cox_batch([one, dataclasses.replace(two, X=two.X[:, :2])])
    with pytest.raises(ValueError, match="train"):
        fit_cox_batch([with_folds(one, 3), with_folds(two, 2)])
    with pytest.raises(ValueError, match="at least one site"):
        fit_cox_batch([])


def test_a_mapping_is_a_site_and_unknown_keys_are_refused():
    site = cohort(40, codes=3)
    plain = {"X": site.X, "C": site.C, "t": site.t, "e": site.e.astype(int)}
    np.testing.assert_array_equal(fit_cox_batch([plain]).coef, fit_cox_batch([site]).coef)
    with pytest.raises(ValueError, match="unknown key"):
        fit_cox_batch([{**plain, "times": site.t}])
    with pytest.raises(ValueError, match="missing"):
        fit_cox_batch([{**plain, "C": np.where(site.C > 1.2, np.nan, site.C)}])
