"""Honest numbers for a model of many parameters and few deaths.

With 14 patients and 8 parameters, a C of 1.0 is common in pure noise. So an in-sample C comes with a cross-validated C,
a permutation p and the events per variable, and below 5 of these with a banner that stands above the number. Leave-one-
out runs where one site holds all the data; over several sites folds leave out 5 or more patients of each, since sums
that differ by one patient reveal that patient. Why ridge 1 per SD: docs/reference/survival.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fourdvq.errors import SurvivalError
from fourdvq.survival.concordance import comparable, count, risks
from fourdvq.survival.cox import prepare
from fourdvq.survival.disclosure import Policy, as_policy
from fourdvq.survival.folds import assign_folds, training_rows
from fourdvq.survival.local import drive
from fourdvq.survival.messages import F64, Bool, HelloRequest
from fourdvq.survival.newton import Fits
from fourdvq.survival.run import CoxRun, Settings, Steps, Study, count_pairs, fit, open_study
from fourdvq.survival.state import CoxSiteState
from fourdvq.survival.table import CoxSite, strata_of

LEAST_EPV = 5.0  # below: banner
RIDGE_BELOW_EPV = 10.0
LEAST_LEFT_OUT = 5  # patients of a site in a fold
REPLICATES_AT_ONCE = 50


@dataclass(frozen=True, eq=False)
class Assessment:
    """A fitted model and how far its C can be trusted. coef, se, p (k + q,) in the units of the tables.

    `unpenalised_coef` is shown beside the ridge estimates, NaN where there is none. `banner` is empty when EPV >= 5.
    """

    coef: F64
    se: F64
    p: F64
    ridge: float
    unpenalised_coef: F64
    unpenalised_c: float
    concordance: float
    cross_validated: float
    cross_validation: Literal["leave-one-out", "folds"]
    permutation_p: float
    replicates: int
    patients: int
    deaths: int
    parameters: int
    epv: float
    banner: str


@dataclass(frozen=True, eq=False)
class _Fitted:
    study: Study
    ridge: float
    fits: Fits
    plain: Fits
    c: float
    plain_c: float
    folds_c: float
    permutation_p: float


class AssessmentRun(CoxRun[_Fitted]):
    """The steps over any transport. Fold 0 of the sites is everybody; the others are the cross-validation."""

    def __init__(
        self, hello: HelloRequest, settings: Settings, *, ridge: float | None = None, replicates: int = 200
    ) -> None:
        super().__init__(_steps(hello, settings, ridge, replicates))


def assess_model(
    sites: Sequence[CoxSite],
    *,
    ridge: float | None = None,
    replicates: int = 200,
    key: bytes = b"assessment",
    disclosure: Policy | Literal["off"] = "off",
) -> Assessment:
    """Fit all columns of X and C as one model and report it honestly.

    `ridge` per SD; None: 1 when there are fewer than 10 deaths per parameter, else 0. Leave-one-out for one site, folds
    for several, which then need `ids`. Raises SurvivalError without a death.
    """
    if not sites or not sum(int(site.e.sum()) for site in sites):
        raise SurvivalError("E_SURVIVAL_INPUT", where="column e", found="no death", wanted="at least one death")
    policy = as_policy(disclosure)
    tables = [dataclasses.replace(s, X=s.X[:, :0], C=np.column_stack([s.X, s.C]), names=()) for s in sites]
    alone = len(tables) == 1
    folds = 2 if alone else max(2, min(5, min(len(s.t) for s in tables) // LEAST_LEFT_OUT))
    tables = [dataclasses.replace(s, train=_training(s, folds, key, alone=alone)) for s in tables]
    run = AssessmentRun(
        HelloRequest(folds=-1, purpose="assessment"),
        Settings.under(policy),
        ridge=ridge,
        replicates=replicates,
    )
    # Two fits of each model, with and without ridge, and each may take the rounds that the policy allows one.
    rules: Policy | Literal["off"] = "off"
    if policy is not None:
        rules = dataclasses.replace(policy, max_evaluations=2 * policy.max_evaluations)
    fitted = drive(run, [CoxSiteState(table, rules, key) for table in tables])
    cross = _leave_one_out(tables[0], fitted) if alone else fitted.folds_c
    return _report(fitted, cross, alone=alone, replicates=replicates)


def banner(deaths: int, parameters: int) -> str:
    """The warning that stands above every in-sample number of too small a model; empty at 5 deaths per parameter."""
    epv = deaths / parameters
    if epv >= LEAST_EPV:
        return ""
    return (
        f"Only {epv:.1f} deaths per parameter ({deaths} deaths, {parameters} parameters). A model of this size "
        "reaches a high C, even 1.0, in pure noise: read the cross-validated C and the permutation p instead."
    )


def _steps(hello: HelloRequest, settings: Settings, ridge: float | None, replicates: int) -> Steps[_Fitted]:
    study = yield from open_study(hello, settings)
    parameters, deaths = study.parameters - 1, int(study.total.fold_events[0])
    used = ridge if ridge is not None else float(deaths < RIDGE_BELOW_EPV * parameters)
    everything = study.all_models
    first, others = np.zeros_like(everything), everything.copy()
    first[0], others[0] = True, False
    fits = yield from fit(study, everything, ridge=used)
    c = yield from count_pairs(fits.beta, first & fits.ok, rows="training")
    folds_c = yield from count_pairs(fits.beta, others & fits.ok, rows="validation")
    plain = yield from fit(study, first)
    plain_c = yield from count_pairs(plain.beta, first & plain.ok, rows="training")
    in_sample = float(c[0, 0, 0])
    chance = yield from _permutation_p(study, first, used, in_sample, replicates)
    cross = float(np.nanmean(folds_c[0, 1:, 0])) if np.isfinite(folds_c[0, 1:, 0]).any() else float("nan")
    return _Fitted(study, used, fits, plain, in_sample, float(plain_c[0, 0, 0]), cross, chance)


def _permutation_p(study: Study, first: Bool, ridge: float, c: float, replicates: int) -> Steps[float]:
    """Share of replicates with permuted outcomes, and the data itself, whose in-sample C is at least `c`."""
    if not replicates or not np.isfinite(c):
        return float("nan")
    reached = 0
    for start in range(0, replicates, REPLICATES_AT_ONCE):
        numbers = np.arange(start, min(start + REPLICATES_AT_ONCE, replicates), dtype=np.int64) + 1
        active = np.tile(first, (len(numbers), 1))
        deaths = np.tile(study.total.fold_events, len(numbers))
        fits = yield from fit(study, active, ridge=ridge, replicates=numbers, deaths=deaths)
        permuted = yield from count_pairs(fits.beta, active & fits.ok, rows="training", replicates=numbers)
        reached += int((~(permuted[0][active] < c)).sum())  # a replicate that could not be fitted counts against us
    return (1 + reached) / (1 + replicates)


def _leave_one_out(site: CoxSite, fitted: _Fitted) -> float:
    """C of every patient's risk under the model of all others; pairs compare risks of two such models."""
    prepared = prepare(site, fitted.study.scale)
    beta = fitted.fits.beta[1:, 0]
    if np.isnan(beta[:, 1:]).all(axis=1).any():
        return float("nan")
    own = np.nan_to_num(beta)
    risk = risks(np.zeros((len(own), 1)), prepared.C, own)[1]
    diagonal = np.ascontiguousarray(np.diagonal(risk))[:, None]
    i, j = comparable(site.t, site.e, strata_of(site), np.ones(len(site.t), dtype=bool))
    if not len(i):
        return float("nan")
    concordant, tied = count(diagonal, i, j)
    return float((concordant[0] + 0.5 * tied[0]) / len(i))


