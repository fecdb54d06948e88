"""The paper's rule against a plain loop of lifelines, and its laws."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fourdvq.survival import CoxSiteState, PaperRule, Policy, SelectionRun, Settings, select_biomarkers
from fourdvq.survival.folds import assign_folds
from fourdvq.survival.local import drive, share_masks
from fourdvq.survival.messages import HelloRequest
from fourdvq.survival.selection import rank
from survival_data import KEY, TIGHT, cohorts, rows

STRONG = {"codes": 12, "true": 2, "log_hr": 1.0}


def lifelines_loop(sites, folds=5, n_codes=12, rule=None):
    """(selected, p (F, B), C (F, B)) as a hospital would compute them from pooled rows."""
    from lifelines import CoxPHFitter
    from lifelines.utils import concordance_index

    rule = rule or PaperRule()
    p, c, hr = (np.full((folds, n_codes), np.nan) for _ in range(3))
    fold = [assign_folds(s.ids, s.e, folds=folds, key=KEY, site=s.name) for s in sites]
    pooled = np.concatenate(fold)
    frames = pd.concat(
        [pd.DataFrame(s.C, columns=["c0", "c1", "c2"]).assign(t=s.t, e=s.e, site=k) for k, s in enumerate(sites)],
        ignore_index=True,
    )
    X = np.concatenate([s.X for s in sites])
    X = (X - X.mean(axis=0)) / X.std(axis=0, ddof=1)
    for f in range(folds):
        for b in range(n_codes):
            data = frames.assign(b=X[:, b])
            fitted = CoxPHFitter().fit(data[pooled != f], "t", "e", strata=["site"], fit_options=TIGHT)
            p[f, b], hr[f, b] = fitted.summary.loc["b", "p"], fitted.hazard_ratios_["b"]
            held = data[pooled == f]
            risk = held[list(fitted.params_.index)] @ fitted.params_
            # Within-site pairs: concordant pairs summed over sites.
            good, pairs = 0.0, 0.0
            for _, part in held.assign(risk=risk).groupby("site"):
                t, e, r = (part[k].to_numpy() for k in ("t", "e", "risk"))
                comparable = e[:, None] & ((t[:, None] < t) | ((t[:, None] == t) & ~e))
                score = (r[:, None] > r) + 0.5 * (r[:, None] == r)
                good, pairs = good + score[comparable].sum(), pairs + comparable.sum()
                if comparable.any():
                    assert score[comparable].mean() == pytest.approx(concordance_index(t, -r, e))
            c[f, b] = good / pairs
    keep = ((hr > rule.min_hr) & (p < rule.max_p) & (c > rule.min_c)).all(axis=0)
    order = sorted(np.flatnonzero(keep), key=lambda b: (-c[:, b].mean(), p[:, b].max(), b))
    return tuple(int(b) for b in order[: rule.top]), p, c


@pytest.fixture(scope="module")
def strong():
    return cohorts([85, 70], seed=3, **STRONG)


def test_the_selected_list_equals_that_of_a_lifelines_loop(strong):
    selected, p, c = lifelines_loop(strong)
    ours = select_biomarkers(strong, key=KEY, permutations=0, disclosure="off")
    assert len(selected) >= 2
    assert ours.selected == selected
    table = ours.table.pivot(index="fold", columns="code")
    assert np.abs(table["p"].to_numpy() - p).max() < 1e-8
    np.testing.assert_array_equal(table["c"].to_numpy(), c)
    reordered = select_biomarkers(
        [rows(s, np.random.default_rng(0).permutation(len(s.t))) for s in strong[::-1]],
        key=KEY,
        permutations=0,
        disclosure="off",
    )
    assert reordered.selected == selected
    assert reordered.folds_digest == ours.folds_digest


def test_correlations_are_those_of_the_pooled_rows(strong):
    ours = select_biomarkers(strong, key=KEY, permutations=0, disclosure="off")
    X = np.concatenate([s.X for s in strong])[:, list(ours.selected)]
    np.testing.assert_allclose(ours.correlations, np.corrcoef(X.T), atol=1e-12)


@pytest.mark.parametrize("n_sites", [2, 3])
def test_masked_and_rounded_scale_select_the_same_list_with_the_same_table(n_sites):
    sites = cohorts([70] * n_sites, seed=3, **STRONG)
    hello = HelloRequest(folds=5, run="r1", sites=n_sites)
    tables = []
    for policy in (Policy(), None):
        states = [CoxSiteState(s, policy or "off", KEY) for s in sites]
        if policy:
            share_masks(states, run="r1")
        run = SelectionRun(hello, Settings.under(policy), permutations=0)
        drive(run, states)
        tables.append(run.finished([s.card() for s in states]))
    under, off = tables
    kept = under.table["status"] == "ok"
    assert kept.mean() > 0.5
    np.testing.assert_allclose(under.table["p"][kept], off.table["p"][kept], atol=1e-8)
    np.testing.assert_array_equal(under.table["c"][kept], off.table["c"][kept])
    assert [c for c in off.selected if c not in under.withheld] == list(under.selected)


def test_permutation_p_counts_replicates_that_select_as_many(strong):
    found = select_biomarkers(strong, key=KEY, permutations=19, disclosure="off")
    assert found.selected
    assert found.permutation_p <= 0.2
    assert found.permutation_p * 20 == pytest.approx(round(found.permutation_p * 20))
    again = select_biomarkers(strong, key=KEY, permutations=19, disclosure="off")
    assert again.permutation_p == found.permutation_p
    nothing = select_biomarkers(cohorts([50, 40], codes=6, true=0), key=KEY, permutations=3, disclosure="off")
    assert nothing.selected == ()
    assert nothing.permutation_p == 1.0


def test_leaving_out_codes_that_fail_in_the_first_fold_changes_no_permutation_count(strong):
    # Benjamini-Hochberg at q = 1 keeps every code, and evaluates all folds for all codes.
    quick = select_biomarkers(strong, key=KEY, permutations=10, disclosure="off")
    full = select_biomarkers(strong, key=KEY, permutations=10, disclosure="off", rule=PaperRule(bh_q=1.0))
    assert quick.selected == full.selected
    assert quick.permutation_p == full.permutation_p


@pytest.mark.parametrize(
    "rule", [PaperRule(p_value="lr"), PaperRule(c_model="biomarker"), PaperRule(bh_q=0.05), PaperRule(top=1)]
)
def test_variants_of_the_rule_select_from_the_codes_that_meet_them(strong, rule):
    found = select_biomarkers(strong, key=KEY, permutations=2, disclosure="off", rule=rule)
    table = found.table[found.table["code"].isin(found.selected)]
    assert (table["p_lr" if rule.p_value == "lr" else "p"] < rule.max_p).all()
    assert (table["c_biomarker" if rule.c_model == "biomarker" else "c"] > rule.min_c).all()
    assert (table["hr"] > 1).all()
    assert table["passes"].all()
    assert len(found.selected) <= rule.top


def test_likelihood_ratio_p_is_that_of_two_nested_fits(strong):
    from lifelines import CoxPHFitter

    found = select_biomarkers(strong, key=KEY, permutations=0, disclosure="off", folds=2)
    site = [assign_folds(s.ids, s.e, folds=2, key=KEY, site=s.name) != 0 for s in strong]
    data = pd.concat(
        [
            pd.DataFrame(np.column_stack([s.X[:, 0] / 0.01, s.C]), columns=["b", "x", "y", "z"]).assign(
                t=s.t, e=s.e, site=k
            )[train]
            for k, (s, train) in enumerate(zip(strong, site, strict=True))
        ]
    )
    full, less = (
        CoxPHFitter().fit(d, "t", "e", strata=["site"], fit_options=TIGHT).log_likelihood_
        for d in (data, data.drop(columns="b"))
    )
    from scipy.stats import chi2

    row = found.table.query("code == 0 and fold == 0").iloc[0]
    assert row["p_lr"] == pytest.approx(chi2.sf(2 * (full - less), 1), abs=1e-10)


def test_order_is_mean_c_then_largest_p_then_index():
    c = np.array([[0.6, 0.7, 0.7, 0.7], [0.6, 0.7, 0.7, 0.7]])
    p = np.array([[0.001, 0.002, 0.001, 0.001], [0.001, 0.001, 0.001, 0.001]])
    assert list(rank(np.arange(4), c, p)) == [2, 3, 1, 0]


def test_patients_with_a_missing_covariate_are_left_out_and_counted(strong):
    C = strong[0].C.copy()
    C[[3, 9], 1] = np.nan
    found = select_biomarkers(
        [dataclasses.replace(strong[0], C=C), strong[1]], key=KEY, permutations=0, disclosure="off"
    )
    kept = np.delete(np.arange(len(C)), [3, 9])
    without = select_biomarkers([rows(strong[0], kept), strong[1]], key=KEY, permutations=0, disclosure="off")
    pd.testing.assert_frame_equal(found.table, without.table)
    assert "<5 patients" in found.warnings[0]


def test_fewer_than_five_codes_are_reported_as_fewer(strong):
    found = select_biomarkers(strong, key=KEY, permutations=0, disclosure="off", rule=PaperRule(max_p=1e-12))
    assert found.selected == ()
    assert found.correlations.shape == (0, 0)
    assert any("not relaxed" in note for note in found.warnings)
    assert found.record()["permutation_p"] is None


@pytest.mark.parametrize(
    "change", [{"ids": None}, {"name": ""}, {"ids": ("x",) * 85}], ids=["no ids", "no name", "twice"]
)
def test_a_site_without_ids_or_name_is_refused(strong, change):
    with pytest.raises(ValueError, match=r"ids|name"):
        select_biomarkers([{**dataclasses.asdict(strong[0]), **change}, strong[1]], key=KEY, permutations=0)


def test_a_run_fed_with_the_recorded_sums_goes_on_where_it_stopped(strong):
    hello = HelloRequest(folds=3)
    whole, states = SelectionRun(hello, Settings(), permutations=0), [CoxSiteState(s, "off", KEY) for s in strong]
    recorded = []
    while (request := whole.request()) is not None:
        sums = states[0].answer(request) + states[1].answer(request)
        recorded.append((request, sums))
        whole.update(sums)
    again: Any = SelectionRun(hello, Settings(), permutations=0)
    for request, sums in recorded:
        for name, value in again.request().arrays().items():
            np.testing.assert_array_equal(value, request.arrays()[name])
        again.update(sums)
    pd.testing.assert_frame_equal(again.result().table, whole.result().table)
    with pytest.raises(ValueError, match="after the end"):
        again.update(recorded[0][1])


@pytest.mark.slow
def test_the_selected_list_of_256_codes_equals_that_of_a_lifelines_loop():
    sites = cohorts([85, 56], seed=11, codes=256, true=6, log_hr=0.6)
    ours = select_biomarkers(sites, key=KEY, permutations=0)
    live = [b for b in range(256) if b not in ours.withheld]
    slim = [dataclasses.replace(s, X=s.X[:, live]) for s in sites]
    selected, p, _ = lifelines_loop(slim, n_codes=len(live))
    assert tuple(live[b] for b in selected) == ours.selected
    table = ours.table[~ours.table["code"].isin(ours.withheld)].pivot(index="fold", columns="code")
    assert np.nanmax(np.abs(table["p"].to_numpy() - p)) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(("skewed", "most"), [(False, 0.15), (True, 0.35)])
def test_cohorts_without_effects_are_selected_from_rarely(skewed, most):
    # P(any) is about 0.03 for codes with normal shares. Rare, skewed codes pass one fold twice as often as p says, and
    # P(any) is about 0.15: what the permutation P is for. Bounds: 40 cohorts, three standard errors above.
    hits = []
    for k in range(40):
        sites = cohorts([85, 56], seed=1000 * k + 7, true=0)
        if not skewed:
            rng = np.random.default_rng(k)
            sites = [dataclasses.replace(s, X=rng.normal(size=(len(s.t), 188))) for s in sites]
        hits.append(bool(select_biomarkers(sites, key=KEY, permutations=0).selected))
    assert np.mean(hits) <= most
