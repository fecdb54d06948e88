"""The site's side of survival analyses: its table from cached codes, one state per analysis, a register on disk.

The mathematics and the disclosure rules are `fourdvq.survival.CoxSiteState`; this module gives it the site's rows and
keeps, in state/cox_register.json, which analyses of which cohort were begun, because a second one with another fold key
would expose patients by difference.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass, field
from typing import Any

from fourdvq.config import build
from fourdvq.data.datasets import PreparedCohort, clinical_of, open_prepared
from fourdvq.errors import Refused
from fourdvq.generation import code_histogram
from fourdvq.plan import Plan
from fourdvq.survival.biomarkers import biomarker_table
from fourdvq.survival.disclosure import Policy, RunRegister
from fourdvq.survival.messages import HelloRequest
from fourdvq.survival.state import CoxSiteState
from fourdvq.training.checkpoint import write_atomic
from fourdvq.wire.messages import COX_REPLIES, CoxTask, TaskEnvelope
from fourdvq_client.egress import Outcome
from fourdvq_client.latent_cache import LatentCache
from fourdvq_client.policy import SitePolicy
from fourdvq_client.workspace import Workspace

COHORTS = {"train": ("train", "validation"), "test": ("test",)}


@dataclass
class _Open:
    """The analysis in progress."""

    key: tuple[str, int]  # run, number of the analysis
    state: CoxSiteState
    patients: int


@dataclass
class CoxDesk:
    """Answers the requests of one analysis at a time; a `cox_hello` opens a new one."""

    workspace: Workspace
    site: str
    _open: _Open | None = field(default=None, init=False)

    def answer(self, task: CoxTask, envelope: TaskEnvelope, plan: Plan, policy: SitePolicy) -> Outcome:
        """The site's sums. Raises Refused E_COX_RULE with the rule as its place, also for a request out of order."""
        key = (envelope.run, task.analysis)
        if isinstance(task.request, HelloRequest):
            self._open = self._opened(key, task, task.request, plan, policy)
        if self._open is None or self._open.key != key:
            raise Refused("E_COX_RULE", where="order", found="a request before its hello")
        if task.tokenizer_sha256 != self._open.state.codebook_sha256:
            raise Refused("E_COX_RULE", where="codebook")
        claims = len(self._open.state.register.claims)
        sums = self._open.state.answer(task.request)
        if len(self._open.state.register.claims) != claims:
            self._write_register(self._open.state.register)
        return Outcome(COX_REPLIES[type(task).kind](sums=sums), self._open.patients)

    def _opened(
        self, key: tuple[str, int], task: CoxTask, hello: HelloRequest, plan: Plan, policy: SitePolicy
    ) -> _Open:
        if hello.source != "real" or hello.feature != "level":
            raise Refused("E_COX_RULE", where="source", found=f"{hello.source} {hello.feature}", wanted="real level")
        histograms = self._histograms(task.tokenizer_sha256, plan, *COHORTS[hello.cohort])
        clinical = clinical_of(self.workspace.prep, transplant=plan.survival.transplant)
        rows = [row for row in clinical if row.pseudonym in histograms]
        table = biomarker_table(histograms, rows, name=self.site).site
        secret = self.workspace.secret.read_bytes()
        state = CoxSiteState(
            table,
            build(Policy, policy.cox, where="policy.yaml.cox"),
            hmac.new(secret, b"cox folds", hashlib.sha256).digest(),
            register=self._read_register(),
            codebook_sha256=task.tokenizer_sha256,
        )
        return _Open(key, state, len(table.t))

    def _histograms(self, tokenizer: str, plan: Plan, *splits: str) -> dict[str, Any]:
        """Shares (K,) of the codes in the first scan of every patient of the splits."""
        cohort: PreparedCohort = open_prepared(self.workspace.prep)
        cache = LatentCache(self.workspace.latents / tokenizer)
        shares = {}
        for patient in cohort.of(*splits):
            latents = cache.need(patient)
            mask = latents.lung if plan.survival.region == "lung" else None
            shares[patient.pseudonym] = code_histogram(latents.indices[0], mask, plan.model.n_codes).numpy()
        return shares

    @property
    def _register_file(self) -> Any:
        return self.workspace.state / "cox_register.json"

    def _read_register(self) -> RunRegister:
        if not self._register_file.is_file():
            return RunRegister()
        plain = json.loads(self._register_file.read_text(encoding="utf-8"))
        return RunRegister([tuple(claim) for claim in plain["claims"]], plain["approvals"])

    def _write_register(self, register: RunRegister) -> None:
        plain = {"claims": [list(claim) for claim in register.claims], "approvals": register.approvals}
        write_atomic(self._register_file, (json.dumps(plain, indent=1) + "\n").encode())
