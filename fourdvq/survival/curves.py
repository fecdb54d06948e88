"""Kaplan-Meier curves, risk groups with their log-rank test and calibration, and C of frozen coefficients, over sites.

Each is a short run of requests (see `run`). A site with frozen coefficients, as the external one, is asked for its pair
counts and for nothing else: no moments, no sums of covariates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from fourdvq.survival.concordance import concordance
from fourdvq.survival.kaplan_meier import KmCurve, km_curve, logrank_test
from fourdvq.survival.longitudinal import PairedConcordance, paired_concordance
from fourdvq.survival.messages import (
    F64,
    CalibrationRequest,
    CalibrationSums,
    GridRequest,
    GroupRequest,
    HelloRequest,
    KmRequest,
    LogRankRequest,
    PairedRequest,
    PairRequest,
    ScaleRequest,
)
from fourdvq.survival.run import CoxRun, Settings, Steps, agree_grid, agree_group_grid
from fourdvq.survival.shared import first_grid


@dataclass(frozen=True, eq=False)
class FrozenScore:
    """Coefficients per SD (p,) of codes and covariates, with the training mean and SD (p,) that define the units."""

    beta: F64
    mean: F64
    sd: F64

    @property
    def scale(self) -> ScaleRequest:
        """The frozen scale as the sites receive it; the codes of the model are covariates there."""
        return ScaleRequest(mean=self.mean, sd=self.sd, kept=np.zeros(0, dtype=bool))

    @property
    def padded(self) -> F64:
        """beta with the 0 of the absent biomarker first."""
        return np.append(0.0, self.beta)


@dataclass(frozen=True)
class Calibrated:
    """One group at one edge near an asked horizon: survival that the model expects, and the Kaplan-Meier estimate."""

    group: str
    asked_years: float
    years: float
    patients: int
    expected: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class RiskGroups:
    """Low against high frozen risk: curves, each on bins that every site accepts for the group, and the log-rank test
    stratified by site (exact times, 1 degree of freedom; NaN without variance)."""

    curves: dict[str, KmCurve]
    chi2: float
    p: float
    calibration: tuple[Calibrated, ...]


GROUPS: Final[tuple[Literal["low", "high"], ...]] = ("low", "high")
HORIZONS_YEARS = (1.0, 3.0, 5.0)
DAYS_PER_YEAR = 365.25
FARTHEST = 0.25  # of a horizon: an edge farther away does not stand for it


class CurveRun(CoxRun[KmCurve]):
    """The survival curve of all sites on a public grid that every site accepts."""

    def __init__(self, hello: HelloRequest, settings: Settings, *, grid: GridRequest | None = None) -> None:
        super().__init__(_curve_steps(hello, settings, grid))


class FrozenRun(CoxRun[float]):
    """C of frozen coefficients within the sites; `hello.codes` names the codes of the model, `hello.folds` is 0."""

    def __init__(self, hello: HelloRequest, score: FrozenScore) -> None:
        super().__init__(_frozen_steps(hello, score))


class PairedRun(CoxRun[PairedConcordance]):
    """C of frozen coefficients with `hello.versions` versions of the same patients' codes, with intervals."""

    def __init__(self, hello: HelloRequest, score: FrozenScore) -> None:
        super().__init__(_paired_steps(hello, score))


class RiskGroupRun(CoxRun[RiskGroups]):
    """The patients divided at the risk of the training mean: curves, log-rank test, calibration."""

    def __init__(self, hello: HelloRequest, settings: Settings, score: FrozenScore) -> None:
        super().__init__(_group_steps(hello, settings, score))


def steps_of(curve: KmCurve) -> tuple[list[float], dict[str, list[float]]]:
    """Years and the values (survival, low, high) of a curve to draw: bins that somebody left, and not the last, which
    is open and so has no end."""
    left = np.append(curve.at_risk[:-1] > curve.at_risk[1:], False)
    values = {name: getattr(curve, name)[left].tolist() for name in ("survival", "low", "high")}
    return (curve.edges[left] / DAYS_PER_YEAR).tolist(), values


def calibrated(group: str, total: CalibrationSums, curve: KmCurve) -> list[Calibrated]:
    """Expected against observed survival at the edge nearest to each horizon; the last bin is open and has no edge.

    A horizon without an edge within a quarter of it is left out: exact anniversaries beside the bins of the curves
    would tell who died between the two.
    """
    rows = []
    years, patients = curve.edges[:-1] / DAYS_PER_YEAR, int(total.patients[0])
    for asked in HORIZONS_YEARS if len(years) and patients else ():
        near = int(np.abs(years - asked).argmin())
        if abs(years[near] - asked) <= FARTHEST * asked:
            found = (float(values[near]) for values in (curve.survival, curve.low, curve.high))
            expected = float(total.expected[near]) / patients
            rows.append(Calibrated(group, asked, float(years[near]), patients, expected, *found))
    return rows


def _curve_steps(hello: HelloRequest, settings: Settings, grid: GridRequest | None) -> Steps[KmCurve]:
    yield hello
    agreed = yield from agree_grid(grid or first_grid(settings.bin_days))
    total = yield KmRequest()
    return km_curve(total, agreed.edges)


def _frozen_steps(hello: HelloRequest, score: FrozenScore) -> Steps[float]:
    yield hello
    yield score.scale
    active = np.ones((1, 1), dtype=bool)
    total = yield PairRequest(np.zeros(1, dtype=np.int64), active, score.padded[None], "training")
    return float(concordance(total, active)[0, 0, 0])


def _paired_steps(hello: HelloRequest, score: FrozenScore) -> Steps[PairedConcordance]:
    yield hello
    yield score.scale
    total = yield PairedRequest(beta=score.padded)
    return paired_concordance(total)


def _group_steps(hello: HelloRequest, settings: Settings, score: FrozenScore) -> Steps[RiskGroups]:
    yield hello
    yield score.scale
    yield GroupRequest(beta=score.padded)
    horizons = settings.bin_days * np.rint(np.array(HORIZONS_YEARS) * DAYS_PER_YEAR / settings.bin_days)
    curves: dict[str, KmCurve] = {}
    rows: list[Calibrated] = []
    for group in GROUPS:
        agreed = yield from agree_group_grid(group, settings.bin_days, horizons)
        curves[group] = km_curve((yield KmRequest(group=group)), agreed.edges)
        rows += calibrated(group, (yield CalibrationRequest(group=group)), curves[group])
    chi2, p = logrank_test((yield LogRankRequest()))
    return RiskGroups(curves, chi2, p, tuple(rows))
