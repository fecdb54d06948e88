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
        site.third = {"real": real, "generated": with_noise(real, 1, 0.5), "carried": with_noise(real, 2, 4.0)}
    return tmp_path, plan, sites


def compared(folder, plan, sites, codes=CODES):
    with LocalGrid(sites, one_at_a_time=True) as grid:
        context = stage_context(folder / "coordinator", grid, sites, plan)
        context.store.stage("ode").write_round(1, {"weights": initial_ode(plan).state_dict(), "server_state": {}}, {})
        return longitudinal.compare(context, exchange_of(context), codes, sorted(sites)), context


def frame(site):
    """Codes of the model and covariates, in their own units."""
    import pandas as pd

    columns = {f"code_{code}": site.X[:, code] for code in CODES}
    columns |= {name: site.C[:, k] for k, name in enumerate(("age", "sex", "smoking"))}
    return pd.DataFrame({**columns, "t": site.t, "e": site.e.astype(int), "site": site.name})


def test_frozen_model_and_concordances_are_those_of_lifelines_on_the_rows(three):
    import pandas as pd

    folder, plan, sites = three
    facts, _ = compared(folder, plan, sites)
    names = [row["name"] for row in facts["model"]["coefficients"]]
    beta = np.array([row["beta_per_sd"] for row in facts["model"]["coefficients"]])
    sd = np.array([row["sd"] for row in facts["model"]["coefficients"]])
    train = pd.concat([frame(site.table) for site in sites.values()])
    scaled = train.assign(**{name: train[name] / s for name, s in zip(names, sd, strict=True)})
    fitter = CoxPHFitter(penalizer=plan.survival.ridge / len(train))
    tight = {"precision": 1e-22, "r_precision": -1}  # its default stops up to 4e-4 standard errors away
    fitter.fit(scaled, "t", "e", strata=["site"], fit_options=tight)
    # Its penalty is on columns of exactly SD 1, ours on the SD rounded to three digits: hence the tolerance.
    np.testing.assert_allclose(beta, fitter.params_[names].to_numpy(), rtol=5e-3, atol=1e-4)
    for source in longitudinal.SOURCES:
        concordant = pairs = 0.0
        for site in sites.values():
            table = site.third[source]
            risk = (frame(table)[names].to_numpy() / sd) @ beta
            n = comparable_pairs(table)
            concordant += n * concordance_index(table.t, -risk, table.e)
            pairs += n
        assert facts["concordance"][source] == pytest.approx(concordant / pairs, abs=1e-9), source
    assert facts["concordance"]["real"] > facts["concordance"]["carried"]
    assert facts["model"]["banner"] == ""
    assert facts["ended"] == []


def comparable_pairs(site):
    later = (site.t[None] > site.t[:, None]) | ((site.t[None] == site.t[:, None]) & ~site.e[None])
    return int((later & site.e[:, None] & ~np.eye(len(site.t), dtype=bool)).sum())


def test_small_test_sets_are_refused_by_design_and_the_record_says_so(three):
    folder, plan, sites = three
    few = np.arange(6)
    for site in sites.values():
        for source, table in site.third.items():
            site.third[source] = dataclasses.replace(
                table, X=table.X[few], C=table.C[few], t=table.t[few], e=table.e[few], ids=table.ids[:6]
            )
    facts, _ = compared(folder, plan, sites)
    assert facts["concordance"] == {}
    assert "refused by design" in facts["why"]
    assert facts["ended"] == [
        {
            "purpose": "longitudinal real",
            "sites": sorted(sites),
            "ended_by": dict.fromkeys(sorted(sites), "COX_REFUSED"),
        }
    ]
    assert facts["model"]["deaths_per_parameter"] > 5


def test_one_small_site_is_left_out_of_all_three_sources(three):
    folder, plan, sites = three
    small = sites["siteb"]
    for source, table in small.third.items():
        small.third[source] = dataclasses.replace(
            table, X=table.X[:6], C=table.C[:6], t=table.t[:6], e=table.e[:6], ids=table.ids[:6]
        )
    facts, _ = compared(folder, plan, sites)
    assert facts["sites"] == ["sitea", "sitec"]
    assert [e["ended_by"] for e in facts["ended"]] == [{"siteb": "COX_REFUSED"}]
    assert set(facts["concordance"]) == set(longitudinal.SOURCES)


def test_without_a_selected_code_nobody_is_asked(three):
    folder, plan, sites = three
    with LocalGrid(sites, one_at_a_time=True) as grid:
        context = stage_context(folder / "coordinator", grid, sites, plan)
        facts = longitudinal.run(context)
    assert facts["why"].startswith("no code was selected")
    assert all(site.sent == [] for site in sites.values())