def _training(site: CoxSite, folds: int, key: bytes, *, alone: bool) -> Bool:
    """(1 + n, n) for one site: everybody, then everybody but one; else (1 + folds, n)."""
    n = len(site.t)
    if alone:
        return np.vstack([np.ones((1, n), dtype=bool), ~np.eye(n, dtype=bool)])
    if site.ids is None:
        raise SurvivalError("E_SURVIVAL_INPUT", where="column ids", found="nothing", wanted="pseudonyms")
    fold = assign_folds(site.ids, site.e, folds=folds, key=key, site=site.name)
    return np.vstack([np.ones((1, n), dtype=bool), training_rows(fold, folds)])


def _report(fitted: _Fitted, cross: float, *, alone: bool, replicates: int) -> Assessment:
    study, fits = fitted.study, fitted.fits
    sd, deaths, parameters = study.units[-1, 1:], int(study.total.fold_events[0]), study.parameters - 1
    return Assessment(
        coef=fits.beta[0, 0, 1:] / sd,
        se=fits.se[0, 0, 1:] / sd,
        p=fits.p[0, 0, 1:],
        ridge=fitted.ridge,
        unpenalised_coef=fitted.plain.beta[0, 0, 1:] / sd,
        unpenalised_c=fitted.plain_c,
        concordance=fitted.c,
        cross_validated=cross,
        cross_validation="leave-one-out" if alone else "folds",
        permutation_p=fitted.permutation_p,
        replicates=replicates,
        patients=int(study.total.n[0]),
        deaths=deaths,
        parameters=parameters,
        epv=deaths / parameters,
        banner=banner(deaths, parameters),
    )
