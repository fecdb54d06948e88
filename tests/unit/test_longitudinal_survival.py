"""Later scans and changes as biomarkers, small-sample honesty, heterogeneity, and the survival table of a site."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter
from lifelines.utils import concordance_index

from fourdvq.survival import CoxSite
from fourdvq.survival.biomarkers import biomarker_table, scaled_age
from fourdvq.survival.heterogeneity import inverse_variance
from fourdvq.survival.longitudinal import (
    FrozenModel,
    code_changes,
    compare_concordance,
    from_landmark,
    one_year_follow_up,
)
from fourdvq.survival.small_sample import assess_model, banner
from survival_data import KEY, TIGHT, cohort, cohorts


@dataclass
class Row:
    pseudonym: str
    age: float | None = 70.0
    sex: int | None = 1
    smoking: int | None = 0
    time_days: int | None = 400
    event: int | None = 1


def noise(seed: int, n: int = 14, deaths: int = 9, codes: int = 5) -> CoxSite:
    rng = np.random.default_rng(seed)
    C = np.column_stack([rng.normal(size=n), rng.integers(0, 2, (n, 2))])
    e = np.zeros(n, dtype=bool)
    e[rng.permutation(n)[:deaths]] = True
    return CoxSite(X=rng.normal(size=(n, codes)), C=C, t=rng.exponential(500.0, n), e=e, name="one")


def test_the_one_year_scan_is_the_nearest_to_365_days_inside_the_window():
    days = [0, 100, 300, 440, 500, 900]
    assert one_year_follow_up(days, 1) == 3  # 465 wanted: 440 is 25 away, 500 is 35
    assert one_year_follow_up(days, 1, window_days=20) is None
    assert one_year_follow_up(days, 4) == 5
    assert one_year_follow_up(days, 5) is None


def test_changes_are_follow_up_minus_second_scan_for_patients_with_both():
    second = {"b": np.array([0.2, 0.8]), "a": np.array([0.5, 0.5]), "x": np.array([1.0, 0.0])}
    follow_up = {"a": np.array([0.6, 0.4]), "b": np.array([0.1, 0.9]), "y": np.array([0.0, 1.0])}
    changes = code_changes(second, follow_up)
    assert changes.ids == ("a", "b")
    np.testing.assert_allclose(changes.change, [[0.1, -0.1], [-0.1, 0.1]])
    assert changes.without_pair == ("x", "y")


def test_time_counts_from_the_landmark_and_who_left_before_it_is_left_out():
    t, e, remain = from_landmark(np.array([500.0, 200.0, 300.0]), np.array([1, 1, 0]), np.array([100.0, 250.0, 299.0]))
    assert list(t) == [400.0, 1.0]
    assert list(e) == [True, False]
    assert list(remain) == [True, False, True]


def test_frozen_risk_is_the_linear_predictor_of_the_chosen_codes_and_covariates():
    site = cohort(20, codes=6)
    model = FrozenModel(codes=(4, 1), coef=np.array([2.0, -1.0, 0.5, 0.25, 0.1]))
    expected = np.column_stack([site.X[:, [4, 1]], site.C]) @ model.coef
    np.testing.assert_allclose(model.risk(site), expected, atol=1e-14)
    with pytest.raises(ValueError, match="covariates"):
        dataclasses.replace(model, codes=(4,)).risk(site)


def test_difference_of_concordance_and_its_jackknife_equal_a_plain_loop():
    site = noise(3, n=17, deaths=10)
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=17), rng.normal(size=17)
    found = compare_concordance(site, real, generated)
    whole = [concordance_index(site.t, -r, site.e) for r in (real, generated)]
    assert [found.real, found.generated] == pytest.approx(whole)
    assert found.difference == pytest.approx(whole[0] - whole[1])
    without = []
    for k in range(17):
        keep = np.arange(17) != k
        c = [concordance_index(site.t[keep], -r[keep], site.e[keep]) for r in (real, generated)]
        without.append(c[0] - c[1])
    se = np.sqrt(16 / 17 * ((without - np.mean(without)) ** 2).sum())
    from scipy.stats import t as student

    assert (found.high - found.low) / 2 == pytest.approx(student.ppf(0.975, 16) * se)
    assert (found.patients, found.deaths) == (17, 10)
    same = compare_concordance(site, real, real)
    assert same.difference == same.low == same.high == 0.0


def test_ridge_estimates_of_the_multivariable_model_equal_lifelines():
    site = noise(5, n=40, deaths=25)
    found = assess_model([site], replicates=0)
    frame = pd.DataFrame(np.column_stack([site.X, site.C]), columns=list("abcdxyzw")).assign(t=site.t, e=site.e)
    theirs = CoxPHFitter(penalizer=1.0 / 40).fit(frame, "t", "e", fit_options=TIGHT)  # lambda = n * penalizer = 1
    assert found.ridge == 1.0
    assert np.abs((found.coef - theirs.params_.to_numpy()) / found.se).max() < 1e-8
    assert found.concordance == theirs.concordance_index_
    free = CoxPHFitter().fit(frame, "t", "e", fit_options=TIGHT)
    assert np.abs(found.unpenalised_coef - free.params_.to_numpy()).max() < 1e-6
    assert np.isnan(found.permutation_p)


def test_leave_one_out_concordance_equals_a_loop_of_plainly_optimised_fits():
    site = noise(7, n=16, deaths=11, codes=1)
    columns = np.column_stack([site.X, site.C])
    sd, risk = columns.std(axis=0, ddof=1), np.zeros(16)
    frame = pd.DataFrame((columns - columns.mean(axis=0)) / sd, columns=list("abcd")).assign(t=site.t, e=site.e)
    for k in range(16):
        rest = frame[np.arange(16) != k]
        # Not lifelines: it would scale the penalty by the SD of the rows it sees, not by the common scale.
        risk[k] = risk_of_left_out(rest, frame.loc[[k]])
    found = assess_model([site], ridge=1.0, replicates=0)
    assert found.cross_validation == "leave-one-out"
    assert found.cross_validated == pytest.approx(concordance_index(site.t, -risk, site.e))


def risk_of_left_out(rest: pd.DataFrame, left_out: pd.DataFrame) -> float:
    """Risk of one row by a ridge Cox fit (lambda 1, Breslow = Efron without ties) found with a general optimiser."""
    from scipy.optimize import minimize

    z, t, e = rest[list("abcd")].to_numpy(), rest["t"].to_numpy(), rest["e"].to_numpy()

    def loss(beta):
        eta = z @ beta
        return -sum(eta[i] - np.log(np.exp(eta[t >= t[i]]).sum()) for i in np.flatnonzero(e)) + 0.5 * beta @ beta

    return float(left_out[list("abcd")].to_numpy()[0] @ minimize(loss, np.zeros(4), tol=1e-10).x)


def test_a_model_of_noise_carries_the_banner_and_an_honest_concordance():
    found = [assess_model([noise(seed)], replicates=0) for seed in range(25)]
    assert all(f.banner and f.epv == pytest.approx(9 / 8) for f in found)
    # In-sample C of pure noise is about 0.85 with ridge 1; left out it is about one half.
    assert 0.75 < np.mean([f.concordance for f in found]) < 0.92
    assert 0.35 < np.mean([f.cross_validated for f in found]) < 0.62
    assert "9 deaths" in found[0].banner
    assert banner(40, 8) == ""
    assert banner(39, 8)


def test_permutation_p_of_noise_is_not_small_and_of_a_strong_effect_is():
    p = [assess_model([noise(seed)], replicates=19).permutation_p for seed in range(6)]
    assert np.mean(p) > 0.25
    site = noise(0, n=40, deaths=30)
    strong = dataclasses.replace(site, t=np.exp(5 - 3 * site.X[:, 0]))
    assert assess_model([strong], replicates=19).permutation_p == 0.05


def test_over_several_sites_folds_replace_leave_one_out_and_leave_out_five_patients_each():
    sites = cohorts([30, 30], codes=2)
    found = assess_model(sites, replicates=5, key=KEY)
    assert found.cross_validation == "folds"
    assert 0.3 < found.cross_validated < 0.9
    assert found.parameters == 5
    with pytest.raises(ValueError, match="ids"):
        assess_model([dataclasses.replace(s, ids=None) for s in sites], replicates=0)
    with pytest.raises(ValueError, match="death"):
        assess_model([dataclasses.replace(sites[0], e=np.zeros(30))])


def test_inverse_variance_summary_of_equal_estimates_has_no_heterogeneity():
    same = inverse_variance([0.5, 0.5], [0.1, 0.2])
    assert same.coef == pytest.approx(0.5)
    assert same.se == pytest.approx((100 + 25) ** -0.5)
    assert (same.q, same.i2) == (0.0, 0.0)
    apart = inverse_variance([0.0, 1.0, np.nan], [0.1, 0.1, 0.1])
    assert apart.q == pytest.approx(50.0)
    assert apart.i2 == pytest.approx(0.98)
    assert apart.sites == 2
    assert np.isnan(inverse_variance([0.3], [0.1]).p)
    with pytest.raises(ValueError, match="estimate"):
        inverse_variance([np.nan], [1.0])


def test_the_survival_table_joins_complete_rows_in_a_fixed_coding_and_counts_the_rest():
    shares = {p: np.array([0.25, 0.75]) for p in "abcd"}
    rows = [
        Row("a"),
        Row("b", age=81.5, sex=0, smoking=1, event=0),
        Row("c", smoking=None),
        Row("e"),
        Row("d", age=None),
    ]
    table = biomarker_table(shares, rows, name="leuven")
    np.testing.assert_allclose(table.site.C, [[0.0, 1, 0], [1.15, 0, 1]])
    assert table.site.ids == ("a", "b")
    assert list(table.site.e) == [True, False]
    assert table.site.names == ("age", "sex", "smoking")
    assert (table.incomplete, table.without_histogram) == (2, 1)
    assert scaled_age(60.0) == -1.0
    with pytest.raises(ValueError, match="repeat"):
        biomarker_table(shares, [Row("a"), Row("a")], name="s")
    with pytest.raises(ValueError, match="lengths"):
        biomarker_table({"a": np.zeros(2), "b": np.zeros(3)}, [Row("a"), Row("b")], name="s")
    assert biomarker_table(shares, [], name="s").site.X.shape == (0, 2)
