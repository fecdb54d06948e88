"""Disclosure rules of the survival analysis: what a site refuses to compute, whoever asks.

The policy is the site's own; no message can set or lower it. A rule is checked before anything is sent. A refusal names
the rule, never the number that broke it. Per-site sums are far safer than risk sets, and not anonymous: hence these
rules, an evaluation budget, and masking. Why each default: docs/reference/survival.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fourdvq.errors import Refused, SurvivalError
from fourdvq.survival.messages import F64, I64, Bool, GridRequest
from fourdvq.survival.newton import Limits
from fourdvq.survival.table import CoxSite

# What an analysis may be for. Each is one run per cohort, so a made-up word would be a budget without end.
PURPOSES = (
    "selection",
    "model",
    "batch",
    "multivariable",
    "longitudinal",
    "external",
    "assessment",
    "km",
)


@dataclass(frozen=True)
class Policy:
    """The `cox:` block of a site's policy.yaml; the defaults are the federation's."""

    min_patients: int = 20  # per site and training fold
    min_events: int = 5  # per site and training fold
    events_per_parameter: int = 3  # over all sites
    min_carriers: int = 10  # patients with a non-zero share of a code
    min_distinct: int = 10  # distinct values of a code
    min_class: int = 5  # patients in each class of a binary covariate
    max_dominance: float = 0.5  # share of a code's variance at the site that one patient may hold
    min_pairs: int = 20  # comparable pairs of a fold, else zeros
    min_pair_deaths: int = 2  # deaths these pairs come from
    max_abs_beta: float = 3.0  # per SD
    max_abs_eta: float = 5.0  # shared baseline: weights are not shifted there
    min_effective_patients: float = 5.0  # median over risk sets
    max_evaluations: int = 12  # per model and attempt
    max_attempts: int = 3  # of one run: it starts again when a site is lost, and then without it
    max_permutations: int = 200  # replicates with the site's own permutations
    max_correlated: int = 10  # codes of one model, and of the one request for correlations
    min_sd_ratio: float = 0.2  # of the common SD to the site's own: a tiny one would undo max_abs_beta
    purposes: tuple[str, ...] = PURPOSES
    covariates: tuple[str, ...] = ()  # allow-list by name; empty: those of the site's own table
    bin_days: float = 30.0  # shortest bin of a public time grid
    min_bin: int = 5  # deaths, and patients leaving, in a bin of it (or none)
    masking_from: int = 3  # sites in a run from which masks are required

    def __post_init__(self) -> None:
        if min(self.min_patients, self.min_events, self.min_carriers, self.min_class, self.min_bin) < 1:
            raise ValueError("minimum counts must be 1 or more")
        if not 0 < self.max_dominance <= 1:
            raise ValueError("max_dominance must be above 0 and at most 1")
        if self.max_abs_beta <= 0 or self.max_evaluations < 1:
            raise ValueError("max_abs_beta and max_evaluations must be positive")

    def limits(self) -> Limits:
        """What the coordinator must keep to so that sites under this policy do not refuse."""
        return Limits(self.max_abs_beta, self.max_evaluations, self.events_per_parameter)


ALLOW_RERUN = "a person at the site decides: `fourdvq-client survival allow-rerun`"
OFF_LIMITS = Limits()  # disclosure="off": |beta| 20 per SD, 30 rounds, one death is enough
OFF_ABS_ETA = 30.0


@dataclass(frozen=True)
class AuditLine:
    """One evaluation or refusal, for the site's log; the shell adds the time."""

    run: str
    kind: str
    shapes: str
    digest: str  # sha256 of the request
    rule: str = ""  # empty: answered


@dataclass
class RunRegister:
    """Which analyses of a cohort were begun. One run per (cohort, purpose); another, or another fold key, needs a
    person's approval.

    Two fold keys on one cohort would give the sums of two training sets that differ by few patients. The shell keeps
    on disk: `claims`, one entry for every time an analysis began; `approvals`, how many more runs a person at the site
    allows; `admitted`, the runs that used one up. An approval is for one run with all its purposes.
    """

    claims: list[tuple[str, str, str, str]] = field(default_factory=list)  # cohort, key digest, purpose, run
    approvals: int = 0
    admitted: list[tuple[str, str]] = field(default_factory=list)  # key digest, run

    def claim(self, cohort: str, key_digest: str, purpose: str, run: str, *, attempts: int) -> None:
        """Begin an analysis, or begin it again in its run, at most `attempts` times. Refused E_COX_RULE `one_run`."""
        claim = (cohort, key_digest, purpose, run)
        begun = self.claims.count(claim)
        if begun >= attempts:
            raise refuse("one_run", fix="end this run; `fourdvq-client survival runs` lists what was begun")
        another = any((c, p) == (cohort, purpose) for c, _, p, _ in self.claims)
        if not begun and another and (key_digest, run) not in self.admitted:
            if not self.approvals:
                raise refuse("one_run", fix=ALLOW_RERUN)
            self.approvals -= 1
            self.admitted.append((key_digest, run))
        self.claims.append(claim)


