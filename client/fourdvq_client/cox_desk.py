"""The site's side of survival analyses: one state per analysis, its masks, and a register on disk.

The mathematics and the disclosure rules are `fourdvq.survival.CoxSiteState`; this module gives it the site's table and
has `CoxRegister` keep which analyses of which cohort were begun, because a second one with another fold key would
expose patients by difference. Before an analysis of several sites they exchange public keys through the
coordinator (`cox_keys`, `cox_peers`); private keys stay in memory and serve one analysis.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fourdvq.config import build
from fourdvq.errors import Refused, WireError
from fourdvq.plan import Plan
from fourdvq.survival.disclosure import Policy
from fourdvq.survival.masking import MaskedSums, Masker
from fourdvq.survival.messages import HelloRequest, ResultMessage, RiskSums
from fourdvq.survival.state import CoxSiteState
from fourdvq.survival.table import CoxSite
from fourdvq.wire.body import body_sha256
from fourdvq.wire.masked import masked_reply, peers_sha256
from fourdvq.wire.messages import (
    COX_REPLIES,
    CoxKey,
    CoxKeysTask,
    CoxPeersTask,
    CoxTask,
    Receipt,
    Reply,
    RiskReply,
    TaskEnvelope,
)
from fourdvq_client.cox_register import CoxRegister
from fourdvq_client.egress import Outcome
from fourdvq_client.policy import SitePolicy
from fourdvq_client.survival_model import keep_model
from fourdvq_client.workspace import Workspace

Key = tuple[str, int]  # run, number of the analysis
Tables = Callable[[HelloRequest, str, Plan], CoxSite]


@dataclass
class _Open:
    """The analysis in progress. `last` is the last request and its answer: asked again, the same bytes leave."""

    key: Key
    state: CoxSiteState
    patients: int
    last: tuple[str, Outcome] | None = None


@dataclass
class CoxDesk:
    """Answers the requests of one analysis at a time; a `cox_hello` opens a new one. `tables` makes its table."""

    workspace: Workspace
    site: str
    tables: Tables
    _open: _Open | None = field(default=None, init=False)
    _private: tuple[Key, X25519PrivateKey] | None = field(default=None, init=False)
    _masker: tuple[Key, Masker, str] | None = field(default=None, init=False)

    def keys(self, task: CoxKeysTask, envelope: TaskEnvelope) -> Outcome:
        """A fresh public key; whatever key and masks this site had before are forgotten."""
        private = X25519PrivateKey.generate()
        self._private, self._masker = ((envelope.run, task.analysis), private), None
        return Outcome(CoxKey(public_key=np.frombuffer(private.public_key().public_bytes_raw(), dtype=np.uint8).copy()))

    def peers(self, task: CoxPeersTask, envelope: TaskEnvelope) -> Outcome:
        """Make the masks of the analysis. Raises Refused E_COX_RULE `masking` for a list without this site's own key,
        with a key that cannot be used, or when no key was asked for."""
        key = (envelope.run, task.analysis)
        try:
            seen = peers_sha256(task.sites, task.public_keys)
            if self._masker is None or (self._masker[0], self._masker[2]) != (key, seen):
                self._masker = (key, self._new_masker(key, task), seen)
        except (WireError, ValueError):
            # Among others: a key of low order, with which everybody knows the secret.
            raise Refused("E_COX_RULE", where="masking", found="a list of keys that cannot be used") from None
        return Outcome(Receipt(sha256=seen))

    def answer(self, task: CoxTask, envelope: TaskEnvelope, plan: Plan, policy: SitePolicy) -> Outcome:
        """The site's sums. Raises Refused E_COX_RULE with the rule as its place, also for a request out of order."""
        key = (envelope.run, task.analysis)
        asked = f"{task.kind} {body_sha256(task)}"  # two kinds can have the same fields
        if self._open is not None and self._open.key == key and self._open.last and self._open.last[0] == asked:
            return self._open.last[1]
        if isinstance(task.request, HelloRequest):
            self._open = self._opened(key, task, task.request, plan, policy)
        if self._open is None or self._open.key != key:
            raise Refused("E_COX_RULE", where="order", found="a request before its hello")
        if task.tokenizer_sha256 != self._open.state.codebook_sha256:
            raise Refused("E_COX_RULE", where="codebook")
        state = self._open.state
        sums = state.send(task.request)
        if isinstance(task.request, HelloRequest):
            self._register.keep(state.register, plan=plan.hash)
        elif isinstance(task.request, ResultMessage):
            keep_model(self.workspace, envelope.run, task.request, state.site.names, state.codebook_sha256)
        outcome = Outcome(_reply(task, sums), self._open.patients)
        self._open.last = (asked, outcome)
        return outcome

    def _opened(self, key: Key, task: CoxTask, hello: HelloRequest, plan: Plan, policy: SitePolicy) -> _Open:
        if hello.baseline != "site" and hello.baseline != plan.survival.baseline:
            raise Refused("E_COX_RULE", where="baseline", found=hello.baseline, wanted="that of the approved plan")
        table = self.tables(hello, task.tokenizer_sha256, plan)
        secret = self.workspace.secret.read_bytes()
        state = CoxSiteState(
            table,
            build(Policy, policy.cox, where="policy.yaml.cox"),
            hmac.new(secret, b"cox folds", hashlib.sha256).digest(),
            register=self._register.read(),
            codebook_sha256=task.tokenizer_sha256,
            masker=self._masker_for(key, hello),
        )
        return _Open(key, state, len(table.t))

    def _new_masker(self, key: Key, task: CoxPeersTask) -> Masker:
        """Raises ValueError, WireError for keys that cannot be used, Refused when this site was not asked for one."""
        if self._private is None or self._private[0] != key:
            raise Refused("E_COX_RULE", where="order", found="peers before keys")
        private, self._private = self._private[1], None
        others = {name: bytes(public) for name, public in zip(task.sites, task.public_keys, strict=True)}
        if others.pop(self.site, b"") != private.public_key().public_bytes_raw():
            raise ValueError(self.site)
        return Masker(self.site, private, others, run=f"{key[0]}/{key[1]}")

    def _masker_for(self, key: Key, hello: HelloRequest) -> Masker | None:
        """The masks of this analysis, for one hello only: the same streams under other sums would cancel out."""
        found, self._masker = self._masker, None
        if found is None or found[0] != key:
            return None
        if found[1].parties != hello.sites:
            raise Refused("E_COX_RULE", where="masking", found="another number of sites than of keys")
        return found[1]

    @property
    def _register(self) -> CoxRegister:
        return CoxRegister(self.workspace.state)


def _reply(task: CoxTask, sums: Any) -> Reply:
    if isinstance(sums, MaskedSums):
        return masked_reply(sums)
    return (RiskReply if isinstance(sums, RiskSums) else COX_REPLIES[type(task).kind])(sums=sums)
