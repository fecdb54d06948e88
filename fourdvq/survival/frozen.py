"""A site's sums under a model that is not fitted any more: risk groups, expected survival, pairs of several versions.

Risks are added term by term in a fixed order, so that equal rows tie exactly. Axes: n patients, q covariates (the codes
of the model first), p = 1 + q (the absent biomarker's 0 first), G edges, s versions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fourdvq.survival.concordance import comparable, risks
from fourdvq.survival.cox import Prepared
from fourdvq.survival.messages import F64, I64, Bool, CalibrationSums, GridRequest, PairedSums


def risk_of(C: F64, beta: F64) -> F64:
    """Risk score (n,) of standardised rows C (n, q) under beta (p,)."""
    return risks(np.zeros((len(C), 1)), C, beta[None])[1][:, 0]


def risk_groups(prepared: Prepared, beta: F64) -> Bool:
    """(n,) true for a risk above 0, that of a patient with the training means."""
    return np.asarray(risk_of(prepared.C, beta) > 0)


def calibration_sums(prepared: Prepared, beta: F64, members: Bool, grid: GridRequest) -> CalibrationSums:
    """Expected survival exp(-H0(edge) exp(risk)), summed over `members` (n,); H0 is Breslow's, of all rows of the
    patient's stratum."""
    risk = risk_of(prepared.C, beta)
    hazard = np.zeros((len(risk), len(grid.edges)))
    for stratum in np.unique(prepared.strata):
        here = prepared.strata == stratum
        hazard[here] = _breslow(prepared.t[here], prepared.e[here], risk[here], grid.edges)
    expected = np.exp(-hazard * np.exp(risk)[:, None])
    return CalibrationSums(patients=np.array([members.sum()], dtype=np.int64), expected=expected[members].sum(axis=0))


def paired_sums(
    prepared: Prepared, others: Sequence[F64], beta: F64, *, min_pairs: int = 0, min_deaths: int = 0
) -> PairedSums:
    """Pairs of every version of the codes on all rows; `others` (n, k), standardised, replace the first k covariates.

    Below `min_pairs` pairs, or with pairs from fewer than `min_deaths` deaths, the site contributes zeros.
    """
    n, everybody = len(prepared.t), np.ones(len(prepared.t), dtype=bool)
    i, j = comparable(prepared.t, prepared.e, prepared.strata, everybody)
    if len(i) < min_pairs or len(np.unique(i)) < min_deaths:
        i, j = i[:0], j[:0]
    columns = []
    for codes in (None, *others):
        C = prepared.C if codes is None else np.column_stack([codes, prepared.C[:, codes.shape[1] :]])
        risk = risk_of(C, beta)
        credit = 2 * (risk[i] > risk[j]).astype(np.int64) + (risk[i] == risk[j])
        columns.append(_per_patient(i, j, credit, n))
    table = np.column_stack([*columns, _per_patient(i, j, np.ones(len(i), dtype=np.int64), n)])
    a, b = np.triu_indices(table.shape[1])
    counted = table[:, -1] > 0
    return PairedSums(
        patients=np.array([counted.sum()], dtype=np.int64),
        deaths=np.array([(counted & prepared.e).sum()], dtype=np.int64),
        pairs=np.array([len(i)], dtype=np.int64),
        credit=table[:, :-1].sum(axis=0) // 2,
        products=(table[:, a] * table[:, b]).sum(axis=0),
    )


def _per_patient(i: I64, j: I64, value: I64, n: int) -> I64:
    """(n,) sums of a pair's value over the pairs that a patient is in."""
    total = np.zeros(n, dtype=np.int64)
    np.add.at(total, i, value)
    np.add.at(total, j, value)
    return total


def _breslow(t: F64, e: Bool, risk: F64, edges: F64) -> F64:
    """(G,) cumulative baseline hazard just after each edge."""
    times, deaths = np.unique(t[e], return_counts=True)
    at_risk = (np.exp(risk) * (t >= times[:, None])).sum(axis=1)
    steps = np.append(0.0, np.cumsum(deaths / at_risk))
    return np.asarray(steps[np.searchsorted(times, edges, side="right")])
