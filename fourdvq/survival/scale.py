"""Standardisation without sharing rows: the sites' sums become one mean and standard deviation per column.

Moments are taken once over all training patients, never per fold: two folds' sums differ by a validation fold. The fit
does not depend on the scale, so a policy has it rounded, which hides the exact totals.
"""

from __future__ import annotations

import numpy as np

from fourdvq.survival.messages import F64, Bool, CoxMoments, ScaleRequest
from fourdvq.survival.table import CoxSite

ROUNDED_DIGITS = 3
# Below this share of the mean square, a variance from sums of float64 is rounding noise: the column is constant.
NO_VARIANCE = 1e-13


def site_moments(site: CoxSite, *, allowed: Bool | None = None) -> CoxMoments:
    """Sums over the patients in any training fold. Codes with `allowed` (B,) False are not summed.

    Columns are the B codes, then the q covariates.
    """
    train = np.ones((1, len(site.t)), dtype=bool) if site.train is None else site.train
    rows = train.any(axis=0)
    n_codes = site.X.shape[1]
    allowed = np.ones(n_codes, dtype=bool) if allowed is None else allowed
    X, C = np.where(allowed, site.X[rows], 0.0), site.C[rows]
    return CoxMoments(
        sites=np.ones(1, dtype=np.int64),
        n=np.array([rows.sum()], dtype=np.int64),
        events=np.array([(rows & site.e).sum()], dtype=np.int64),
        fold_events=(train & site.e).sum(axis=1).astype(np.int64),
        sx=np.concatenate([X.sum(axis=0), C.sum(axis=0)]),
        sxx=np.concatenate([(X**2).sum(axis=0), (C**2).sum(axis=0)]),
        allowed=allowed.astype(np.int64),
    )


def scale_from_moments(total: CoxMoments, *, rounded: bool) -> ScaleRequest:
    """Mean and sample standard deviation (ddof 1) of every column; `rounded` to 3 significant digits.

    A column without variation gets a standard deviation of 1, so that its standardised values are 0 or constant.
    """
    n = max(int(total.n[0]), 1)
    mean = total.sx / n
    variance = (total.sxx - total.sx * mean) / max(n - 1, 1)
    varies = variance > NO_VARIANCE * np.maximum(total.sxx / n, np.finfo(float).tiny)
    sd = np.sqrt(np.where(varies, variance, 1.0))
    if rounded:
        sd = _rounded(sd, sd)
        mean = _rounded(mean, np.minimum(np.abs(mean), sd * 10.0))
    return ScaleRequest(mean=mean, sd=sd, kept=total.allowed == total.sites)


def _rounded(value: F64, size: F64) -> F64:
    """`value` to three significant digits of `size`: a mean is never off by more than a twentieth of its SD."""
    place = np.floor(np.log10(np.where(size > 0, size, 1.0))) - (ROUNDED_DIGITS - 1)
    step = 10.0**place
    return np.asarray(np.round(value / step) * step)
