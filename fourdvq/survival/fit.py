"""fit_federated_cox and fit_cox_batch: federated Cox regression of tables in this process.

The same site and server code as over a network, driven in one process. With `baseline="site"` the result equals Cox
regression stratified by site, with `"shared"` that of the pooled rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fourdvq.errors import SurvivalError
from fourdvq.survival.concordance import comparable, count, risks
from fourdvq.survival.disclosure import Policy, as_policy
from fourdvq.survival.local import drive
from fourdvq.survival.messages import F64, Bool, GridRequest, HelloRequest, ScaleRequest
from fourdvq.survival.newton import Status
from fourdvq.survival.proportional import TRANSFORMS
from fourdvq.survival.run import ModelResult, ModelRun, Settings
from fourdvq.survival.state import CoxSiteState
from fourdvq.survival.table import CoxSite, as_site, same_shape

if TYPE_CHECKING:
    import pandas as pd

BASELINES, TIES = ("site", "shared"), ("efron", "breslow")


@dataclass(frozen=True, eq=False)
class CoxResult:
    """One Cox model, in the order of `covariates` and the units of the table; NaN where the status is not `ok`.

    `log_likelihood` is unpenalised. `concordance_scope`: "pooled" pairs over all rows, or "within_site".
    `diagnostics`: last iterate of every coefficient, per SD.
    """

    covariates: tuple[str, ...]
    coef: F64
    se: F64
    p: F64
    status: Status
    log_likelihood: float
    log_likelihood_null: float
    concordance: float
    concordance_scope: Literal["within_site", "pooled"]
    covariance: F64
    rounds: int
    diagnostics: Mapping[str, F64]
    ph_chi2: F64  # Grambsch-Therneau, 1 degree of freedom, if `ph` was asked for; else NaN
    ph_p: F64


@dataclass(frozen=True, eq=False)
class CoxBatch:
    """Models per fold and code (F, B): biomarker first in coef, se, p (F, B, 1+q), in the units of the tables.

    Every number of a model whose status is not `ok` is NaN. `log_likelihood_covariates` (F,): the covariates alone.
    """

    coef: F64
    se: F64
    p: F64
    log_likelihood: F64
    log_likelihood_covariates: F64
    converged: Bool
    status: Status
    rounds: int
    diagnostics: Mapping[str, F64]


def fit_federated_cox(
    sites: Sequence[pd.DataFrame],
    duration: str,
    event: str,
    covariates: Sequence[str],
    *,
    baseline: str = "site",
    ties: str = "efron",
    penalizer: float = 0.0,
    disclosure: Policy | Literal["off"] = "off",
    ph: Literal["", "log", "identity"] = "",
) -> CoxResult:
    """One Cox model over the sites' tables.

    `penalizer`: L2, in lifelines' meaning (n * penalizer / 2 times the squared standardised coefficients). A constant
    covariate is `dead` and left out, one that runs away is `infinite`, the others are fitted. `ph`: also test
    proportional hazards, within strata of sites, with this transform of time. Raises SurvivalError (a
    ValueError) for a table that breaks a rule, Refused when a site's policy says no.
    """
    policy = as_policy(disclosure)
    _check_options(baseline, ties)
    if not np.isfinite(penalizer) or penalizer < 0:
        raise SurvivalError("E_SURVIVAL_INPUT", where="penalizer", found="another number", wanted="0 or more")
    if ph and (baseline == "shared" or ph not in TRANSFORMS):
        raise SurvivalError("E_SURVIVAL_INPUT", where="ph", found=repr(ph), wanted='log or identity, baseline "site"')
    names = tuple(covariates)
    tables = [_table(df, duration, event, names, f"{i}") for i, df in enumerate(sites)]
    same_shape(tables)
    hello = HelloRequest(folds=0, baseline=baseline, ties=ties, purpose="model")  # type: ignore[arg-type]
    states = [CoxSiteState(table, disclosure) for table in tables]
    pooled = baseline == "shared" and policy is None
    run = ModelRun(
        hello,
        Settings.under(policy),
        penalizer=penalizer,
        per_column=True,
        count="" if pooled else "training",
        grid=_exact_grid(tables) if pooled else None,
        ph=ph,
    )
    fitted = drive(run, states)
    c = _pooled_concordance(tables, fitted) if pooled else float(fitted.concordance[0, 0, 0])
    return _one_model(fitted, names, c, "pooled" if pooled else "within_site")


def fit_cox_batch(
    sites: Sequence[CoxSite | Mapping[str, Any]],
    *,
    baseline: str = "site",
    ties: str = "efron",
    disclosure: Policy | Literal["off"] = "off",
) -> CoxBatch:
    """One Cox model per fold and code (biomarker, then covariates), all in the same messages.

    Sites: X (n, B), C (n, q), t (n,), e (n,), train (F, n). Errors as in `fit_federated_cox`.
    """
    policy = as_policy(disclosure)
    _check_options(baseline, ties)
    tables = [as_site(site) for site in sites]
    same_shape(tables)
    hello = HelloRequest(folds=-1, baseline=baseline, ties=ties, purpose="batch")  # type: ignore[arg-type]
    grid = _exact_grid(tables) if baseline == "shared" and policy is None else None
    run = ModelRun(hello, Settings.under(policy), grid=grid)
    fitted = drive(run, [CoxSiteState(table, disclosure) for table in tables])
    fits, units = fitted.fits, fitted.study.units
    ok = fits.ok[:, :-1]
    return CoxBatch(
        coef=(fits.beta / units)[:, :-1],
        se=(fits.se / units)[:, :-1],
        p=fits.p[:, :-1],
        log_likelihood=fits.log_likelihood[:, :-1],
        log_likelihood_covariates=fits.log_likelihood[:, -1],
        converged=ok,
        status=fits.status[:, :-1],
        rounds=fits.rounds,
        diagnostics={"last_beta": fits.last_beta[:, :-1], "sd": fitted.study.scale.sd},
    )


def _one_model(fitted: ModelResult, names: tuple[str, ...], c: float, scope: Any) -> CoxResult:
    fits, sd = fitted.fits, fitted.study.units[-1, 1:]
    return CoxResult(
        covariates=names,
        coef=fits.beta[0, 0, 1:] / sd,
        se=fits.se[0, 0, 1:] / sd,
        p=fits.p[0, 0, 1:],
        status=fits.column_status[0, 0, 1:],
        log_likelihood=float(fits.log_likelihood[0, 0]),
        log_likelihood_null=float(fits.log_likelihood_null[0, 0]),
        concordance=c,
        concordance_scope=scope,
        covariance=fits.covariance[0, 0, 1:, 1:] / np.outer(sd, sd),
        rounds=fits.rounds,
        diagnostics={"last_beta": fits.last_beta[0, 0, 1:], "sd": sd},
        ph_chi2=np.full(len(sd), np.nan) if fitted.ph is None else fitted.ph.chi2[1:],
        ph_p=np.full(len(sd), np.nan) if fitted.ph is None else fitted.ph.p[1:],
    )


def _pooled_concordance(tables: Sequence[CoxSite], fitted: ModelResult) -> float:
    """C of all pairs of the pooled rows: possible only where all rows lie in one process."""
    if not fitted.fits.ok[0, 0]:
        return float("nan")
    t, e = np.concatenate([s.t for s in tables]), np.concatenate([s.e for s in tables])
    scale: ScaleRequest = fitted.study.scale
    C = (np.concatenate([s.C for s in tables]) - scale.mean) / scale.sd
    i, j = comparable(t, e, np.zeros(len(t), dtype=np.int64), np.ones(len(t), dtype=bool))
    if not len(i):
        return float("nan")
    risk = risks(np.zeros((len(t), 1)), C, np.nan_to_num(fitted.fits.last_beta[0]))[1]
    concordant, tied = count(risk, i, j)
    return float((concordant[0] + 0.5 * tied[0]) / len(i))


def _exact_grid(tables: Sequence[CoxSite]) -> GridRequest:
    times = np.unique(np.concatenate([s.t[s.e] for s in tables]))
    return GridRequest(edges=times if len(times) else np.zeros(1), exact=True)


def _table(df: pd.DataFrame, duration: str, event: str, covariates: tuple[str, ...], name: str) -> CoxSite:
    if len(set(covariates)) != len(covariates) or not covariates:
        raise SurvivalError("E_SURVIVAL_INPUT", where="covariates", found="none, or one twice", wanted="distinct names")
    for column in (duration, event, *covariates):
        if column not in df.columns:
            raise SurvivalError(
                "E_SURVIVAL_INPUT", where=f"site {name}, column {column}", found="no such column", wanted="the column"
            )
        values = df[column]
        finite = values.map(lambda v: isinstance(v, int | float | np.number | np.bool_) and bool(np.isfinite(v)))
        if not finite.all():
            raise SurvivalError(
                "E_SURVIVAL_INPUT",
                where=f"site {name}, column {column}",
                found="a missing, infinite or non-numeric value",
                wanted="finite numbers",
            )
    t, e = df[duration].to_numpy(dtype=float), df[event].to_numpy(dtype=float)
    for column, broken, rule in (
        (duration, (t < 0).any(), "times of 0 or more"),
        (event, not np.isin(e, (0, 1)).all(), "0 or 1"),
    ):
        if broken:
            raise SurvivalError(
                "E_SURVIVAL_INPUT", where=f"site {name}, column {column}", found="a value that breaks it", wanted=rule
            )
    C = df[list(covariates)].to_numpy(dtype=float).reshape(len(df), len(covariates))
    return CoxSite(X=np.zeros((len(df), 0)), C=C, t=t, e=e, name=name)


def _check_options(baseline: str, ties: str) -> None:
    for name, value, known in (("baseline", baseline, BASELINES), ("ties", ties, TIES)):
        if value not in known:
            raise SurvivalError("E_SURVIVAL_INPUT", where=name, found=repr(value), wanted=" or ".join(known))
