"""Real, generated and carried-forward third scans of test patients, over three hospitals with their own guards."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from lifelines import CoxPHFitter
from lifelines.utils import concordance_index

from cox_sites import exchange_of, stage_context, survival_plan, table_sites
from fourdvq.training.latent_ode import initial_ode
from fourdvq_server.local_grid import LocalGrid
from fourdvq_server.stages import longitudinal
from survival_data import cohorts

CODES = (0, 2)
SIZES = (70, 60, 55)


def with_noise(site, seed, size):
    """The same patients with shares that are off by so many standard deviations."""
    X = site.X + size * site.X.std(axis=0) * np.random.default_rng(seed).normal(size=site.X.shape)
    return dataclasses.replace(site, X=X)


@pytest.fixture
def three(tmp_path):
    plan = survival_plan(folds=3)
    sites = table_sites(tmp_path / "sites", cohorts(SIZES, codes=6, log_hr=0.6, true=3, seed=5), plan)
    for site, test in zip(sites.values(), cohorts((45, 40, 35), codes=6, log_hr=0.6, true=3, seed=900), strict=True):
        real = dataclasses.replace(test, name=site.table.name)
        versions = (real, with_noise(real, 1, 0.5), with_noise(real, 2, 4.0))
        site.third = {"level": beside(versions), "change": beside(versions[:2])}
    return tmp_path, plan, sites


def beside(versions):
    """One table of the same patients with all versions of their codes side by side."""
    return dataclasses.replace(versions[0], X=np.column_stack([v.X for v in versions]))


def version(table, number, codes=6):
    return dataclasses.replace(table, X=table.X[:, number * codes : (number + 1) * codes])


def few(table, n=6):
    keep = np.arange(n)
    return dataclasses.replace(
        table, X=table.X[keep], C=table.C[keep], t=table.t[keep], e=table.e[keep], ids=table.ids[:n]
    )


def model_of(sites):
    """A frozen model of the codes, as stage survival would have fitted it: lifelines on the training rows."""
    import pandas as pd

    train = pd.concat([frame(site.table) for site in sites.values()])
    fitted = CoxPHFitter(penalizer=0.01).fit(train, "t", "e", strata=["site"])
    names = [name for name in train if name not in ("t", "e", "site")]
    rows = [
        {"name": name, "beta_per_sd": fitted.params_[name] * train[name].std(), "mean": m, "sd": train[name].std()}
        for name, m in train[names].mean().items()
    ]
    return {"coefficients": rows, "banner": ""}


def compared(folder, plan, sites, codes=CODES):
    with LocalGrid(sites, one_at_a_time=True) as grid:
        context = stage_context(folder / "coordinator", grid, sites, plan)
        context.store.stage("ode").write_round(1, {"weights": initial_ode(plan).state_dict(), "server_state": {}}, {})
        return longitudinal.compare(context, exchange_of(context), codes, model_of(sites)), context


def frame(site):
    """Codes of the model and covariates, in their own units."""
    import pandas as pd

    columns = {f"code_{code}": site.X[:, code] for code in CODES}
    columns |= {name: site.C[:, k] for k, name in enumerate(("age", "sex", "smoking"))}
    return pd.DataFrame({**columns, "t": site.t, "e": site.e.astype(int), "site": site.name})


def test_concordances_of_all_sources_are_those_of_lifelines_on_the_rows_and_come_with_intervals(three):
    folder, plan, sites = three
    facts, _ = compared(folder, plan, sites)
    rows = model_of(sites)["coefficients"]
    names = [row["name"] for row in rows]
    beta, sd = np.array([row["beta_per_sd"] for row in rows]), np.array([row["sd"] for row in rows])
    for feature, sources in longitudinal.SOURCES.items():
        part = facts[feature]
        for number, source in enumerate(sources):
            concordant = pairs = 0.0
            for site in sites.values():
                table = version(site.third[feature], number)
                risk = (frame(table)[names].to_numpy() / sd) @ beta
                n = comparable_pairs(table)
                concordant += n * concordance_index(table.t, -risk, table.e)
                pairs += n
            row = part["sources"][source]
            assert row["c"] == pytest.approx(concordant / pairs, abs=1e-9), source
            assert row["low"] < row["c"] < row["high"]
        for name, row in part["differences"].items():
            other = part["sources"][name.removeprefix("real - ")]["c"]
            assert row["c"] == pytest.approx(part["sources"]["real"]["c"] - other, abs=1e-12)
    level = facts["level"]
    assert facts["concordance"] == {name: row["c"] for name, row in level["sources"].items()}
    # Codes with much noise tell less, and 120 patients are enough to see it; a little noise is not seen.
    assert level["differences"]["real - carried"]["low"] > 0
    assert level["differences"]["real - generated"]["low"] < 0 < level["differences"]["real - generated"]["high"]
    assert facts["ended"] == []


def comparable_pairs(site):
    later = (site.t[None] > site.t[:, None]) | ((site.t[None] == site.t[:, None]) & ~site.e[None])
    return int((later & site.e[:, None] & ~np.eye(len(site.t), dtype=bool)).sum())


def test_small_test_sets_are_refused_by_design_and_the_record_says_so(three):
    folder, plan, sites = three
    for site in sites.values():
        site.third = {feature: few(table) for feature, table in site.third.items()}
    facts, _ = compared(folder, plan, sites)
    assert facts["concordance"] == {}
    assert "refused by design" in facts["why"]
    refused = dict.fromkeys(sorted(sites), "COX_REFUSED")
    assert facts["ended"] == [
        {"purpose": f"longitudinal {feature}", "sites": sorted(sites), "ended_by": refused}
        for feature in ("level", "change")
    ]


def test_one_small_site_is_left_out_of_all_sources_and_one_feature_may_lack_where_the_other_is_there(three):
    folder, plan, sites = three
    sites["siteb"].third["level"] = few(sites["siteb"].third["level"])
    for site in sites.values():
        site.third["change"] = few(site.third["change"])
    facts, _ = compared(folder, plan, sites)
    assert facts["sites"] == facts["level"]["sites"] == ["sitea", "sitec"]
    assert set(facts["concordance"]) == set(longitudinal.SOURCES["level"])
    assert facts["change"]["sources"] == {}
    assert facts["ended"][0]["ended_by"] == {"siteb": "COX_REFUSED"}


def test_without_a_selected_code_nobody_is_asked(three):
    folder, plan, sites = three
    with LocalGrid(sites, one_at_a_time=True) as grid:
        context = stage_context(folder / "coordinator", grid, sites, plan)
        facts = longitudinal.run(context)
    assert facts["why"].startswith("no code was selected")
    assert all(site.sent == [] for site in sites.values())
