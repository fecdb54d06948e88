"""The server's half of a federated Cox regression: Newton's method on summed messages, all models in step.

`Newton.request()` names the models still active and where to evaluate them; `update` takes the sum of the sites'
answers. A step that lowers the likelihood is halved, which costs a round for that model alone. The last, tiny step is
applied without a message: one more step of a quadratically convergent iteration takes the distance to the maximum from
1e-8 to about 1e-16.

Axes: A analyses (replicates times folds), M model columns, K models of this call, p parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from fourdvq.errors import SurvivalError
from fourdvq.survival.messages import F64, I64, Bool, CoxRequest, CoxSums

Status = npt.NDArray[np.str_]
G = TypeVar("G", bound=np.generic)
STATUSES: Final = ("withheld", "too_few_events", "dead", "infinite", "capped", "not_converged", "ok")
_NONE: Final = ""  # still running
NO_INFORMATION = 1e-9  # per death: below it a column does not vary in the fold
SMALL_STEP = 1e-8  # SD units
SMALL_DECREMENT = 1e-16
FLAT_GAIN, FLAT_STEP, FLAT_AFTER = 1e-9, 1e-3, 3
LONGEST_STEP = 10.0
MOST_HALVINGS = 10
SMALLEST_DIAGONAL = 1e-100  # keeps the scaling of an empty information invertible
SINGULAR, NUDGE = 1e-9, 1e-6  # smallest eigenvalue of the diagonally scaled information; what is added below it


@dataclass(frozen=True)
class Limits:
    """Bounds of the iteration: |beta| per SD, rounds, and total deaths per parameter (0: one death is enough)."""

    max_abs_beta: float = 20.0
    max_rounds: int = 30
    events_per_parameter: int = 0

    def least_events(self, parameters: int) -> int:
        """Deaths in the training rows of a fold below which its models are not fitted."""
        return max(self.events_per_parameter * parameters, 1)


@dataclass(frozen=True, eq=False)
class Fits:
    """Estimates in standardised units, NaN where the status is not `ok`; `last_beta` is the last iterate of all."""

    beta: F64  # (A, M, p)
    se: F64
    p: F64
    log_likelihood: F64  # (A, M), unpenalised
    log_likelihood_null: F64
    status: Status  # (A, M)
    column_status: Status  # (A, M, p)
    covariance: F64  # (A, M, p, p)
    last_beta: F64
    rounds: int

    @property
    def ok(self) -> Bool:
        """(A, M) models that converged."""
        return np.asarray(self.status == "ok")


class Newton:
    """Newton's method for the models `active` (A, M); the last column has no biomarker.

    `deaths` (A,): training deaths of each analysis over all sites. `ridge`: lambda of -lambda/2 sum beta^2.
    `replicates` (R,) with A = R * folds. `per_column`: a column that runs away is fixed there and the others go on.
    """

    def __init__(
        self,
        active: Bool,
        *,
        parameters: int,
        deaths: I64,
        limits: Limits,
        ridge: float = 0.0,
        replicates: I64 | None = None,
        per_column: bool = False,
    ) -> None:
        self.shape = active.shape
        self.where = np.flatnonzero(active.ravel())
        self.limits, self.ridge, self.per_column = limits, float(ridge), per_column
        self.replicates = np.zeros(1, dtype=np.int64) if replicates is None else replicates
        k, p = len(self.where), parameters
        self.beta, self.step = np.zeros((k, p)), np.zeros((k, p))
        self.ll, self.null = np.full(k, -np.inf), np.full(k, np.nan)
        self.g, self.info = np.zeros((k, p)), np.zeros((k, p, p))
        self.deaths = deaths[self.where // active.shape[1]]
        self.free = np.ones((k, p), dtype=bool)
        self.free[:, 0] = self.where % active.shape[1] < active.shape[1] - 1
        self.halvings = np.zeros(k, dtype=np.int64)
        self.singular = np.zeros((k, p), dtype=bool)
        self.column = np.full((k, p), _NONE, dtype="<U14")
        self.column[~self.free] = "dead"
        self.status = np.full(k, _NONE, dtype="<U14")
        self.status[self.deaths < limits.least_events(parameters)] = "too_few_events"
        self.rounds = 0

    @property
    def running(self) -> I64:
        """Models that need another message."""
        return np.flatnonzero(self.status == _NONE)

    @property
    def done(self) -> bool:
        """No model needs another message."""
        return not len(self.running)

    @property
    def largest_step(self) -> float:
        """Largest step among the running models, SD units."""
        return float(np.abs(self.step[self.running]).max(initial=0.0))

    def request(self) -> CoxRequest | None:
        """Where the running models are evaluated next; None when done."""
        if self.done:
            return None
        flags = np.zeros(self.shape[0] * self.shape[1], dtype=bool)
        flags[self.where[self.running]] = True
        beta = (self.beta + self.step)[self.running]
        return CoxRequest(replicates=self.replicates, active=flags.reshape(self.shape), beta=beta)

    def update(self, sums: CoxSums) -> None:
        """Take the sum of all sites' answers to the last request. Raises SurvivalError if it has another shape."""
        run = self.running
        if sums.gradient.shape != (len(run), self.beta.shape[1]):
            raise SurvivalError(
                "E_SURVIVAL_INPUT", where="sums", found="another number of models", wanted="as requested"
            )
        self.rounds += 1
        ll, tried = sums.log_likelihood, self.beta[run] + self.step[run]
        info = unpack(sums.information, self.beta.shape[1])
        score = ll - 0.5 * self.ridge * (tried**2).sum(axis=1)
        with np.errstate(invalid="ignore"):
            best = self.ll[run] - 0.5 * self.ridge * (self.beta[run] ** 2).sum(axis=1)
            gain = score - best
            slack = np.where(np.isfinite(best), 1e-12 * np.abs(best), 0.0)
            usable = np.isfinite(score) & np.isfinite(sums.gradient).all(axis=1) & np.isfinite(info).all(axis=(1, 2))
            good = usable & (sums.refused == 0) & (gain >= -slack)
        self._reject(run[~good])
        taken, gain = run[good], gain[good]
        self.beta[taken], self.ll[taken] = tried[good], ll[good]
        self.g[taken], self.info[taken] = sums.gradient[good], info[good]
        self.halvings[taken] = 0
        if self.rounds == 1:
            self.null[taken] = ll[good]
            self._pin_dead(taken)
            alive = self.status[taken] == _NONE
            taken, gain = taken[alive], gain[alive]
        self._advance(taken, gain)
        if self.rounds >= self.limits.max_rounds:
            self.status[self.running] = "not_converged"

    def result(self) -> Fits:
        """Estimates of all models of the call, in the frame (A, M); models never asked for are `withheld`."""
        k, p = self.beta.shape
        good = (self.status == "ok")[:, None] & (self.column == _NONE)
        cov = np.full((k, p, p), np.nan)
        fitted = np.flatnonzero(self.status == "ok")
        if len(fitted):
            cov[fitted] = np.linalg.inv(self._curvature(fitted, self.free[fitted])[0])
        cov = np.where(good[:, :, None] & good[:, None, :], cov, np.nan)
        beta = np.where(good, self.beta, np.nan)
        se = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
        column = np.where(self.column == _NONE, self.status[:, None], self.column)
        ll = np.where(self.status == "ok", self.ll, np.nan)
        return Fits(
            beta=self._framed(beta),
            se=self._framed(se),
            p=self._framed(2.0 * ndtr(-np.abs(beta / se))),
            log_likelihood=self._framed(ll),
            log_likelihood_null=self._framed(self.null),
            status=self._framed(self.status, "withheld"),
            column_status=self._framed(column, "withheld"),
            covariance=self._framed(cov),
            last_beta=self._framed(self.beta),
            rounds=self.rounds,
        )

    def _reject(self, models: I64) -> None:
        self.step[models] *= 0.5
        self.halvings[models] += 1
        self.status[models[self.halvings[models] > MOST_HALVINGS]] = "not_converged"

    def _pin_dead(self, models: I64) -> None:
        """A column without information at beta = 0 does not vary in this fold, though it may vary in another."""
        flat = np.diagonal(self.info[models], axis1=1, axis2=2) < NO_INFORMATION * self.deaths[models, None]
        dead = flat & self.free[models]
        self.column[models] = np.where(dead, "dead", self.column[models])
        self.status[models[dead[:, 0]]] = "dead"
        self.free[models] &= ~flat
        none_left = models[~self.free[models].any(axis=1)]
        self.status[none_left] = np.where(self.status[none_left] == _NONE, "ok", self.status[none_left])

    def _advance(self, models: I64, gain: F64) -> None:
        """The next step of models whose last one was accepted, or the end of their iteration."""
        if not len(models):
            return
        step, decrement = self._newton_step(models)
        flat = (self.rounds > FLAT_AFTER) & (gain < FLAT_GAIN * np.abs(self.ll[models]))
        runs_away = flat[:, None] & (np.abs(step) > FLAT_STEP)
        edge = np.abs(self.beta[models]) >= self.limits.max_abs_beta * (1 - 1e-9)
        outward = edge & (np.sign(step) == np.sign(self.beta[models]))
        stopped = self._stop(models, runs_away, "infinite") | self._stop(models, outward & ~runs_away, "capped")
        if self.per_column and stopped.any():
            step[stopped], decrement[stopped] = self._newton_step(models[stopped])
        size = np.abs(step).max(axis=1)
        converged = (size < SMALL_STEP) | (decrement < SMALL_DECREMENT)
        going = self.status[models] == _NONE
        end = models[converged & going]
        self.beta[end] += step[converged & going]
        self.step[end] = 0.0
        self._settle(end)
        on = ~converged & going
        self.step[models[on]] = self._shortened(self.beta[models[on]], step[on])

    def _stop(self, models: I64, columns: Bool, status: str) -> Bool:
        """Give `status` to models with any of `columns`, or, with per_column, fix those columns only."""
        hit = columns.any(axis=1)
        if self.per_column:
            self.column[models] = np.where(columns, status, self.column[models])
            self.free[models] &= ~columns
            gone = models[hit & ~self.free[models].any(axis=1)]
            self.status[gone] = status
        else:
            running = self.status[models] == _NONE
            self.status[models[hit & running]] = status
        return np.asarray(hit)

    def _settle(self, models: I64) -> None:
        """Converged: `ok`, unless the information was singular at the end (collinear columns)."""
        bad = self.singular[models]
        if self.per_column:
            self.column[models] = np.where(bad & self.free[models], "not_converged", self.column[models])
            self.status[models] = "ok"
        else:
            self.status[models] = np.where(bad.any(axis=1), "not_converged", "ok")

    def _newton_step(self, models: I64) -> tuple[F64, F64]:
        free = self.free[models]
        H, singular = self._curvature(models, free)
        self.singular[models] = singular
        slope = np.where(free, self.g[models] - self.ridge * self.beta[models], 0.0)
        step = np.linalg.solve(H, slope[..., None])[..., 0]
        return np.asarray(step, dtype=np.float64), np.asarray(0.5 * (slope * step).sum(axis=1))

    def _curvature(self, models: I64, free: Bool) -> tuple[F64, Bool]:
        """Penalised information (K, p, p) with fixed columns as identity, made safely invertible; and which columns
        (K, p) take part in a direction without information."""
        p = self.beta.shape[1]
        both = free[:, :, None] & free[:, None, :]
        H = np.where(both, self.info[models] + self.ridge * np.eye(p), 0.0)
        index = np.arange(p)
        H[:, index, index] = np.where(free, H[:, index, index], 1.0)
        scale = np.sqrt(np.maximum(H[:, index, index], SMALLEST_DIAGONAL))
        R = H / (scale[:, :, None] * scale[:, None, :])
        singular = np.zeros((len(models), p), dtype=bool)
        # The determinant bounds the smallest eigenvalue from below: most models need no eigenvalues.
        doubt = np.flatnonzero(~(np.linalg.det(R) > SINGULAR * float(p) ** (p - 1)))
        if len(doubt):
            values, vectors = np.linalg.eigh(R[doubt])
            lowest = values[:, 0]
            low = lowest < SINGULAR
            singular[doubt] = low[:, None] & (np.abs(vectors[:, :, 0]) > 1e-3)
            R[doubt] += np.where(low, NUDGE + np.maximum(-lowest, 0.0), 0.0)[:, None, None] * np.eye(p)
        return R * (scale[:, :, None] * scale[:, None, :]), singular

    def _shortened(self, beta: F64, step: F64) -> F64:
        """No step longer than LONGEST_STEP, and none past the cap on |beta|, which the sites refuse."""
        size = np.abs(step).max(axis=1, initial=0.0)
        factor = np.minimum(1.0, LONGEST_STEP / np.maximum(size, 1e-300))
        step = step * factor[:, None]
        room = np.where(step > 0, self.limits.max_abs_beta - beta, self.limits.max_abs_beta + beta)
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = np.where(step != 0, room / np.abs(step), np.inf).min(axis=1)
        shortened = step * np.minimum(1.0, np.maximum(reach, 0.0))[:, None]
        bound = self.limits.max_abs_beta
        return np.asarray(np.clip(beta + shortened, -bound, bound) - beta)

    def _framed(self, values: npt.NDArray[G], fill: object = np.nan) -> npt.NDArray[G]:
        frame: npt.NDArray[Any] = np.full((self.shape[0] * self.shape[1], *values.shape[1:]), fill, dtype=values.dtype)
        frame[self.where] = values
        return frame.reshape(*self.shape, *values.shape[1:])


def unpack(packed: F64, p: int) -> F64:
    """Symmetric (m, p, p) from the upper triangle row by row (m, p(p+1)/2)."""
    a, b = np.triu_indices(p)
    full = np.zeros((len(packed), p, p))
    full[:, a, b] = packed
    full[:, b, a] = packed
    return full
