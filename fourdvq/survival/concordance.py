"""Concordance from pair counts: integers that add over sites, never an average of the sites' C.

A pair (i, j) is comparable if i died and t_i < t_j, or t_i = t_j and j is censored; concordant if i has the higher
risk; equal risks count half. Axes: m models, V = 2 variants (full model, biomarker alone), A analyses.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from fourdvq.survival.cox import Prepared, chunks
from fourdvq.survival.messages import F64, I64, Bool, PairCounts, PairRequest

VARIANTS: Final = ("full", "biomarker")
_CELLS = 1 << 21  # comparisons at once


def pair_counts(prepared: Prepared, request: PairRequest, *, min_pairs: int = 0, min_deaths: int = 0) -> PairCounts:
    """Counts of every active model on the rows outside its fold (`validation`) or inside it (`training`).

    Pairs are counted within the site (and stratum). An analysis with fewer than `min_pairs` comparable pairs, or pairs
    from fewer than `min_deaths` deaths, contributes zeros.
    """
    m = len(request.beta)
    concordant, tied = np.zeros((2, m), dtype=np.int64), np.zeros((2, m), dtype=np.int64)
    pairs = np.zeros(len(request.active), dtype=np.int64)
    n_folds = len(request.active) // max(len(request.replicates), 1)
    found: dict[int, tuple[I64, I64]] = {}
    for analysis in range(len(request.active)):
        fold = analysis % n_folds
        if fold not in found:
            inside = prepared.train[fold]
            i, j = comparable(
                prepared.t, prepared.e, prepared.strata, inside if request.rows == "training" else ~inside
            )
            enough = len(i) >= min_pairs and len(np.unique(i)) >= min_deaths
            found[fold] = (i, j) if enough else (i[:0], j[:0])
        pairs[analysis] = len(found[fold][0])
    for replicate, fold, columns, models in chunks(request.replicates, request.active):
        Z, C = prepared.rows(replicate)
        biomarker, full = risks(Z[:, columns], C, request.beta[models])
        for variant, risk in enumerate((full, biomarker)):
            concordant[variant, models], tied[variant, models] = count(risk, *found[fold])
    return PairCounts(concordant=concordant, tied=tied, pairs=pairs)


def risks(z: F64, c: F64, beta: F64) -> tuple[F64, F64]:
    """Risk scores (n, m) of the biomarker alone and of the full model, z (n, m), c (n, q), beta (m, 1 + q).

    Added term by term in a fixed order, not by a matrix product: equal rows must give exactly equal risks.
    """
    biomarker = z * beta[:, 0]
    full = biomarker.copy()
    for k in range(c.shape[1]):
        full += c[:, k : k + 1] * beta[:, k + 1]
    return biomarker, full


def comparable(t: F64, e: Bool, strata: I64, rows: Bool) -> tuple[I64, I64]:
    """Row numbers (i, j) of the comparable pairs among `rows`; i died first."""
    of_i, of_j = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for stratum in np.unique(strata[rows]):
        here = np.flatnonzero(rows & (strata == stratum))
        for i in here[e[here]]:
            later = here[(t[here] > t[i]) | ((t[here] == t[i]) & ~e[here])]
            of_i.append(np.full(len(later), i))
            of_j.append(later)
    return np.concatenate(of_i), np.concatenate(of_j)


def count(risk: F64, i: I64, j: I64) -> tuple[I64, I64]:
    """Concordant and tied pairs (m,) of the risks (n, m)."""
    m = risk.shape[1]
    concordant, tied = np.zeros(m, dtype=np.int64), np.zeros(m, dtype=np.int64)
    size = max(_CELLS // max(m, 1), 1)
    for start in range(0, len(i), size):
        first, second = risk[i[start : start + size]], risk[j[start : start + size]]
        concordant += (first > second).sum(axis=0)
        tied += (first == second).sum(axis=0)
    return concordant, tied


def concordance(total: PairCounts, active: Bool) -> F64:
    """C in the frame (V, A, M) from the summed counts; NaN for models not asked for and without comparable pairs."""
    frame = np.full((len(VARIANTS), *active.shape), np.nan)
    analysis = np.nonzero(active)[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        frame[:, active] = (total.concordant + 0.5 * total.tied) / total.pairs[analysis]
    return frame
