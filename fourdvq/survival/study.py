"""What a site knows of the analysis in progress: its rows, training folds, chosen codes, and what was asked already."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from fourdvq.errors import SurvivalError
from fourdvq.survival import disclosure as rules
from fourdvq.survival.cox import Prepared
from fourdvq.survival.disclosure import Policy, refuse
from fourdvq.survival.folds import assign_folds, folds_digest, training_rows
from fourdvq.survival.messages import F64, Bool, GridRequest, HelloRequest
from fourdvq.survival.table import CoxSite

MISSING_IDS = "pseudonyms of the patients"


@dataclass
class Study:
    """The analysis in progress. `others`: the chosen codes (n, k) in the versions after the first. `answered`: kinds
    of sums that leave once. `grids`: the last accepted one of each group; `used`: groups of which sums on it left."""

    hello: HelloRequest
    site: CoxSite  # with training rows
    allowed: Bool  # (B,)
    folds_digest: str = ""
    others: tuple[F64, ...] = ()
    prepared: Prepared | None = None
    kept: Bool = field(default_factory=lambda: np.zeros(0, dtype=bool))
    mean: F64 = field(default_factory=lambda: np.zeros(0))  # of the scale
    sd: F64 = field(default_factory=lambda: np.ones(0))
    grids: dict[str, GridRequest] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    high: Bool | None = None  # (n,) the group of high risk
    group_beta: F64 = field(default_factory=lambda: np.zeros(0))
    answered: set[str] = field(default_factory=set)

    def standardised_others(self) -> tuple[F64, ...]:
        """`others` in the units of the scale."""
        k = len(self.hello.codes)
        return tuple((codes - self.mean[:k]) / self.sd[:k] for codes in self.others)

    def once(self, kind: str, policy: Policy | None) -> None:
        """Note that sums of this kind leave now. Refused `max_evaluations` for the second time under a policy."""
        if policy and kind in self.answered:
            raise refuse("max_evaluations")
        self.answered.add(kind)

    def members(self, group: str) -> Bool:
        """(n,) rows of a group. Refused `order` for a group before the division, and for everybody after it."""
        if (group == "all") != (self.high is None):
            raise refuse("order")
        if self.high is None:
            return np.ones(len(self.site.t), dtype=bool)
        return self.high if group == "high" else ~self.high

    def used_grid(self, group: str = "all") -> GridRequest:
        """The agreed grid, from now on the group's only one: two of them tell who died between their edges."""
        if group not in self.grids:
            raise refuse("times")
        self.used.add(group)
        return self.grids[group]


def open_study(site: CoxSite, request: HelloRequest, key: bytes, policy: Policy | None) -> Study:
    """Folds and codes as the request names them. Raises Refused `withheld_code` and `shape`, SurvivalError without the
    ids that folds need."""
    table, digest = _with_folds(site, request, key)
    others: tuple[F64, ...] = ()
    if request.codes:
        table, others = _with_codes(table, request, policy)
    elif request.versions != 1:
        raise refuse("shape")
    return Study(request, table, np.ones(table.X.shape[1], dtype=bool), digest, others)


def train_of(site: CoxSite) -> Bool:
    """(F, n) training rows; all rows in one fold where none were made."""
    return np.ones((1, len(site.t)), dtype=bool) if site.train is None else np.asarray(site.train)


def rows_of(site: CoxSite) -> Bool:
    """(n,) the rows in any training fold."""
    return np.asarray(train_of(site).any(axis=0))


def _with_folds(site: CoxSite, request: HelloRequest, key: bytes) -> tuple[CoxSite, str]:
    if request.folds < 0:
        return site, ""
    if request.folds == 0:
        return dataclasses.replace(site, train=np.ones((1, len(site.t)), dtype=bool)), ""
    if site.ids is None:
        raise SurvivalError("E_SURVIVAL_INPUT", where="column ids", found="nothing", wanted=MISSING_IDS)
    fold = assign_folds(site.ids, site.e, folds=request.folds, key=key, site=site.name, mode=request.fold_mode)
    train = training_rows(fold, request.folds)
    return dataclasses.replace(site, train=train), folds_digest(site.ids, fold, key=key)


def _with_codes(site: CoxSite, request: HelloRequest, policy: Policy | None) -> tuple[CoxSite, tuple[F64, ...]]:
    """The site with the chosen codes as first covariates and no code columns: one model of all of them."""
    if request.versions < 1 or site.X.shape[1] % request.versions:
        raise refuse("shape")
    codes, size = request.codes, site.X.shape[1] // request.versions
    if min(codes) < 0 or max(codes) >= size or len(set(codes)) < len(codes):
        raise refuse("withheld_code")
    first, *others = (site.X[:, [v * size + code for code in codes]] for v in range(request.versions))
    if policy:
        own = rows_of(site)
        allowed = all(rules.allowed_codes(policy, chosen[own]).all() for chosen in (first, *others))
        if len(codes) > policy.max_correlated or not allowed:
            raise refuse("withheld_code")
    names = (*(f"code_{code}" for code in codes), *site.names) if site.names else ()
    table = dataclasses.replace(site, X=site.X[:, :0], C=np.column_stack([first, site.C]), names=names)
    return table, tuple(others)
