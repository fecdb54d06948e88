"""The site's half of a federated Cox regression: one additive message for thousands of models.

Model (f, b): z = (code b, covariates) standardised, on the training rows of fold f. At every death, w = exp(z.beta),

    A^r = sum over patients at risk of w z^(r),  r = 0, 1, 2;  those who die at the same time count 1 - l/m for the l-th
          of m tied deaths (Efron) or 1 (Breslow)
    ll  = sum (eta - log A^0)    g = sum (z - A^1/A^0)    I = sum (A^2/A^0 - (A^1/A^0)(A^1/A^0)')

A^r is linear in w, so for all models of a fold it is one matrix product with a matrix L (deaths, patients) of entries
in [0, 1]: only positive terms are added, nothing cancels. The baseline hazard is the site's own, so adding the sites'
messages gives Cox regression stratified by site. Sources: Breslow 1974; Efron 1977; Therneau and Grambsch 2000, ch. 3.

Axes: n patients, M = B + 1 model columns (the last one is zero: the model of the covariates), p = 1 + q, D deaths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from fourdvq.survival.messages import F64, I64, Bool, CoxRequest, CoxSums, ScaleRequest
from fourdvq.survival.table import CoxSite, strata_of

CHUNK = 256  # models at once: the working arrays stay in the processor's cache
BLOCK_ROWS = 96  # rows per block of L: the cost grows with n, not with n squared
SMALLEST_RISK_SET = 10  # patients; smaller ones are not judged by `effective`


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive rows in descending time. `L` (d + 1, rows): their weights in the block's d deaths; last row all 1."""

    start: int
    L: F64
    first: bool  # first block of a stratum: nothing is carried over from the block before


@dataclass(frozen=True, eq=False)
class RiskPlan:
    """Who is at risk at each death of one fold. Depends on times and events alone, not on the covariates."""

    order: I64  # rows of the site, stratum by stratum, in descending time
    blocks: tuple[Block, ...]
    dead: I64  # positions in `order` of the deaths, in the order of the rows of L
    leading: Bool  # (D,) deaths whose row of L is the whole risk set
    at_risk: I64  # (D,) patients in the risk set


@dataclass(frozen=True, eq=False)
class Prepared:
    """A site's standardised columns and the risk sets of its folds. `shuffle(r)` are the row numbers of replicate r."""

    Z: F64  # (n, M)
    C: F64  # (n, q)
    t: F64
    e: Bool
    strata: I64
    train: Bool  # (F, n)
    ties: str
    shuffle: Callable[[int], I64]
    plans: dict[int, RiskPlan] = field(default_factory=dict)

    @property
    def n_parameters(self) -> int:
        """p: the biomarker and the covariates."""
        return 1 + int(self.C.shape[1])

    def plan(self, fold: int) -> RiskPlan:
        """The risk sets of a fold; made once."""
        if fold not in self.plans:
            self.plans[fold] = risk_plan(self.t, self.e, self.strata, self.train[fold], ties=self.ties)
        return self.plans[fold]

    def rows(self, replicate: int) -> tuple[F64, F64]:
        """Z and C of a replicate: the rows are shuffled against (t, e, fold), so every fold keeps its deaths."""
        if replicate == 0:
            return self.Z, self.C
        order = self.shuffle(replicate)
        return self.Z[order], self.C[order]


def no_shuffle(replicate: int) -> I64:
    """For analyses without permutation replicates."""
    raise ValueError(f"replicate {replicate} of an analysis without permutations")


def prepare(
    site: CoxSite, scale: ScaleRequest, *, ties: str = "efron", shuffle: Callable[[int], I64] = no_shuffle
) -> Prepared:
    """Standardise with the common scale; codes that are not kept become 0."""
    n, n_codes = site.X.shape
    mean, sd = scale.mean, scale.sd
    Z = np.zeros((n, n_codes + 1))
    np.divide(site.X - mean[:n_codes], sd[:n_codes], out=Z[:, :n_codes])
    Z[:, :n_codes][:, ~scale.kept] = 0.0
    train = np.ones((1, n), dtype=bool) if site.train is None else np.asarray(site.train)
    C = np.ascontiguousarray((site.C - mean[n_codes:]) / sd[n_codes:])
    return Prepared(Z, C, site.t, site.e, strata_of(site), train, ties, shuffle)


