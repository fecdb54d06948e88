"""Does a prediction know where a lung changes? Measures of change, for which copying the last scan knows nothing.

Observed change g = target - last given scan, predicted change p = prediction - last given scan, over lung voxels. Level
measures (MSE, SSIM) reward copying; these do not. What is undefined (the slope of a prediction that never changes) is
absent.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

LARGEST_SHARE = 0.05  # the 5 % largest increases, and decreases
CHANGED_ABOVE = 0.02  # on [0, 1]: the size of test-retest noise; evaluation page, section 2


def change_metrics(prediction: Tensor, last: Tensor, target: Tensor, lung: Tensor) -> dict[str, float]:
    """All change measures of one predicted scan; volumes x01 (D, H, W), lung (D, H, W) bool.

    change_correlation  Pearson, over the lung
    change_slope        slope of observed on predicted change: 1 = right size, below 1 = predicted too large
    change_spearman     rank correlation over the voxels that truly changed
    auroc_increase, auroc_decrease   finding the 5 % largest increases (decreases): 0.5 = nothing known
    """
    g = (target - last)[lung].double().numpy()
    p = (prediction - last)[lung].double().numpy()
    found = {
        "change_correlation": correlation(p, g),
        "change_slope": slope(p, g),
        "auroc_increase": auroc_largest(p, g),
        "auroc_decrease": auroc_largest(-p, -g),
    }
    changed = np.abs(g) > CHANGED_ABOVE
    if changed.sum() > 2:
        found["change_spearman"] = correlation(average_ranks(p[changed]), average_ranks(g[changed]))
    return {name: value for name, value in found.items() if value is not None}


def correlation(p: np.ndarray, g: np.ndarray) -> float | None:
    """Pearson correlation; None if either side does not vary."""
    p, g = p - p.mean(), g - g.mean()
    scale = np.sqrt(np.square(p).sum() * np.square(g).sum())
    return float((p * g).sum() / scale) if scale > 0 else None


def slope(p: np.ndarray, g: np.ndarray) -> float | None:
    """Least-squares slope of g on p; None if p does not vary."""
    centred = p - p.mean()
    spread = np.square(centred).sum()
    return float((centred * g).sum() / spread) if spread > 0 else None


def auroc_largest(p: np.ndarray, g: np.ndarray, share: float = LARGEST_SHARE) -> float | None:
    """Area under the ROC curve with which p ranks the `share` largest of g above the others; ties count half.

    Only true increases count as positives. None without positives or without negatives.
    """
    n_top = max(1, round(share * len(g)))
    if len(g) <= n_top:
        return None
    threshold = np.partition(g, len(g) - n_top)[len(g) - n_top]
    positive = (g >= threshold) & (g > 0)
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if n_pos == 0 or n_neg == 0:
        return None
    ranks = average_ranks(p)[positive].sum()
    return float((ranks - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def average_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks 1..n; equal values share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
