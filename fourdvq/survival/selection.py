"""The paper's rule: a code is kept if HR > 1, p < 0.01 and validation C > 0.5 in every fold; the best five by mean C.

`SelectionRun` is the coordinator's side over any transport; `select_biomarkers` runs it in one process. Source: paper
section 3 and table 2; where it is silent, docs/reference/survival.md.

Axes: B codes, M = B + 1 columns (the last one: covariates alone), F folds, R replicates, A = R * F.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.special import chdtrc

from fourdvq.errors import SurvivalError
from fourdvq.plan import PaperRule as PaperRule
from fourdvq.survival.disclosure import Policy, RunRegister, as_policy, small_count
from fourdvq.survival.fit import BASELINES, TIES
from fourdvq.survival.local import drive
from fourdvq.survival.messages import F64, I64, Bool, CorrelationRequest, CorrelationSums, HelloRequest
from fourdvq.survival.newton import Fits
from fourdvq.survival.run import CoxRun, Settings, Steps, Study, count_pairs, fit, open_study
from fourdvq.survival.state import CoxSiteState, SiteCard
from fourdvq.survival.table import CoxSite, complete, same_shape

if TYPE_CHECKING:
    import pandas as pd

REPLICATES_AT_ONCE = 20  # bounds the size of one message
Z95 = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Selection:
    """What was selected, and everything needed to judge it.

    `selected`: code indices in rank order. `table`: one row per code and fold (HR per SD with 95 % interval, p, p_lr,
    C of the full model, the biomarker alone, and the covariates alone, status, passes). `withheld`: codes that a site's
    rules removed. `correlations` (k, k) of the selected. `permutation_p`: NaN if not computed. `bytes_up`: per site.
    """

    selected: tuple[int, ...]
    table: pd.DataFrame
    withheld: tuple[int, ...]
    correlations: F64
    permutation_p: float
    permutations: int
    folds_digest: str
    rounds: int
    bytes_up: int
    warnings: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What selection.json holds beside the run's own facts."""
        return {
            "selected": list(self.selected),
            "withheld": list(self.withheld),
            "correlations": self.correlations.tolist(),
            "permutation_p": None if np.isnan(self.permutation_p) else self.permutation_p,
            "permutations": self.permutations,
            "folds_digest": self.folds_digest,
            "rounds": self.rounds,
            "bytes_up": self.bytes_up,
            "warnings": list(self.warnings),
        }


class SelectionRun(CoxRun[Selection]):
    """The whole selection as requests and summed answers; `hello.folds` >= 2."""

    def __init__(
        self, hello: HelloRequest, settings: Settings, *, rule: PaperRule | None = None, permutations: int = 99
    ) -> None:
        super().__init__(_selection_steps(hello, settings, rule or PaperRule(), permutations))

    def finished(self, cards: Sequence[SiteCard]) -> Selection:
        """The result with the sites' digests and the traffic filled in."""
        text = "\n".join(sorted(f"{card.name}:{card.folds}" for card in cards))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return dataclasses.replace(self.result(), folds_digest=digest, bytes_up=self.bytes_up)


def select_biomarkers(
    sites: Sequence[CoxSite | Mapping[str, Any]],
    *,
    key: bytes,
    folds: int = 5,
    fold_mode: Literal["site_event", "hash"] = "site_event",
    baseline: Literal["site", "shared"] = "site",
    ties: Literal["efron", "breslow"] = "efron",
    rule: PaperRule | None = None,
    permutations: int = 99,
    disclosure: Policy | Literal["off"] | None = None,
) -> Selection:
    """Select prognostic codes over the sites' tables, which also need `ids` and a distinct `name`.

    Patients with a missing covariate are left out and counted; `train` is ignored. `disclosure` None: the default
    Policy. Raises SurvivalError for a table or option that breaks a rule, Refused when a site's policy says no.
    """
    policy = as_policy(Policy() if disclosure is None else disclosure)
    _check(rule or PaperRule(), folds, fold_mode, baseline, ties, permutations)
    tables, dropped = zip(*(complete(site) for site in sites), strict=True) if sites else ((), ())
    tables = tuple(dataclasses.replace(table, train=None) for table in tables)
    same_shape(tables)
    names = [table.name for table in tables]
    if "" in names or len(set(names)) < len(names):
        raise SurvivalError(
            "E_SURVIVAL_INPUT", where="name", found="a missing or repeated name", wanted="distinct names"
        )
    hello = HelloRequest(folds=folds, fold_mode=fold_mode, baseline=baseline, ties=ties)
    states = [CoxSiteState(table, policy or "off", key, register=RunRegister()) for table in tables]
    run = SelectionRun(hello, Settings.under(policy), rule=rule, permutations=permutations)
    drive(run, states)
    selection = run.finished([state.card() for state in states])
    notes = [
        f"site {name}: {small_count(count)} patients with a missing covariate were left out"
        for name, count in zip(names, dropped, strict=True)
        if count
    ]
    return dataclasses.replace(selection, warnings=(*notes, *selection.warnings))


