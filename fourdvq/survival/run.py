"""The coordinator's side as an object that asks and listens: the same for one process and for a network.

    run = ModelRun(...) or SelectionRun(...)
    while (request := run.request()) is not None:
        run.update(combine([site.answer(request) for site in sites]))
    run.result()

A run is a deterministic function of the sums it is given and holds no patient data. To resume one, make it again and
feed it the recorded sums; it then asks for the next. The steps are written as a generator, in the order they happen.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from fourdvq.errors import SurvivalError
from fourdvq.survival.concordance import concordance
from fourdvq.survival.disclosure import OFF_LIMITS, Policy
from fourdvq.survival.messages import (
    F64,
    I64,
    Bool,
    CoxMoments,
    GridRequest,
    HelloRequest,
    Message,
    MomentsRequest,
    PairRequest,
    PhRequest,
    ResultMessage,
    RiskSums,
    ScaleRequest,
    Sums,
)
from fourdvq.survival.newton import Fits, Limits, Newton
from fourdvq.survival.proportional import PhTest, ph_test
from fourdvq.survival.scale import scale_from_moments
from fourdvq.survival.shared import first_grid, merged_grid, shared_likelihood

R = TypeVar("R")
Steps = Generator[Message, Any, R]


class CoxRun(Generic[R]):
    """Drives the steps of an analysis; `rounds` and `largest_step` are for tracking, `bytes_up` is per site."""

    def __init__(self, steps: Steps[R]) -> None:
        self._steps = steps
        self._pending: Message | None = next(steps)
        self._result: R | None = None
        self.messages = 0
        self.bytes_up = 0

    def request(self) -> Message | None:
        """What every site is asked now; the same until `update`, None when the analysis is finished."""
        return self._pending

    def update(self, sums: Sums) -> None:
        """Take the sum of all sites' answers. A site missing in any round changes the cohort: never call it then."""
        if self._pending is None:
            raise SurvivalError("E_SURVIVAL_INPUT", where="run", found="an answer after the end", wanted="no answer")
        self.messages += 1
        self.bytes_up += sums.nbytes
        try:
            self._pending = self._steps.send(sums)
        except StopIteration as end:
            self._pending, self._result = None, end.value

    def result(self) -> R:
        """The analysis' result; raises SurvivalError before the end."""
        if self._result is None:
            raise SurvivalError(
                "E_SURVIVAL_INPUT", where="run", found="an unfinished analysis", wanted="a finished one"
            )
        return self._result


@dataclass(frozen=True)
class Settings:
    """How the coordinator keeps to the sites' rules: from the federation's `Policy`, or none for local data."""

    limits: Limits = OFF_LIMITS
    rounded: bool = False  # the broadcast scale
    bin_days: float = 30.0  # of the first public grid

    @classmethod
    def under(cls, policy: Policy | None) -> Settings:
        """Settings that a site with this policy accepts."""
        return cls() if policy is None else cls(policy.limits(), True, policy.bin_days)


@dataclass(frozen=True, eq=False)
class Study:
    """What the coordinator knows before the first fit: totals, scale and codes. Totals stay with it."""

    hello: HelloRequest
    settings: Settings
    total: CoxMoments
    scale: ScaleRequest

    @property
    def n_codes(self) -> int:
        """B."""
        return len(self.scale.kept)

    @property
    def parameters(self) -> int:
        """p = 1 + q."""
        return 1 + len(self.scale.mean) - self.n_codes

    @property
    def all_models(self) -> Bool:
        """(F, M): every kept code and the covariates alone, in every fold."""
        columns = np.append(self.scale.kept, True)
        return np.broadcast_to(columns, (len(self.total.fold_events), len(columns))).copy()

    @property
    def units(self) -> F64:
        """(M, p) standard deviations of the columns of each model; 1 for the absent biomarker of the last."""
        covariates = self.scale.sd[self.n_codes :]
        first = np.append(self.scale.sd[: self.n_codes], 1.0)
        return np.column_stack([first, np.broadcast_to(covariates, (len(first), len(covariates)))])


@dataclass(frozen=True, eq=False)
class ModelResult:
    """A fitted batch in standardised units, its concordance (V, A, M), and the test of proportional hazards (p,) of the
    model of the covariates, if asked for."""

    study: Study
    fits: Fits
    concordance: F64 = field(default_factory=lambda: np.zeros(0))
    ph: PhTest | None = None


class ModelRun(CoxRun[ModelResult]):
    """Fits one batch of models: all codes of the sites, or one model of `hello.codes` and the covariates.

    `ridge` per SD, or `penalizer` in lifelines' meaning (ridge = n * penalizer). `count`: which rows the concordance is
    counted on, "" for none. `grid`: exact death times, for a shared baseline with disclosure off. `ph`: transform of
    time for the test of proportional hazards of the covariates' model in fold 0, "" for none. `announce`: tell the
    sites the model of `hello.codes` and the covariates at the end.
    """

    def __init__(
        self,
        hello: HelloRequest,
        settings: Settings,
        *,
        ridge: float = 0.0,
        penalizer: float = 0.0,
        per_column: bool = False,
        count: Literal["", "validation", "training"] = "",
        grid: GridRequest | None = None,
        ph: Literal["", "log", "identity"] = "",
        announce: bool = False,
    ) -> None:
        super().__init__(_model_steps(hello, settings, (ridge, penalizer), per_column, count, grid, ph, announce))


