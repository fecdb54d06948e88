"""Hospitals for survival analyses over a network: the client's own guard and desk around simulated tables."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context, Message
from flwr.serverapp import Grid

from fourdvq.config import build
from fourdvq.plan import Plan
from fourdvq.survival import CoxSite, CoxSiteState, Policy
from fourdvq.survival.messages import HelloRequest
from fourdvq.wire.messages import CoxFutureTask, CoxKeysTask, CoxPeersTask, Receipt, Reply
from fourdvq_client.accepted import AcceptedRounds
from fourdvq_client.audit import AuditLog
from fourdvq_client.cox_desk import CoxDesk
from fourdvq_client.egress import Outcome
from fourdvq_client.guard import NO_ENVELOPE, Guard
from fourdvq_client.workspace import Workspace
from fourdvq_server.rounds import Federation
from fourdvq_server.stages.context import SiteInfo, StageContext
from fourdvq_server.stages.cox_exchange import Exchange
from fourdvq_server.store import create_store
from site_cases import SMALL, MemoryFacts, policy_text

TOKENIZER = "7e" * 32
RULES = build(Policy, yaml.safe_load(policy_text())["cox"])


def survival_plan(codes: int = 12, **survival: Any) -> Plan:
    spec = dataclasses.replace(SMALL.survival, **survival)
    return dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, n_codes=codes), survival=spec)


class TableSite:
    """One hospital with a survival table. `sent` holds every reply by kind, `before[kind]` runs ahead of the work."""

    def __init__(self, folder: Path, table: CoxSite, plan: Plan) -> None:
        workspace = Workspace(folder)
        workspace.secret.parent.mkdir(parents=True)
        workspace.secret.write_bytes(hashlib.sha256(table.name.encode()).digest())
        self.table, self.plan, self.secret = table, plan, workspace.secret.read_bytes()
        self.facts = MemoryFacts(policy_text().replace(SMALL.hash, plan.hash))
        self.facts.plans = {plan.hash: plan}
        self.audit = AuditLog(folder / "audit.jsonl", "key")
        self.guard = Guard(table.name, self.facts, self.audit, AcceptedRounds(folder / "state"))
        self.desk = CoxDesk(workspace, table.name, self.table_for)
        self.third: dict[str, CoxSite] = {}  # tables of later scans by feature, all sources side by side
        self.sent: list[tuple[str, Reply]] = []
        self.before: dict[str, Callable[[], None]] = {}

    def table_for(self, hello: HelloRequest, tokenizer: str, plan: Plan) -> CoxSite:
        return self.third[hello.feature] if hello.purpose == "longitudinal" else self.table

    def __call__(self, message: Message, context: Context) -> Message:
        kind, envelope = message.metadata.message_type, NO_ENVELOPE
        self.before.get(kind, int)()
        try:
            envelope, task = self.guard.accept(kind, message.content)
            if isinstance(task, CoxKeysTask):
                outcome = self.desk.keys(task, envelope)
            elif isinstance(task, CoxPeersTask):
                outcome = self.desk.peers(task, envelope)
            elif isinstance(task, CoxFutureTask):
                outcome = Outcome(Receipt(sha256=task.tokenizer_sha256))
            else:
                outcome = self.desk.answer(task, envelope, self.plan, self.facts.policy().rules)  # type: ignore[arg-type]
            self.sent.append((kind, outcome.reply))
            records = self.guard.release(outcome, envelope, kind, task)
        except Exception as error:
            records = self.guard.refusal(error, self.guard.envelope_of(message.content, envelope), kind)
        return Message(records, reply_to=message)

    def local_state(self) -> CoxSiteState:
        """The same site in this process, without masks, under the same rules and key."""
        key = hmac.new(self.secret, b"cox folds", hashlib.sha256).digest()
        return CoxSiteState(self.table, RULES, key, codebook_sha256=TOKENIZER)


def table_sites(folder: Path, tables: Sequence[CoxSite], plan: Plan) -> dict[str, TableSite]:
    return {table.name: TableSite(folder / table.name, table, plan) for table in tables}


class _Nowhere:
    def site(self, site: str, role: str) -> None: ...

    def log_metrics(self, stage: str, number: int, site: str, values: Any) -> None: ...

    def artifact(self, path: Path, folder: str = "") -> None: ...


def stage_context(folder: Path, grid: Grid, sites: dict[str, TableSite], plan: Plan) -> StageContext:
    """A coordinator at the survival stage, whose sites were admitted and approved the plan."""
    store = create_store(folder / "r", plan, {}, {})
    told: list[str] = []
    info = SiteInfo("train", ode=True, patients=50, scans=50, train_scans=50, version="1", device="cpu", profile="")
    return StageContext(
        plan=plan,
        store=store,
        federation=Federation(grid, store, notify=told.append),
        metrics=_Nowhere(),
        notify=told.append,
        progress=lambda *_: None,
        releases=folder / "releases",
        sites=dict.fromkeys(sites, info),
        ready=set(sites),
    )


def exchange_of(context: StageContext) -> Exchange:
    return Exchange(context, context.store.stage("survival"), TOKENIZER)