def passes(rule: PaperRule, fits: Fits, ll_covariates: F64) -> Bool:
    """(A, M) models that meet the rule's hazard ratio and p; `ll_covariates` (A,) of the covariates alone."""
    p = fits.p[..., 0] if rule.p_value == "wald" else lr_p(fits, ll_covariates)
    with np.errstate(invalid="ignore"):
        good = fits.ok & (fits.beta[..., 0] > np.log(rule.min_hr)) & (p < rule.max_p)
        return np.asarray(good) if rule.bh_q is None else good & (p <= _bh_thresholds(p, fits.ok, rule.bh_q)[:, None])


def lr_p(fits: Fits, ll_covariates: F64) -> F64:
    """(A, M) likelihood-ratio p of the biomarker, 1 degree of freedom; NaN where the status is not ok."""
    statistic = 2.0 * (fits.log_likelihood - ll_covariates[:, None])
    return np.asarray(chdtrc(1, np.maximum(statistic, 0.0)))


def rank(codes: I64, c: F64, p: F64) -> I64:
    """`codes` by mean C (descending), then largest p over folds (ascending), then index; c and p are (F, B)."""
    order = sorted(codes.tolist(), key=lambda b: (-c[:, b].mean(), p[:, b].max(), b))
    return np.array(order, dtype=np.int64)


def correlations(total: CorrelationSums) -> F64:
    """Pearson correlations (k, k) from the summed n, sum x and packed sum xx'."""
    n, k = float(total.n[0]), len(total.sx)
    covariance = np.zeros((k, k))
    a, b = np.triu_indices(k)
    covariance[a, b] = total.sxx - total.sx[a] * total.sx[b] / n
    covariance[b, a] = covariance[a, b]
    sd = np.sqrt(np.diagonal(covariance))
    return np.asarray(covariance / np.outer(sd, sd))


def _selection_steps(hello: HelloRequest, settings: Settings, rule: PaperRule, permutations: int) -> Steps[Selection]:
    study = yield from open_study(hello, settings)
    active = study.all_models
    fits = yield from fit(study, active)
    c = yield from count_pairs(fits.beta, fits.ok, rows="validation")
    good = _all_criteria(rule, fits, c)
    codes = np.flatnonzero(good[:, :-1].all(axis=0)).astype(np.int64)
    ranked = rank(codes, _rule_c(rule, c), fits.p[..., 0])[: rule.top]
    matrix = np.zeros((0, 0))
    if len(ranked):
        matrix = correlations((yield CorrelationRequest(codes=ranked)))
    counts = yield from _permuted_counts(study, rule, permutations)
    chance = (1 + int((counts >= len(ranked)).sum())) / (1 + permutations) if permutations else float("nan")
    return Selection(
        selected=tuple(int(code) for code in ranked),
        table=_table(fits, c, good),
        withheld=tuple(int(code) for code in np.flatnonzero(~study.scale.kept)),
        correlations=matrix,
        permutation_p=chance,
        permutations=permutations,
        folds_digest="",
        rounds=fits.rounds,
        bytes_up=0,
        warnings=(*_warnings(study, rule, len(ranked), permutations), *_by_wald_alone(rule, fits, ranked)),
    )


def _permuted_counts(study: Study, rule: PaperRule, permutations: int) -> Steps[I64]:
    """How many codes (at most `top`) the whole rule selects in each replicate of permuted outcomes."""
    counts = np.zeros(permutations, dtype=np.int64)
    for start in range(0, permutations, REPLICATES_AT_ONCE):
        replicates = np.arange(start, min(start + REPLICATES_AT_ONCE, permutations), dtype=np.int64) + 1
        found = yield from _permuted_batch(study, rule, replicates)
        counts[start : start + len(replicates)] = np.minimum(found, rule.top)
    return counts


def _permuted_batch(study: Study, rule: PaperRule, replicates: I64) -> Steps[I64]:
    """A code must pass in every fold, so codes that fail in the first one are not fitted in the others: same result,
    a fifth of the work. Benjamini-Hochberg needs the p of all codes, so there nothing is left out."""
    r, (n_folds, columns) = len(replicates), study.all_models.shape
    every = np.tile(study.all_models, (r, 1, 1))
    stages = [slice(0, n_folds)] if rule.bh_q is not None else [slice(0, 1), slice(1, n_folds)]
    alive = np.tile(study.all_models[0], (r, 1))
    beta = np.full((r, n_folds, columns, study.parameters), np.nan)
    for folds in stages:
        active = np.zeros_like(every)
        active[:, folds] = alive[:, None]
        active[:, folds, -1] = rule.p_value == "lr"
        flat = active.reshape(-1, columns)
        if not flat.any():
            return np.zeros(r, dtype=np.int64)
        deaths = np.tile(study.total.fold_events, r)
        fits = yield from fit(study, flat, replicates=replicates, deaths=deaths)
        good = passes(rule, fits, fits.log_likelihood[:, -1]).reshape(every.shape)
        alive = np.asarray(good[:, folds].all(axis=1))
        alive[:, -1] = False
        beta[:, folds] = fits.beta.reshape(beta.shape)[:, folds]
    survivors = np.repeat(alive[:, None], n_folds, axis=1).reshape(-1, columns)
    c = yield from count_pairs(
        beta.reshape(-1, columns, study.parameters), survivors, rows="validation", replicates=replicates
    )
    with np.errstate(invalid="ignore"):
        high = np.asarray(_rule_c(rule, c) > rule.min_c)
    above = np.asarray(high.reshape(every.shape).all(axis=1))
    return np.asarray((above & alive).sum(axis=1))


