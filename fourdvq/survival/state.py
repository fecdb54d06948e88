"""CoxSiteState: everything a site does in one survival analysis, one answer per request, every rule checked first.

`answer(request)` finds the handler by the request's type, checks the site's policy, computes sums from the site's own
rows, and writes an audit line, for a refusal too. The network handlers and the in-process calls both drive this object.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fourdvq.config import sha256_of
from fourdvq.errors import FourdvqError
from fourdvq.survival import disclosure as rules
from fourdvq.survival.concordance import pair_counts
from fourdvq.survival.cox import Prepared, evaluate, prepare
from fourdvq.survival.disclosure import AuditLine, Budget, Policy, RunRegister, refuse
from fourdvq.survival.folds import permutation
from fourdvq.survival.frozen import calibration_sums, paired_sums, risk_groups
from fourdvq.survival.kaplan_meier import km_sums, logrank_sums
from fourdvq.survival.masking import MaskedSums, Masker
from fourdvq.survival.messages import (
    F64,
    I64,
    CalibrationRequest,
    CalibrationSums,
    CorrelationRequest,
    CorrelationSums,
    CoxMoments,
    CoxRequest,
    CoxSums,
    GridRequest,
    GridSums,
    GroupRequest,
    HelloRequest,
    KmRequest,
    KmSums,
    LogRankRequest,
    LogRankSums,
    Message,
    MomentsRequest,
    PairCounts,
    PairedRequest,
    PairedSums,
    PairRequest,
    PhRequest,
    PhSums,
    Receipt,
    ResultMessage,
    RiskSums,
    ScaleRequest,
    Sums,
)
from fourdvq.survival.proportional import ph_sums
from fourdvq.survival.scale import site_moments
from fourdvq.survival.shared import grid_sums, risk_messages
from fourdvq.survival.study import Study, open_study, rows_of, train_of
from fourdvq.survival.table import CoxSite, strata_of


@dataclass(frozen=True)
class SiteCard:
    """What a site says about an analysis beside the sums: digests that show two runs used the same thing."""

    name: str
    cohort: str
    folds: str
    policy: str


class CoxSiteState:
    """One site. `policy` "off" is for local data and tests; `key` is the site's secret for folds and permutations.

    `codebook_sha256`: of the codes in the table; another one is refused. `masker`: hides this site's part of a sum.
    Raises Refused E_COX_RULE with the rule's name as `where`, and SurvivalError for a table that cannot be used.
    """

    def __init__(
        self,
        site: CoxSite,
        policy: Policy | Literal["off"],
        key: bytes = b"",
        *,
        register: RunRegister | None = None,
        codebook_sha256: str = "",
        masker: Masker | None = None,
    ) -> None:
        self.site, self.key = site, key
        self.policy = rules.as_policy(policy)
        self.register = register if register is not None else RunRegister()
        self.codebook_sha256, self.masker = codebook_sha256, masker
        self.audit: list[AuditLine] = []
        most = self.policy.max_evaluations if self.policy else 1 << 30
        self._budget, self._pairs = Budget(most), Budget(most)
        self._study: Study | None = None

    def answer(self, request: Message) -> Sums:
        """The site's sums for one request."""
        handler = _HANDLERS.get(type(request))
        try:
            if handler is None:
                raise refuse("unknown_request")
            sums = handler(self, request)
        except FourdvqError as error:
            self._log(request, error.where if error.code == "E_COX_RULE" else error.code)
            raise
        self._log(request, "")
        return sums

    def send(self, request: Message) -> Sums | MaskedSums:
        """The answer in the form that leaves: masked where this site has a masker."""
        sums = self.answer(request)
        if self.masker is None:
            return sums
        try:
            return self.masker.mask(sums)
        except FourdvqError as error:
            self._log(request, error.where)
            raise

    def card(self) -> SiteCard:
        """Digests of cohort, folds and policy; keyed, so that they identify without telling."""
        cohort = hmac.new(self.key or b"cohort", self.site.digest.encode(), hashlib.sha256).hexdigest()
        digest = self._study.folds_digest if self._study else ""
        return SiteCard(self.site.name, cohort, digest, sha256_of(self.policy) if self.policy else "off")

    # ---- handlers: one per request type

    def _hello(self, request: HelloRequest) -> Receipt:
        if request.codebook_sha256 != self.codebook_sha256:
            raise refuse("codebook")
        study = open_study(self.site, request, self.key, self.policy)
        if self.policy:
            self._check_hello(self.policy, request)
            rules.check_cohort(self.policy, study.site, train_of(study.site))
            study.allowed = rules.allowed_codes(self.policy, study.site.X[rows_of(study.site)])
            # Last, so that a refused analysis is not one that was begun. The table's own digest, not its HMAC: another
            # key must not look like another cohort.
            key_digest = hashlib.sha256(b"key:" + self.key).hexdigest()
            attempts = self.policy.max_attempts
            self.register.claim(self.site.digest, key_digest, request.purpose, request.run, attempts=attempts)
        self._study = study
        most = self._budget.most
        self._budget, self._pairs = Budget(most), Budget(most)
        return _receipt()

    def _moments(self, _: MomentsRequest) -> CoxMoments:
        study = self._begun()
        study.once("moments", self.policy)
        return site_moments(study.site, allowed=study.allowed)

    def _scale(self, request: ScaleRequest) -> Receipt:
        study = self._begun()
        columns = study.site.X.shape[1] + study.site.C.shape[1]
        if len(request.mean) != columns or not np.isfinite(request.mean).all() or not (request.sd > 0).all():
            raise refuse("scale")
        if (request.kept & ~study.allowed).any():
            raise refuse("withheld_code")
        if self.policy:
            if study.prepared is not None:
                raise refuse("scale")
            values = np.column_stack([study.site.X, study.site.C])[rows_of(study.site)]
            watched = np.concatenate([request.kept, np.ones(study.site.C.shape[1], dtype=bool)])
            own = values.std(axis=0)
            if (request.sd < self.policy.min_sd_ratio * own)[watched].any():
                raise refuse("scale")
        study.kept, study.mean, study.sd = request.kept, request.mean, request.sd
        study.prepared = prepare(study.site, request, ties=study.hello.ties, shuffle=self._shuffle)
        return _receipt()

    def _grid(self, request: GridRequest) -> GridSums:
        study = self._begun()
        own = study.members(request.group)
        if self.policy:
            if request.group in study.used:
                raise refuse("times")
            rules.check_grid(self.policy, request)
        sums = grid_sums(request, study.site.t[own], study.site.e[own], self.policy)
        if not request.from_start:
            study.grids.pop(request.group, None)
            if sums.accepting.all():
                study.grids[request.group] = request
        return sums

    def _cox(self, request: CoxRequest) -> CoxSums | RiskSums:
        prepared = self._ready(request, self._budget)
        policy, study = self.policy, self._begun()
        least = policy.min_effective_patients if policy else 0.0
        if study.hello.baseline == "site":
            return evaluate(prepared, request, min_effective=least)
        grid = study.used_grid()
        bound = policy.max_abs_eta if policy else rules.OFF_ABS_ETA
        return risk_messages(prepared, request, grid, max_abs_eta=bound, min_effective=least)

    def _pair(self, request: PairRequest) -> PairCounts:
        prepared = self._ready(request, self._pairs)
        if self.policy is None:
            return pair_counts(prepared, request)
        return pair_counts(prepared, request, min_pairs=self.policy.min_pairs, min_deaths=self.policy.min_pair_deaths)

    def _correlation(self, request: CorrelationRequest) -> CorrelationSums:
        study, prepared = self._begun(), self._scaled()
        codes = request.codes
        if ((codes < 0) | (codes >= len(study.kept))).any() or not study.kept[codes].all():
            raise refuse("withheld_code")
        if self.policy and len(codes) > self.policy.max_correlated:
            raise refuse("max_evaluations")
        study.once("correlations", self.policy)
        z = prepared.Z[rows_of(study.site)][:, codes]
        a, b = np.triu_indices(len(codes))
        n = np.array([len(z)], dtype=np.int64)
        return CorrelationSums(n=n, sx=z.sum(axis=0), sxx=(z[:, a] * z[:, b]).sum(axis=0))

    def _ph(self, request: PhRequest) -> PhSums:
        self._check_frozen(request.beta)
        self._begun().once("ph", self.policy)
        return ph_sums(self._scaled(), request)

    def _group(self, request: GroupRequest) -> Receipt:
        study = self._begun()
        self._check_frozen(request.beta)
        if self.policy and (study.high is not None or study.used):
            raise refuse("one_split")
        high = risk_groups(self._scaled(), request.beta)
        if self.policy and min(high.sum(), (~high).sum()) < self.policy.min_class:
            raise refuse("min_class")
        study.high, study.group_beta = high, request.beta
        study.grids.clear()
        return _receipt()

    def _km(self, request: KmRequest) -> KmSums:
        study = self._begun()
        own = study.members(request.group)
        return km_sums(study.site.t[own], study.site.e[own], study.used_grid(request.group))

    def _logrank(self, _: LogRankRequest) -> LogRankSums:
        study = self._begun()
        return logrank_sums(study.site.t, study.site.e, study.members("high"), strata_of(study.site))

    def _calibration(self, request: CalibrationRequest) -> CalibrationSums:
        study, own = self._begun(), self._begun().members(request.group)
        return calibration_sums(self._scaled(), study.group_beta, own, study.used_grid(request.group))

    def _paired(self, request: PairedRequest) -> PairedSums:
        study, prepared = self._begun(), self._scaled()
        self._check_frozen(request.beta)
        study.once("paired", self.policy)
        others = study.standardised_others()
        if self.policy is None:
            return paired_sums(prepared, others, request.beta)
        least, deaths = self.policy.min_pairs, self.policy.min_pair_deaths
        return paired_sums(prepared, others, request.beta, min_pairs=least, min_deaths=deaths)

    def _result(self, request: ResultMessage) -> Receipt:
        if tuple(request.codes.tolist()) != self._begun().hello.codes:
            raise refuse("shape")
        return _receipt()

    # ---- helpers

    def _check_hello(self, policy: Policy, request: HelloRequest) -> None:
        if request.purpose not in policy.purposes:
            raise refuse("purpose")
        rules.check_covariates(policy, self.site, request.covariates)
        if request.sites >= policy.masking_from and self.masker is None:
            raise refuse("masking")

    def _begun(self) -> Study:
        if self._study is None:
            raise refuse("order")
        return self._study

    def _scaled(self) -> Prepared:
        prepared = self._begun().prepared
        if prepared is None:
            raise refuse("order")
        return prepared

    def _ready(self, request: CoxRequest | PairRequest, budget: Budget) -> Prepared:
        """Check shapes, codes, permutations, coefficients and budget of a request for many models."""
        prepared, study = self._scaled(), self._begun()
        n_analyses = len(request.replicates) * len(prepared.train)
        if request.active.shape != (n_analyses, prepared.Z.shape[1]):
            raise refuse("shape")
        if request.beta.shape != (request.active.sum(), prepared.n_parameters):
            raise refuse("shape")
        if request.active[:, :-1][:, ~study.kept].any():
            raise refuse("withheld_code")
        if (request.replicates < 0).any() or len(np.unique(request.replicates)) < len(request.replicates):
            raise refuse("shape")
        if self.policy:
            if (request.replicates > self.policy.max_permutations).any():
                raise refuse("max_permutations")
            rules.check_beta(self.policy, request.beta)
            budget.spend(request.replicates, request.active)
        return prepared

    def _check_frozen(self, beta: F64) -> None:
        prepared = self._scaled()
        if beta.shape != (prepared.n_parameters,):
            raise refuse("shape")
        if self.policy:
            rules.check_beta(self.policy, beta)

    def _shuffle(self, replicate: int) -> I64:
        return permutation(len(self.site.t), replicate, key=self.key, site=self.site.name)

    def _log(self, request: Message, rule: str) -> None:
        arrays = request.arrays()
        shapes = " ".join(f"{name}{list(a.shape)}" for name, a in arrays.items())
        h = hashlib.sha256(type(request).__name__.encode())
        for name, array in arrays.items():
            h.update(name.encode() + array.tobytes())
        h.update(repr(sorted(request.scalars().items())).encode())
        run = self._study.hello.run if self._study else ""
        self.audit.append(AuditLine(run, type(request).__name__, shapes, h.hexdigest(), rule))


_HANDLERS: dict[type[Message], Callable[[CoxSiteState, Any], Sums]] = {
    HelloRequest: CoxSiteState._hello,
    MomentsRequest: CoxSiteState._moments,
    ScaleRequest: CoxSiteState._scale,
    GridRequest: CoxSiteState._grid,
    CoxRequest: CoxSiteState._cox,
    PairRequest: CoxSiteState._pair,
    CorrelationRequest: CoxSiteState._correlation,
    PhRequest: CoxSiteState._ph,
    GroupRequest: CoxSiteState._group,
    KmRequest: CoxSiteState._km,
    LogRankRequest: CoxSiteState._logrank,
    CalibrationRequest: CoxSiteState._calibration,
    PairedRequest: CoxSiteState._paired,
    ResultMessage: CoxSiteState._result,
}


def _receipt() -> Receipt:
    return Receipt(sites=np.ones(1, dtype=np.int64))