def evaluate(prepared: Prepared, request: CoxRequest, *, min_effective: float = 0.0) -> CoxSums:
    """Partial log-likelihood, gradient and packed information of every active model.

    `min_effective` > 0: a model whose median effective number of patients, (sum w)^2 / sum w^2 over risk sets of 10 or
    more, is below it is withheld: zeros, and counted in `refused`.
    """
    m, p = request.beta.shape
    ll, g, info = np.zeros(m), np.zeros((m, p)), np.zeros((m, p * (p + 1) // 2))
    refused = np.zeros(m, dtype=np.uint8)
    for replicate, fold, columns, models in chunks(request.replicates, request.active):
        plan = prepared.plan(fold)
        if not len(plan.dead):
            continue
        Z, C = prepared.rows(replicate)
        z, c, beta = Z[plan.order][:, columns], C[plan.order], request.beta[models]
        eta = c @ beta[:, 1:].T + z * beta[:, 0]
        eta -= eta.max(axis=0)
        w = np.exp(eta)
        A = risk_sums(plan, z, c, w)
        ll[models], g[models], info[models] = likelihood(A, eta[plan.dead].sum(axis=0), _dead_sum(plan, z, c))
        if min_effective > 0:
            low = effective_patients(plan, w, A[0]) < min_effective
            refused[models] = low
            ll[models] = np.where(low, 0.0, ll[models])
            g[models] = np.where(low[:, None], 0.0, g[models])
            info[models] = np.where(low[:, None], 0.0, info[models])
    return CoxSums(log_likelihood=ll, gradient=g, information=info, refused=refused)


def chunks(replicates: I64, active: Bool) -> Iterator[tuple[int, int, I64, slice]]:
    """(replicate, fold, model columns, places in the message) of the active models, at most CHUNK at a time."""
    n_folds = len(active) // max(len(replicates), 1)
    place = 0
    for analysis, flags in enumerate(active):
        columns = np.flatnonzero(flags).astype(np.int64)
        for start in range(0, len(columns), CHUNK):
            part = columns[start : start + CHUNK]
            yield int(replicates[analysis // n_folds]), analysis % n_folds, part, slice(place, place + len(part))
            place += len(part)


def risk_plan(t: F64, e: Bool, strata: I64, train: Bool, *, ties: str) -> RiskPlan:
    """Sort the training rows of a fold, stratum by stratum, and lay out L in blocks that never split a tied time."""
    order: list[I64] = []
    blocks: list[Block] = []
    dead: list[I64] = []
    leading: list[Bool] = []
    at_risk: list[I64] = []
    start = 0
    for stratum in np.unique(strata[train]):
        rows = np.flatnonzero(train & (strata == stratum))
        rows = rows[np.argsort(-t[rows], kind="stable")]
        if not e[rows].any():
            continue
        rows = rows[t[rows] >= t[rows][e[rows]].min()]  # who left before the first death is in no risk set
        time, died = t[rows], e[rows]
        for a, b in _cuts(time):
            deaths = a + np.flatnonzero(died[a:b])
            number, tied = _tie_numbers(time[deaths])
            phi = number / tied if ties == "efron" else np.zeros(len(deaths))
            same = time[None, a:b] == time[deaths, None]
            L = (time[None, a:b] >= time[deaths, None]) - phi[:, None] * (same & died[None, a:b])
            blocks.append(Block(start + a, np.vstack([L, np.ones((1, b - a))]), first=a == 0))
            dead.append(start + deaths)
            leading.append(number == 0)
            at_risk.append(np.searchsorted(-time, -time[deaths], side="right"))
        order.append(rows)
        start += len(rows)
    return RiskPlan(
        order=np.concatenate(order) if order else np.zeros(0, dtype=np.int64),
        blocks=tuple(blocks),
        dead=np.concatenate(dead) if dead else np.zeros(0, dtype=np.int64),
        leading=np.concatenate(leading) if leading else np.zeros(0, dtype=bool),
        at_risk=np.concatenate(at_risk) if at_risk else np.zeros(0, dtype=np.int64),
    )


def risk_sums(plan: RiskPlan, z: F64, c: F64, w: F64) -> F64:
    """A (1 + p + p(p+1)/2, D, m): sums of w [1, z, packed zz'] at every death; z, w (n, m), c (n, q) in plan order."""
    q, m = c.shape[1], w.shape[1]
    p, terms = 1 + q, 1 + q + q * (q + 1) // 2
    A = np.empty((1 + p + p * (p + 1) // 2, len(plan.dead), m))
    carry = np.zeros((len(A), m))
    at = 0
    for block in plan.blocks:
        d = len(block.L) - 1
        s = slice(block.start, block.start + block.L.shape[1])
        stacked = _stack(block.L, c[s])
        zw = z[s] * w[s]
        without = (stacked @ w[s]).reshape(terms, d + 1, m)
        once = (stacked[: (1 + q) * (d + 1)] @ zw).reshape(1 + q, d + 1, m)
        # Order: 1 | z, covariates | zz, z covariate, covariate covariate
        parts = (without[:1], once[:1], without[1 : 1 + q], (block.L @ (z[s] * zw))[None], once[1:], without[1 + q :])
        row = 0
        for part in parts:
            span = slice(row, row + len(part))
            into = A[span, at : at + d]
            if block.first:
                into[...] = part[:, :d]
                carry[span] = part[:, d]
            else:
                np.add(part[:, :d], carry[span, None], out=into)
                carry[span] += part[:, d]
            row += len(part)
        at += d
    return A


def likelihood(A: F64, eta_dead: F64, z_dead: F64) -> tuple[F64, F64, F64]:
    """(ll (m,), g (m, p), packed I (m, P)) from `risk_sums` and the sums over deaths of eta (m,) and z (m, p).

    A model whose weights underflow gets values that are not finite; the coordinator rejects that step.
    """
    p = z_dead.shape[1]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = 1.0 / A[0]
        E = A[1 : 1 + p] * inverse
        ll = eta_dead - np.log(A[0]).sum(axis=0)
        g = z_dead - E.sum(axis=1).T
        second = np.einsum("kdm,dm->km", A[1 + p :], inverse)
        pairs = [(a, b) for a in range(p) for b in range(a, p)]
        info = np.stack([second[k] - np.einsum("dm,dm->m", E[a], E[b]) for k, (a, b) in enumerate(pairs)], axis=1)
    return ll, g, info


def effective_patients(plan: RiskPlan, w: F64, total: F64) -> F64:
    """Median over risk sets of 10 or more of (sum w)^2 / sum w^2, for every model (m,); infinite without such a set.

    `total` (D, m) is A[0] of `risk_sums`.
    """
    judged = plan.leading & (plan.at_risk >= SMALLEST_RISK_SET)
    if not judged.any():
        return np.full(w.shape[1], np.inf)
    squares = np.empty_like(total)
    at, carry = 0, np.zeros(w.shape[1])
    for block in plan.blocks:
        d, s = len(block.L) - 1, slice(block.start, block.start + block.L.shape[1])
        part = block.L @ w[s] ** 2
        carry = np.zeros_like(carry) if block.first else carry
        squares[at : at + d] = part[:d] + carry
        carry = carry + part[d]
        at += d
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.median(total[judged] ** 2 / squares[judged], axis=0))


def _dead_sum(plan: RiskPlan, z: F64, c: F64) -> F64:
    """Sum of z over the deaths (m, p)."""
    covariates = c[plan.dead].sum(axis=0)
    return np.column_stack([z[plan.dead].sum(axis=0), np.broadcast_to(covariates, (z.shape[1], len(covariates)))])


def _stack(L: F64, c: F64) -> F64:
    """Rows of L times 1, each covariate, and each product of two covariates, (terms * (d + 1), rows)."""
    a, b = np.triu_indices(c.shape[1])
    factors = np.concatenate([np.ones((1, len(c))), c.T, c.T[a] * c.T[b]])
    return np.asarray((factors[:, None, :] * L[None]).reshape(-1, L.shape[1]))


def _cuts(time: F64) -> Iterator[tuple[int, int]]:
    """Row ranges of about BLOCK_ROWS that end where the (descending) time changes."""
    ends = np.append(np.flatnonzero(np.diff(time)) + 1, len(time))
    a = 0
    while a < len(time):
        b = int(ends[min(int(np.searchsorted(ends, a + BLOCK_ROWS)), len(ends) - 1)])
        yield a, b
        a = b


def _tie_numbers(time: F64) -> tuple[I64, I64]:
    """For deaths in descending time: number l = 0, 1, ... within its tied group, and the size of that group."""
    _, group, counts = np.unique(-time, return_inverse=True, return_counts=True)
    sizes = counts.astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    return np.arange(len(time)) - starts[group], sizes[group]
