"""Do the sites agree? Per-site estimates of the selected codes with their inverse-variance summary.

A view beside the federated fit, never a substitute for it: on small sites a one-shot meta-analysis is tenths of a
standard error away. Source: Higgins and Thompson, Statistics in Medicine 2002.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc

from fourdvq.errors import SurvivalError
from fourdvq.survival.messages import F64


@dataclass(frozen=True)
class Heterogeneity:
    """Fixed-effect summary of one coefficient: Cochran's Q with its p, and I2 (share of spread beyond chance)."""

    coef: float
    se: float
    q: float
    p: float
    i2: float
    sites: int


def inverse_variance(coef: Sequence[float] | F64, se: Sequence[float] | F64) -> Heterogeneity:
    """Summarise a coefficient over sites; sites with NaN are left out. Raises SurvivalError if none is left."""
    estimates, errors = np.asarray(coef, dtype=np.float64), np.asarray(se, dtype=np.float64)
    usable = np.isfinite(estimates) & np.isfinite(errors) & (errors > 0)
    if not usable.any():
        raise SurvivalError("E_SURVIVAL_INPUT", where="coef", found="no estimate", wanted="at least one site")
    estimates, weights = estimates[usable], 1.0 / errors[usable] ** 2
    mean = float((weights * estimates).sum() / weights.sum())
    q = float((weights * (estimates - mean) ** 2).sum())
    df = len(estimates) - 1
    return Heterogeneity(
        coef=mean,
        se=float(weights.sum() ** -0.5),
        q=q,
        p=float(chdtrc(df, q)) if df else float("nan"),
        i2=max(0.0, (q - df) / q) if df and q > 0 else 0.0,
        sites=len(estimates),
    )
