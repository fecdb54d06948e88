"""The two tests of the frozen biomarkers: codes of a later scan, and changes of codes between two scans.

Which scan is the one-year follow-up, from when time counts, and the change itself. A patient counts from the scan that
the biomarker needs (`landmark`): counting from the first CT would credit every patient with the time that had to be
survived to be scanned again. Source: paper section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from fourdvq.errors import SurvivalError
from fourdvq.survival.concordance import comparable
from fourdvq.survival.messages import F64, Bool, PairedSums
from fourdvq.survival.table import CoxSite, strata_of

ONE_YEAR_DAYS = 365
SMALLEST_N_FOR_T = 2


@dataclass(frozen=True, eq=False)
class Changes:
    """Follow-up minus second scan (n, K) of the patients that have both; `without_pair` were left out."""

    ids: tuple[str, ...]
    change: F64
    without_pair: tuple[str, ...]


@dataclass(frozen=True)
class ConcordanceDifference:
    """C of the real scans minus C of the generated ones, on the same patients and model, with a jackknife interval."""

    real: float
    generated: float
    difference: float
    low: float
    high: float
    patients: int
    deaths: int


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; NaN where there is nothing to compare."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedConcordance:
    """C of each version of the codes, and the first version's C minus that of each other one."""

    concordance: tuple[Interval, ...]
    differences: tuple[Interval, ...]
    patients: int
    deaths: int
    pairs: int


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """Coefficients that no later data changes: `codes` (k,), then covariates; in the units of the tables."""

    codes: tuple[int, ...]
    coef: F64  # (k + q,)
    codebook_sha256: str = ""

    def risk(self, site: CoxSite) -> F64:
        """Risk score (n,) of every patient of a table, added term by term so that equal rows tie exactly."""
        columns = np.column_stack([site.X[:, list(self.codes)], site.C])
        if columns.shape[1] != len(self.coef):
            raise SurvivalError("E_SURVIVAL_INPUT", where="C", found="other covariates", wanted="those of the model")
        score = np.zeros(len(columns))
        for column, coef in zip(columns.T, self.coef, strict=True):
            score += column * coef
        return score


def one_year_follow_up(days: Sequence[int], second: int, *, window_days: int = 90) -> int | None:
    """The scan nearest to a year after scan number `second`, None outside the window. `days`: since the first scan."""
    wanted = days[second] + ONE_YEAR_DAYS
    later = [i for i in range(len(days)) if days[i] > days[second] and abs(days[i] - wanted) <= window_days]
    return min(later, key=lambda i: (abs(days[i] - wanted), i), default=None)


def code_changes(
    second: Mapping[str, npt.NDArray[np.float64]], follow_up: Mapping[str, npt.NDArray[np.float64]]
) -> Changes:
    """Changes of code shares per patient with both scans, in order of pseudonym."""
    both = sorted(set(second) & set(follow_up))
    change = [np.asarray(follow_up[i], dtype=np.float64) - np.asarray(second[i], dtype=np.float64) for i in both]
    n_codes = len(change[0]) if change else 0
    left_out = tuple(sorted(set(second) ^ set(follow_up)))
    return Changes(tuple(both), np.array(change).reshape(len(both), n_codes), left_out)


def from_landmark(t: F64, e: Bool, landmark: F64) -> tuple[F64, Bool, Bool]:
    """Times and events counted from each patient's landmark (days), and which patients remain: those seen after it."""
    remain = np.asarray(t) > np.asarray(landmark)
    return (np.asarray(t) - np.asarray(landmark))[remain], np.asarray(e, dtype=bool)[remain], remain


def compare_concordance(site: CoxSite, real: F64, generated: F64) -> ConcordanceDifference:
    """C with two risk scores (n,) of the same patients. Delete-one jackknife, t interval of 95 %: one site only.

    Raises SurvivalError when there is no comparable pair.
    """
    n = len(site.t)
    i, j = comparable(site.t, site.e, strata_of(site), np.ones(n, dtype=bool))
    if not len(i):
        raise SurvivalError("E_SURVIVAL_INPUT", where="column t", found="no comparable pair", wanted="at least one")
    scores = np.stack([(r[i] > r[j]) + 0.5 * (r[i] == r[j]) for r in (np.asarray(real), np.asarray(generated))])
    whole = scores.sum(axis=1)
    # Pairs that hold patient k: what the sums lose when k is left out.
    lost = np.stack([np.bincount(i, s, n) + np.bincount(j, s, n) for s in scores])
    pairs = len(i) - np.bincount(i, minlength=n) - np.bincount(j, minlength=n)
    usable = pairs > 0
    without = (whole[:, None] - lost)[:, usable] / pairs[usable]
    difference = float((whole[0] - whole[1]) / len(i))
    values, m = without[0] - without[1], int(usable.sum())
    half = float("nan")
    if m >= SMALLEST_N_FOR_T:
        se = np.sqrt((m - 1) / m * ((values - values.mean()) ** 2).sum())
        half = float(student.ppf(0.975, m - 1) * se)
    c = whole / len(i)
    return ConcordanceDifference(
        float(c[0]), float(c[1]), difference, difference - half, difference + half, n, int(site.e.sum())
    )


def paired_concordance(total: PairedSums) -> PairedConcordance:
    """C and its differences with infinitesimal-jackknife intervals, from sums alone.

    With c_i the credit of patient i (half of it, in pairs) and p_i the patient's pairs, leaving i out moves C by
    (c_i - C p_i) / P to first order, P all pairs. The sum of the squares needs the products c c', c p and p p, which
    add over sites; nobody sends sums that differ by one patient, as the delete-one jackknife would. Pairs lie within
    sites, patients are independent: t interval with patients - 1 degrees of freedom. Source: Efron, The Jackknife, the
    Bootstrap and Other Resampling Plans, 1982, chapter 6.
    """
    s, n, pairs = len(total.credit), int(total.patients[0]), int(total.pairs[0])
    products = np.zeros((s + 1, s + 1))
    products[np.triu_indices(s + 1)] = total.products
    products += np.triu(products, 1).T
    products[:s, :] /= 2.0  # credit counts half pairs
    products[:, :s] /= 2.0
    c = total.credit / (2.0 * pairs) if pairs else np.full(s, np.nan)
    weights = [np.append(np.eye(s)[v], -c[v]) for v in range(s)]
    contrasts = [(c[0] - c[v], weights[0] - weights[v]) for v in range(1, s)]
    return PairedConcordance(
        concordance=tuple(_interval(float(c[v]), weights[v], products, n, pairs) for v in range(s)),
        differences=tuple(_interval(float(value), weight, products, n, pairs) for value, weight in contrasts),
        patients=n,
        deaths=int(total.deaths[0]),
        pairs=pairs,
    )


def _interval(value: float, weight: F64, products: F64, n: int, pairs: int) -> Interval:
    if n < SMALLEST_N_FOR_T or not pairs:
        return Interval(value, float("nan"), float("nan"))
    variance = (n - 1) / n * float(weight @ products @ weight) / pairs**2
    half = float(student.ppf(0.975, n - 1)) * np.sqrt(max(variance, 0.0))
    return Interval(value, value - half, value + half)
