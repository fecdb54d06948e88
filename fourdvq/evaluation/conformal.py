"""Federated conformal bands: how wide must a band around a predicted number be to hold, say, 90 % of true values?

Each site counts the nonconformity scores |true - predicted| of its calibration patients over public bins; the counts
add up, and the merged quantile is read off at a bin's upper edge, so it errs on the wide side. Nothing else leaves.
The guarantee (coverage of at least the asked share, on average, for exchangeable patients) is that of split conformal
prediction. One score per patient and horizon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fourdvq.errors import ConfigError
from fourdvq.plan import EvaluationSpec

SCALARS = ("density", "dense_share", "code_share")  # the numbers that have bands; see fourdvq.evaluation.scalars


def counts_shape(spec: EvaluationSpec) -> tuple[int, int, int]:
    """Numbers, horizons (the last is beyond all bins) and bins (the last as well) of the counts of a plan."""
    return len(SCALARS), len(spec.horizon_bins_years) + 1, spec.conformal_bins + 1


def public_bins(largest: float, n_bins: int = 200) -> np.ndarray:
    """Upper edges (n_bins,) of equal bins from 0 to `largest`; fixed by the plan, never by data."""
    if not (largest > 0 and n_bins > 0):
        raise ConfigError("E_VALUE", where="conformal bins", found=f"largest {largest}, n_bins {n_bins}")
    return np.linspace(0.0, largest, n_bins + 1)[1:]


def score_counts(scores: Iterable[float], edges: np.ndarray) -> np.ndarray:
    """Counts (n_bins + 1,) int64: score in bin i if edges[i-1] < score <= edges[i]; the last bin is beyond all edges.

    A score that is not a number counts as beyond: a failed prediction must not narrow a band.
    """
    x = np.array(list(scores), dtype=np.float64)
    x = np.where(np.isnan(x), math.inf, np.abs(x))
    return np.bincount(np.searchsorted(edges, x, side="left"), minlength=len(edges) + 1).astype(np.int64)


def horizon_counts(
    scores: Sequence[float], horizons: Sequence[float], edges: np.ndarray, horizon_bins: Sequence[float]
) -> np.ndarray:
    """Counts (n_horizons, n_bins + 1): `score_counts` for each bin of years ahead; the last is beyond all bins."""
    where = np.searchsorted(np.asarray(horizon_bins, dtype=np.float64), np.asarray(horizons), side="left")
    x = np.asarray(scores, dtype=np.float64)
    return np.stack([score_counts(x[where == i], edges) for i in range(len(horizon_bins) + 1)])


def merged_quantile(counts: Iterable[np.ndarray], edges: np.ndarray, coverage: float = 0.9) -> float:
    """Half-width of the band that covers at least `coverage`, from the sites' counts.

    Infinite if there are too few calibration patients for that coverage (90 % needs 9) or the scores leave the bins.
    """
    total = np.sum(list(counts), axis=0)
    n = int(total.sum())
    rank = math.ceil((n + 1) * coverage - 1e-9)
    if n == 0 or rank > n:
        return math.inf
    reached = int(np.searchsorted(np.cumsum(total), rank))
    return float(edges[reached]) if reached < len(edges) else math.inf
