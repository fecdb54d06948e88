"""Kaplan-Meier curves, the log-rank test and the concordance of frozen coefficients, over sites.

Each is a short run of requests (see `run`). A site with frozen coefficients, as the external one, is asked for its pair
counts and for nothing else: no moments, no sums of covariates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fourdvq.survival.concordance import concordance
from fourdvq.survival.kaplan_meier import KmCurve, km_curve, logrank_test
from fourdvq.survival.messages import (
    F64,
    GridRequest,
    HelloRequest,
    KmRequest,
    LogRankRequest,
    PairRequest,
    ScaleRequest,
)
from fourdvq.survival.run import CoxRun, Settings, Steps, agree_grid
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


class CurveRun(CoxRun[KmCurve]):
    """The survival curve of all sites on a public grid that every site accepts."""

    def __init__(self, hello: HelloRequest, settings: Settings, *, grid: GridRequest | None = None) -> None:
        super().__init__(_curve_steps(hello, settings, grid))


class FrozenRun(CoxRun[float]):
    """C of frozen coefficients within the sites; `hello.codes` names the codes of the model, `hello.folds` is 0."""

    def __init__(self, hello: HelloRequest, score: FrozenScore) -> None:
        super().__init__(_frozen_steps(hello, score))


class LogRankRun(CoxRun[tuple[float, float]]):
    """(chi-square, p) of frozen risk above against below that of the training mean, stratified by site."""

    def __init__(self, hello: HelloRequest, score: FrozenScore) -> None:
        super().__init__(_logrank_steps(hello, score))


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


def _logrank_steps(hello: HelloRequest, score: FrozenScore) -> Steps[tuple[float, float]]:
    yield hello
    yield score.scale
    total = yield LogRankRequest(beta=score.padded)
    return logrank_test(total)