def open_study(hello: HelloRequest, settings: Settings, grid: GridRequest | None = None) -> Steps[Study]:
    """Hello, moments, scale, and a time grid if the baseline is shared."""
    yield hello
    total: CoxMoments = yield MomentsRequest()
    scale = scale_from_moments(total, rounded=settings.rounded)
    yield scale
    if hello.baseline == "shared":
        yield from agree_grid(grid or first_grid(settings.bin_days))
    return Study(hello, settings, total, scale)


def agree_grid(grid: GridRequest) -> Steps[GridRequest]:
    """The finest bins, from those of `grid`, that every site accepts; each site keeps the last grid it accepted."""
    sums = yield grid
    if grid.exact:
        return grid
    if not (sums.accepting == sums.sites).all():
        edges = yield from _joined(grid.edges, sums.accepting == sums.sites, group=grid.group)
        grid = replace(grid, edges=edges)
        sums = yield grid
    while (coarser := merged_grid(grid, sums)) is not None:
        grid = coarser
        sums = yield grid
    return grid


def agree_group_grid(group: Literal["low", "high"], bin_days: float, horizons: F64) -> Steps[GridRequest]:
    """As `agree_grid` for one risk group, keeping those of the `horizons` (days on the lattice) that every site accepts
    as edges, and the finest bins between them."""
    fine = first_grid(bin_days).edges
    coarse = yield from agree_grid(GridRequest(edges=np.append(horizons, fine[-1]), group=group))
    sums = yield GridRequest(edges=fine, group=group)
    sound_bins = sums.accepting == sums.sites
    parts, start = [], -1.0
    for end in coarse.edges:
        inner = (fine > start) & (fine <= end)
        parts.append((yield from _joined(fine[inner], sound_bins[inner], start=start, group=group)))
        start = float(end)
    grid = GridRequest(edges=np.concatenate(parts), group=group)
    sums = yield grid
    accepted = sums.accepting == sums.sites
    if not accepted.all():  # the last bin of a part took in too few: those parts stay whole
        sizes = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        sound = [bool(accepted[sizes == k].all()) for k in range(len(parts))]
        edges = [part if good else part[-1:] for part, good in zip(parts, sound, strict=True)]
        grid = GridRequest(edges=np.concatenate(edges), group=group)
        yield grid
    return grid


def _joined(
    edges: F64, accepted: Bool, *, start: float = -1.0, group: Literal["all", "low", "high"] = "all"
) -> Steps[F64]:
    """Edges of bins from `start` on: accepted ones stay; one that is not reaches as far as every site needs, one
    question per joined bin."""
    kept: list[float] = []
    g = 0
    while g < len(edges):
        if not accepted[g]:
            before = edges[g - 1] if g else start
            reach = yield GridRequest(edges=np.append(before, edges[g:]), from_start=True, group=group)
            enough = np.flatnonzero((reach.accepting == reach.sites)[1:])
            if not len(enough):
                break
            g += int(enough[0])
        kept.append(float(edges[g]))
        g += 1
    if g < len(edges):  # too few are left for a bin of their own
        kept = [*kept[:-1], float(edges[-1])]
    return np.array(kept)


def fit(
    study: Study,
    active: Bool,
    *,
    ridge: float = 0.0,
    per_column: bool = False,
    replicates: I64 | None = None,
    deaths: I64 | None = None,
) -> Steps[Fits]:
    """Newton's rounds for the models `active` (A, M)."""
    newton = Newton(
        active,
        parameters=study.parameters,
        deaths=study.total.fold_events if deaths is None else deaths,
        limits=study.settings.limits,
        ridge=ridge,
        replicates=replicates,
        per_column=per_column,
    )
    while (request := newton.request()) is not None:
        sums = yield request
        if isinstance(sums, RiskSums):
            sums = shared_likelihood(sums, request, ties=study.hello.ties)
        newton.update(sums)
    return newton.result()


def count_pairs(beta: F64, active: Bool, *, rows: Any, replicates: I64 | None = None) -> Steps[F64]:
    """C (V, A, M) of the models `active`, from beta (A, M, p); a missing coefficient counts as 0."""
    reps = np.zeros(1, dtype=np.int64) if replicates is None else replicates
    if not active.any():
        return concordance_of_nothing(active)
    request = PairRequest(reps, active, np.nan_to_num(beta[active]), rows)
    total = yield request
    return concordance(total, active)


def concordance_of_nothing(active: Bool) -> F64:
    """All NaN, in the frame of `concordance`."""
    return np.full((2, *active.shape), np.nan)


def _model_steps(
    hello: HelloRequest,
    settings: Settings,
    penalties: tuple[float, float],
    per_column: bool,
    count: Literal["", "validation", "training"],
    grid: GridRequest | None,
    transform: Literal["", "log", "identity"],
    announce: bool,
) -> Steps[ModelResult]:
    study = yield from open_study(hello, settings, grid)
    ridge = penalties[0] + penalties[1] * float(study.total.n[0])
    fits = yield from fit(study, study.all_models, ridge=ridge, per_column=per_column)
    result = ModelResult(study, fits)
    if count:
        used = fits.last_beta if per_column else fits.beta
        c = yield from count_pairs(used, fits.ok, rows=count)
        result = replace(result, concordance=c)
    if transform and fits.ok[0, -1]:
        beta = np.nan_to_num(fits.beta[0, -1])
        sums = yield PhRequest(beta=beta, transform=transform)
        result = replace(result, ph=ph_test(sums, np.nan_to_num(fits.covariance[0, -1])))
    if announce and fits.ok[0, -1]:
        beta, se, p = (values[0, -1, 1:] for values in (fits.beta, fits.se, fits.p))
        codes = np.array(hello.codes, dtype=np.int64)
        yield ResultMessage(codes, beta, se, p, mean=study.scale.mean, sd=study.scale.sd)
    return result