def _all_criteria(rule: PaperRule, fits: Fits, c: F64) -> Bool:
    with np.errstate(invalid="ignore"):
        return np.asarray(passes(rule, fits, fits.log_likelihood[:, -1]) & (_rule_c(rule, c) > rule.min_c))


def _rule_c(rule: PaperRule, c: F64) -> F64:
    return np.asarray(c[0 if rule.c_model == "full" else 1])


def _bh_thresholds(p: F64, ok: Bool, q: float) -> F64:
    """The largest p that Benjamini-Hochberg keeps in each fold (A,); -1 if none. The last column is no code."""
    thresholds = np.full(len(p), -1.0)
    for fold, (values, usable) in enumerate(zip(p[:, :-1], ok[:, :-1], strict=True)):
        ordered = np.sort(values[usable])
        kept = np.flatnonzero(ordered <= q * (1 + np.arange(len(ordered))) / max(len(ordered), 1))
        if len(kept):
            thresholds[fold] = ordered[kept[-1]]
    return thresholds


def _table(fits: Fits, c: F64, good: Bool) -> pd.DataFrame:
    import pandas as pd

    beta, se = fits.beta[:, :-1, 0], fits.se[:, :-1, 0]
    n_folds, n_codes = beta.shape
    columns = {
        "code": np.broadcast_to(np.arange(n_codes), beta.shape),
        "fold": np.broadcast_to(np.arange(n_folds)[:, None], beta.shape),
        "status": fits.status[:, :-1],
        "hr": np.exp(beta),
        "hr_low": np.exp(beta - Z95 * se),
        "hr_high": np.exp(beta + Z95 * se),
        "p": fits.p[:, :-1, 0],
        "p_lr": lr_p(fits, fits.log_likelihood[:, -1])[:, :-1],
        "c": c[0, :, :-1],
        "c_biomarker": c[1, :, :-1],
        "c_covariates": np.broadcast_to(c[0, :, -1:], beta.shape),
        "passes": good[:, :-1],
    }
    return pd.DataFrame({name: np.asarray(values).T.ravel() for name, values in columns.items()})


def _warnings(study: Study, rule: PaperRule, found: int, permutations: int) -> tuple[str, ...]:
    notes = []
    withheld = int((~study.scale.kept).sum())
    if withheld:
        notes.append(f"{withheld} codes are withheld by disclosure rules and were not tested")
    if found < rule.top:
        notes.append(f"{found} codes meet the rule, fewer than {rule.top}; the rule was not relaxed")
    if not permutations:
        notes.append("permutation P: not computed")
    return tuple(notes)


def _by_wald_alone(rule: PaperRule, fits: Fits, ranked: I64) -> tuple[str, ...]:
    """Selected codes that the likelihood-ratio p would not have kept: in rare and skewed shares the Wald test of a code
    is below its p too often, and most codes that noise selects are of this kind."""
    p = lr_p(fits, fits.log_likelihood[:, -1])
    doubtful = [str(code) for code in ranked if not (p[:, code] < rule.max_p).all()]
    if rule.p_value != "wald" or not doubtful:
        return ()
    codes = ", ".join(doubtful)
    return (f"by Wald p alone, not by likelihood-ratio p (survival.rule.p_value=lr): code {codes}",)


def _check(rule: PaperRule, folds: int, fold_mode: str, baseline: str, ties: str, permutations: int) -> None:
    for name, value, known in (
        ("fold_mode", fold_mode, ("site_event", "hash")),
        ("baseline", baseline, BASELINES),
        ("ties", ties, TIES),
        ("rule.p_value", rule.p_value, ("wald", "lr")),
        ("rule.c_model", rule.c_model, ("full", "biomarker")),
    ):
        if value not in known:
            raise SurvivalError("E_SURVIVAL_INPUT", where=name, found=repr(value), wanted=" or ".join(known))
    for name, number, least in (("folds", folds, 2), ("permutations", permutations, 0), ("rule.top", rule.top, 1)):
        if number < least:
            raise SurvivalError("E_SURVIVAL_INPUT", where=name, found=str(number), wanted=f"{least} or more")
    if rule.min_hr <= 0:
        raise SurvivalError("E_SURVIVAL_INPUT", where="rule.min_hr", found="0 or less", wanted="above 0")
