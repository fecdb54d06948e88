"""The Grambsch-Therneau test of proportional hazards, from sums that add over sites.

Schoenfeld residuals r = z - (Efron mean of z at risk) are summed against a transformed time g(t). `rank` and `km`, the
defaults elsewhere, need the ranks of pooled times and are not offered. Source: Grambsch and Therneau, Biometrika 1994.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc

from fourdvq.errors import SurvivalError
from fourdvq.survival.cox import Prepared, risk_sums
from fourdvq.survival.messages import F64, I64, PhRequest, PhSums

TRANSFORMS: dict[str, Callable[[F64], F64]] = {"log": np.log, "identity": np.asarray}


@dataclass(frozen=True, eq=False)
class PhTest:
    """Chi-square with 1 degree of freedom and p of every covariate (p,)."""

    chi2: F64
    p: F64


def ph_sums(prepared: Prepared, request: PhRequest) -> PhSums:
    """Residual sums of the model of the covariates on the rows of fold 0; beta (p,) with the biomarker's 0 first.

    Residuals are in the units of the scale. Raises SurvivalError for a death at time 0 with `log`.
    """
    if request.transform not in TRANSFORMS:
        raise SurvivalError("E_SURVIVAL_INPUT", where="transform", found=request.transform, wanted="log or identity")
    plan = prepared.plan(0)
    p = prepared.n_parameters
    time = prepared.t[plan.order[plan.dead]]
    if request.transform == "log" and (time <= 0).any():
        raise SurvivalError("E_SURVIVAL_INPUT", where="column t", found="a death at time 0", wanted="times above 0")
    c = prepared.C[plan.order]
    z = np.zeros((len(c), 1))
    eta = c @ request.beta[1:, None]
    w = np.exp(eta - eta.max(initial=-np.inf)) if len(c) else eta
    A = risk_sums(plan, z, c, w)
    # Tied deaths share the mean over their group, so that the residual of a row does not depend on the order of rows.
    mean = _tied_mean((A[1 : 1 + p, :, 0] / A[0, :, 0]).T, time, prepared.strata[plan.order[plan.dead]])
    r = np.column_stack([z[plan.dead], c[plan.dead]]) - mean
    g = TRANSFORMS[request.transform](time)
    return PhSums(
        gr=g @ r,
        r=r.sum(axis=0),
        g=np.array([g.sum()]),
        gg=np.array([g @ g]),
        d=np.array([len(time)], dtype=np.int64),
    )


def ph_test(total: PhSums, covariance: F64) -> PhTest:
    """The test per covariate from the summed residuals and the covariance (p, p) of the fit in the same units."""
    d = float(total.d[0])
    spread = float(total.gg[0]) - float(total.g[0]) ** 2 / d
    u = total.gr - (float(total.g[0]) / d) * total.r
    with np.errstate(invalid="ignore", divide="ignore"):  # a column that was not fitted has no variance
        chi2 = d * (u @ covariance) ** 2 / (np.diagonal(covariance) * spread)
    return PhTest(chi2=chi2, p=np.asarray(chdtrc(1, chi2)))


def _tied_mean(mean: F64, time: F64, strata: I64) -> F64:
    _, group = np.unique(np.column_stack([strata, time]), axis=0, return_inverse=True)
    sums = np.zeros((int(group.max(initial=-1)) + 1, mean.shape[1]))
    np.add.at(sums, group, mean)
    return np.asarray(sums[group] / np.bincount(group)[group][:, None])
