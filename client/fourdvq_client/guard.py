"""The one door of the site: `accept` for everything received, `release` for everything that leaves.

Nothing is opened before `accept` has passed every check, and nothing leaves that `release` did not build again from a
typed reply. The audit line is on the disk before the bytes are handed over. What the coordinator learns of a failure
is one code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from flwr.app import RecordDict

from fourdvq.errors import FourdvqError, Refused, wire_code
from fourdvq.os_errors import NO_SPACE
from fourdvq.plan import Plan
from fourdvq.wire.body import body_sha256
from fourdvq.wire.flower import pack, unpack, unpack_envelope, wire_bytes
from fourdvq.wire.messages import (
    PROTOCOL,
    TASKS,
    PlanTask,
    Refusal,
    Reply,
    ReplyEnvelope,
    Task,
    TaskEnvelope,
    reply_types,
)
from fourdvq_client.accepted import TRAINING, AcceptedRounds
from fourdvq_client.audit import AuditLog, Entry, bucket
from fourdvq_client.code_identity import Installed, check_code
from fourdvq_client.egress import Context, Outcome, clear
from fourdvq_client.ingress import (
    STAGES,
    check_change,
    check_fields,
    check_model,
    check_parent,
    read_plan,
)
from fourdvq_client.policy import BEFORE_APPROVAL, LoadedPolicy, SitePolicy

T = TypeVar("T", bound=Task)

# Stands for an envelope that could not be read: the reply must be well-formed all the same.
NO_ENVELOPE = TaskEnvelope(
    protocol=PROTOCOL, run="unknown", round=0, task_id="0" * 32, plan="", parent="", profile="", code=""
)


class SiteFacts(Protocol):
    """What the guard must know of the site at the moment of a task; read anew each time, because people change it."""

    def policy(self) -> LoadedPolicy: ...

    def plan(self, sha256: str) -> Plan | None:
        """A plan that the coordinator sent before, by its hash."""

    def cohort(self) -> tuple[str, str]:
        """cohort_sha256 and profile_sha256 of the approved scans."""

    def installed(self) -> tuple[Installed, ...]: ...

    def identifiers(self) -> Iterable[str]:
        """Real ids and pseudonyms that no text may hold."""


class Guard:
    """Both doors of one site. Not shared between threads: a site answers one task after the other."""

    def __init__(self, site: str, facts: SiteFacts, audit: AuditLog, rounds: AcceptedRounds) -> None:
        self._site = site
        self._facts = facts
        self._audit = audit
        self._rounds = rounds

    def accept(self, kind: str, records: RecordDict) -> tuple[TaskEnvelope, Task]:
        """The typed task, after every check in order; the first that fails raises FourdvqError, already in the log."""
        envelope = NO_ENVELOPE
        policy: LoadedPolicy | None = None
        try:
            policy = self._facts.policy()
            envelope = unpack_envelope(records, TaskEnvelope)
            task = self._checked(kind, records, envelope, policy.rules)
            self._rounds.accept(envelope, task)
            self._audit.append(_entry("accept", kind, envelope, policy, decision="accepted", size=wire_bytes(records)))
        except BaseException as error:
            self._note_refusal(kind, envelope, policy, error)
            raise
        return envelope, task

    def release(self, outcome: Outcome, envelope: TaskEnvelope, kind: str, task: Task | None = None) -> RecordDict:
        """The records that may leave; `task` is what `accept` gave, None only for a refusal.

        Raises FourdvqError, already in the log, if the reply may not leave: then release `Refusal(code)` instead.
        """
        policy: LoadedPolicy | None = None
        try:
            policy = self._facts.policy() if not isinstance(outcome.reply, Refusal) else self._policy_or_none()
            reply, max_bytes = self._cleared(outcome, envelope, kind, task, policy)
            records, reply_envelope = self._packed(reply, envelope)
            size = wire_bytes(records)
            if size > max_bytes:
                raise Refused("E_EGRESS", where="max_bytes", found=f"{size} bytes", wanted=f"at most {max_bytes}")
            self._note_release(kind, envelope, policy, outcome, reply, reply_envelope, size)
        except BaseException as error:
            self._note_refusal(kind, envelope, policy, error)
            raise
        if not isinstance(reply, Refusal):
            self._rounds.release(envelope, kind)
        return records

    def refusal(self, error: BaseException, envelope: TaskEnvelope, kind: str) -> RecordDict:
        """The code of an error, released like any reply."""
        return self.release(Outcome(Refusal(code=error_code(error))), envelope, kind)

    def envelope_of(self, records: RecordDict, known: TaskEnvelope) -> TaskEnvelope:
        """The envelope to answer with: as accepted, else as far as it can be read, so that a refusal finds its task."""
        if known is not NO_ENVELOPE:
            return known
        try:
            return unpack_envelope(records, TaskEnvelope)
        except FourdvqError:
            return NO_ENVELOPE

    def _checked(self, kind: str, records: RecordDict, envelope: TaskEnvelope, policy: SitePolicy) -> Task:
        if envelope.protocol != PROTOCOL:
            raise Refused("PROTOCOL_MISMATCH", where=kind, found=str(envelope.protocol), wanted=str(PROTOCOL))
        if wire_bytes(records) > policy.ingress.max_bytes:
            raise Refused(
                "FIELD_OUT_OF_BOUNDS",
                where="message size",
                found=f"{wire_bytes(records)} bytes",
                wanted=f"at most {policy.ingress.max_bytes}",
            )
        task_type = TASKS.get(kind)
        if task_type is None or not policy.allows(kind):
            raise Refused("TASK_REFUSED", where=kind, wanted=", ".join(policy.allowed_tasks))
        if task_type.trains and policy.role == "external":
            raise Refused("ROLE_REFUSED", where=kind, found="role external")
        check_code(policy, self._facts.installed())
        plan = self._approved_plan(kind, envelope, policy)
        self._rounds.check(envelope, kind)
        training = task_type.kind.startswith(TRAINING)
        if training and self._rounds.record(envelope.run).trained >= policy.cohort.max_rounds:
            raise Refused("FIELD_OUT_OF_BOUNDS", where="rounds", wanted=f"at most {policy.cohort.max_rounds}")
        task = _unpack_task(records, task_type)
        self._check_content(task, envelope, plan, policy)
        return task

    def _approved_plan(self, kind: str, envelope: TaskEnvelope, policy: SitePolicy) -> Plan | None:
        """The plan of the task: approved on this very cohort, unless the kind is one that comes before approval."""
        plan = self._facts.plan(envelope.plan)
        if kind in BEFORE_APPROVAL:
            return plan
        approval = policy.approval(envelope.plan)
        if approval is None or plan is None:
            raise Refused("PLAN_NOT_APPROVED", where=kind, found=envelope.plan[:12])
        cohort, profile = self._facts.cohort()
        if not envelope.profile == plan.profile_sha256 == profile:
            raise Refused(
                "PROFILE_MISMATCH", where="prep/manifest.json", found=profile[:12], wanted=plan.profile_sha256[:12]
            )
        if approval.cohort != cohort:
            raise Refused("COHORT_CHANGED", where="prep/", found=cohort[:12], wanted=approval.cohort[:12])
        return plan

    def _check_content(self, task: Task, envelope: TaskEnvelope, plan: Plan | None, policy: SitePolicy) -> None:
        if isinstance(task, PlanTask):
            read_plan(task, envelope)
        if plan is not None:
            check_fields(task, plan, policy)
        check_parent(task, envelope)
        check_model(task, plan)
        stage = STAGES.get(type(task))
        if stage is not None:
            weights = task.weights  # type: ignore[attr-defined]
            check_change(weights, self._rounds.last_model(envelope.run, stage), policy.ingress.max_rel_change)
            self._rounds.keep_model(envelope.run, stage, weights)

    def _cleared(
        self, outcome: Outcome, envelope: TaskEnvelope, kind: str, task: Task | None, policy: LoadedPolicy | None
    ) -> tuple[Reply, int]:
        if isinstance(outcome.reply, Refusal):
            return Refusal(code=outcome.reply.code), _REFUSAL_BYTES
        allowed = reply_types(kind) if kind in TASKS else ()
        if policy is None or type(outcome.reply) not in allowed or type(task) is not TASKS.get(kind):
            raise Refused("E_EGRESS", where="type", found=type(outcome.reply).__name__, wanted=f"the reply of {kind}")
        plan = self._facts.plan(envelope.plan)
        cleared = clear(outcome, Context(task, plan, policy.rules, self._facts.identifiers))
        return cleared.reply, cleared.max_bytes

    def _packed(self, reply: Reply, envelope: TaskEnvelope) -> tuple[RecordDict, ReplyEnvelope]:
        reply_envelope = ReplyEnvelope(
            protocol=PROTOCOL,
            run=envelope.run,
            round=envelope.round,
            task_id=envelope.task_id,
            plan=envelope.plan,
            parent=envelope.parent,
            site=self._site,
            payload_sha256=body_sha256(reply),
            audit_head=self._audit.head,
            eps_after=0.0,
        )
        return pack(reply_envelope, reply), reply_envelope

    def _policy_or_none(self) -> LoadedPolicy | None:
        """A site whose policy cannot be read may still say so."""
        try:
            return self._facts.policy()
        except FourdvqError:
            return None

    def _note_release(
        self,
        kind: str,
        envelope: TaskEnvelope,
        policy: LoadedPolicy | None,
        outcome: Outcome,
        reply: Reply,
        reply_envelope: ReplyEnvelope,
        size: int,
    ) -> None:
        refused = isinstance(reply, Refusal)
        cell = policy.rules.egress.min_cell if policy is not None else 1
        self._audit.append(
            _entry(
                "release",
                kind,
                envelope,
                policy,
                decision=f"refusal {reply.code}" if isinstance(reply, Refusal) else type(reply).egress,
                size=size,
                payload=reply_envelope.payload_sha256,
                patients="" if refused else bucket(outcome.patients, max(cell, 5)),
            ),
            after=reply_envelope.audit_head,
        )

    def _note_refusal(
        self, kind: str, envelope: TaskEnvelope, policy: LoadedPolicy | None, error: BaseException
    ) -> None:
        rule = error.where if isinstance(error, FourdvqError) else type(error).__name__
        self._audit.append(_entry("refuse", kind, envelope, policy, decision=error_code(error), rule=rule[:200]))


_REFUSAL_BYTES = 4096


def error_code(error: BaseException) -> str:
    """The wire code of any error; running out of GPU memory and of disk have types of their own."""
    if type(error).__name__ == "OutOfMemoryError":
        return "OUT_OF_MEMORY"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return "DISK_FULL"
    if isinstance(error, KeyboardInterrupt):
        return "CANCELLED"
    return wire_code(error)


def _unpack_task(records: RecordDict, task_type: type[T]) -> T:
    return unpack(records, TaskEnvelope, task_type)[1]


def _entry(
    action: str,
    kind: str,
    envelope: TaskEnvelope,
    policy: LoadedPolicy | None,
    *,
    decision: str,
    rule: str = "",
    size: int = 0,
    payload: str = "",
    patients: str = "",
) -> Entry:
    return Entry(
        action=action,  # type: ignore[arg-type]
        # A message type that this version does not know is a foreign text: it is not written into the log.
        kind=kind if kind in TASKS else "unknown",
        decision=decision,
        rule=rule,
        run=envelope.run,
        round=envelope.round,
        task_id=envelope.task_id,
        payload_sha256=payload,
        bytes=size,
        patients=patients,
        plan=envelope.plan,
        code=envelope.code,
        policy=policy.sha256 if policy is not None else "",
    )
