"""Kaplan-Meier curves and the log-rank test from sums.

The curve: deaths and patients at risk on a public grid of bins, S = product of (1 - d/n). The stratified log-rank test:
observed minus expected deaths and a variance per site, which add over sites; no time leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc

from fourdvq.survival.messages import F64, I64, Bool, GridRequest, KmSums, LogRankSums
from fourdvq.survival.shared import bin_index


@dataclass(frozen=True, eq=False)
class KmCurve:
    """Survival S (G,) just after each bin, with the 95 % interval of the log(-log S) transform; `edges` in days."""

    edges: F64
    survival: F64
    low: F64
    high: F64
    at_risk: I64
    deaths: I64


def km_sums(t: F64, e: Bool, grid: GridRequest) -> KmSums:
    """Deaths in and patients at risk at each point; with bins a censored patient is at risk in its own bin."""
    index, points = bin_index(grid, t), np.arange(len(grid.edges))
    return KmSums(
        deaths=(index[e] == points[:, None]).sum(axis=1).astype(np.int64),
        at_risk=(index >= points[:, None]).sum(axis=1).astype(np.int64),
    )


def km_curve(total: KmSums, edges: F64) -> KmCurve:
    """The curve of all sites together. Interval: Greenwood's variance on the log(-log S) scale."""
    d, n = total.deaths.astype(float), total.at_risk.astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        survival = np.cumprod(np.where(n > 0, 1.0 - d / np.maximum(n, 1.0), 1.0))
        greenwood = np.cumsum(np.where(d > 0, d / (n * (n - d)), 0.0))
        spread = 1.959963984540054 * np.sqrt(greenwood) / np.log(survival)
        low, high = survival ** np.exp(-spread), survival ** np.exp(spread)
    flat = (survival <= 0.0) | (survival >= 1.0)
    return KmCurve(
        edges=edges,
        survival=np.asarray(survival, dtype=np.float64),
        low=np.asarray(np.where(flat, survival, low), dtype=np.float64),
        high=np.asarray(np.where(flat, survival, high), dtype=np.float64),
        at_risk=total.at_risk,
        deaths=total.deaths,
    )


def logrank_sums(t: F64, e: Bool, group: Bool, strata: I64) -> LogRankSums:
    """Observed minus expected deaths in `group` (n,) and the hypergeometric variance, over the site's strata."""
    difference, variance = 0.0, 0.0
    for stratum in np.unique(strata):
        here = strata == stratum
        time, died, inside = t[here], e[here], group[here]
        for u in np.unique(time[died]):
            risk = time >= u
            n, n1 = risk.sum(), (risk & inside).sum()
            dead = died & (time == u)
            d, d1 = dead.sum(), (dead & inside).sum()
            difference += d1 - d * n1 / n
            if n > 1:
                variance += d * (n1 / n) * (1 - n1 / n) * (n - d) / (n - 1)
    return LogRankSums(observed_minus_expected=np.array([difference]), variance=np.array([variance]))


def logrank_test(total: LogRankSums) -> tuple[float, float]:
    """(chi-square with 1 degree of freedom, p) of the test stratified by site; NaN without variance."""
    variance = float(total.variance[0])
    if variance <= 0:
        return float("nan"), float("nan")
    chi2 = float(total.observed_minus_expected[0]) ** 2 / variance
    return chi2, float(chdtrc(1, chi2))