def refuse(rule: str, *, fix: str = "") -> Refused:
    """The refusal of a rule: where = the rule's name, and no number."""
    return Refused("E_COX_RULE", where=rule, fix=fix)


def check_covariates(policy: Policy, site: CoxSite, asked: tuple[str, ...]) -> None:
    """Raise Refused `covariates` unless the asked covariates are the site's own, all on its allow-list."""
    if asked and asked != site.names:
        raise refuse("covariates")
    if policy.covariates and not set(site.names or ("",)) <= set(policy.covariates):
        raise refuse("covariates")


def check_cohort(policy: Policy, site: CoxSite, train: Bool) -> None:
    """Raise Refused `min_patients`, `min_events` or `min_class` for too small training folds (F, n) or classes."""
    if (train.sum(axis=1) < policy.min_patients).any():
        raise refuse("min_patients")
    if ((train & site.e).sum(axis=1) < policy.min_events).any():
        raise refuse("min_events")
    rows = train.any(axis=0)
    for column in site.C[rows].T:
        values, counts = np.unique(column, return_counts=True)
        if len(values) == 2 and counts.min() < policy.min_class:
            raise refuse("min_class")


def allowed_codes(policy: Policy, X: F64) -> Bool:
    """(B,) codes whose sums may leave: enough carriers, enough distinct values, no patient that dominates.

    X (n, B): the patients in any training fold.
    """
    carriers = (X != 0).sum(axis=0)
    ordered = np.sort(X, axis=0)
    distinct = 1 + (np.diff(ordered, axis=0) != 0).sum(axis=0)
    squares = (X - X.mean(axis=0)) ** 2
    largest = squares.max(axis=0, initial=0.0) <= policy.max_dominance * squares.sum(axis=0)
    return np.asarray((carriers >= policy.min_carriers) & (distinct >= policy.min_distinct) & largest)


def check_beta(policy: Policy, beta: F64) -> None:
    """Raise Refused `max_abs_beta`: a large coefficient makes a sum of weights the value of one patient."""
    if not np.isfinite(beta).all() or (np.abs(beta) > policy.max_abs_beta * (1 + 1e-6)).any():
        raise refuse("max_abs_beta")


def check_grid(policy: Policy, request: GridRequest) -> None:
    """Raise Refused `times` for exact times, or edges off the lattice of multiples of `bin_days`.

    Grids that slide by a day would tell, bit by bit, on which day a patient died.
    """
    edges = request.edges[1:] if request.from_start and request.edges[:1] < 0 else request.edges
    steps = np.rint(edges / policy.bin_days)
    on_lattice = np.abs(edges - steps * policy.bin_days) < 1e-9 * policy.bin_days
    if request.exact or not len(edges) or not on_lattice.all() or (np.diff(steps) < 1).any() or steps[0] < 1:
        raise refuse("times")


def accepted_bins(policy: Policy, deaths: I64, leaving: I64) -> Bool:
    """(G,) bins in which this site has none or enough, both of deaths and of patients leaving the risk set."""
    few_deaths = (deaths > 0) & (deaths < policy.min_bin)
    few_leaving = (leaving > 0) & (leaving < policy.min_bin)
    return np.asarray(~(few_deaths | few_leaving))


class Budget:
    """Evaluations of every model (replicate, fold, column) in one run."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._spent: dict[int, I64] = {}

    def spend(self, replicates: I64, active: Bool) -> None:
        """Count one evaluation of each active model; raises Refused `max_evaluations` before any of them is counted."""
        asked = active.reshape(len(replicates), -1, active.shape[1])
        for replicate, flags in zip(replicates, asked, strict=True):
            spent = self._spent.setdefault(int(replicate), np.zeros(flags.shape, dtype=np.int64))
            if (spent[flags] >= self.most).any():
                raise refuse("max_evaluations")
        for replicate, flags in zip(replicates, asked, strict=True):
            self._spent[int(replicate)] += flags


def small_count(count: int, least: int = 5) -> str:
    """A count for people's eyes: '<5' when it is small and not zero."""
    return f"<{least}" if 0 < count < least else str(count)


def as_policy(disclosure: Policy | str) -> Policy | None:
    """The policy, or None for "off"; raises SurvivalError for anything else."""
    if isinstance(disclosure, Policy):
        return disclosure
    if disclosure == "off":
        return None
    raise SurvivalError("E_SURVIVAL_INPUT", where="disclosure", found=repr(disclosure), wanted='"off" or a Policy')
