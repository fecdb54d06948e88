"""One exchange with the sites: ask, collect until all answered or the deadline passed, check, journal.

Sites are known by name, never by node id: a site that reconnects to a new database has a new id. A reply is matched by
the id of the request, because errors that the server side makes for a lost site do not carry the site's own id.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from fourdvq.errors import FourdvqError, TemporaryStop, WireError
from fourdvq.tensors import payload_sha256
from fourdvq.wire.flower import pack, unpack, wire_bytes
from fourdvq.wire.messages import PROTOCOL, Refusal, Reply, ReplyEnvelope, Task, TaskEnvelope, reply_types
from fourdvq_server.journal import Journal
from fourdvq_server.reply_checks import check_body, check_reply
from fourdvq_server.store import RunStore

# What an error made by Flower itself means: 3 and 4 are an expired request or reply, 5 a lost heartbeat.
_FLOWER_ERRORS = {
    2: "INTERNAL",
    3: "TIMEOUT",
    4: "TIMEOUT",
    5: "E_UNREACHABLE",
    6: "TASK_REFUSED",
    7: "CODE_MISMATCH",
}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.5


@dataclass(frozen=True)
class Received:
    """A reply that passed every check."""

    envelope: ReplyEnvelope
    body: Reply
    bytes_up: int
    seconds: float


@dataclass
class Replies:
    """What came back: `good` by site; for every other asked site a code in one of the three tables."""

    round: int
    good: dict[str, Received] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # the site said no: its wire code
    quarantined: dict[str, str] = field(default_factory=dict)  # the coordinator did not believe it
    lost: dict[str, str] = field(default_factory=dict)  # nothing came
    bytes_down: dict[str, int] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    reused: tuple[str, ...] = ()  # read from the journal of an interrupted round

    @property
    def failed(self) -> dict[str, str]:
        """Site to code, for everyone who did not answer well."""
        return {**self.lost, **self.refused, **self.quarantined}

    def bodies(self) -> dict[str, Reply]:
        """Site to reply, in the order of the sites' names, so that sums do not depend on who was faster."""
        return {site: self.good[site].body for site in sorted(self.good)}


@dataclass(frozen=True)
class _Sent:
    site: str
    task: Task
    envelope: TaskEnvelope
    at: float


class Federation:
    """Asks sites on behalf of one run.

    `code_sha256` is of the coordinator's package, `profile_sha256` of the preprocessing that all sites share. `notify`
    gets a line of text for whatever a person may want to know at once.
    """

    def __init__(
        self,
        grid: Grid,
        store: RunStore,
        *,
        code_sha256: str = "",
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self._grid = grid
        self._store = store
        self._plan = store.plan
        self._code = code_sha256
        self._notify = notify or _ignore
        self._audit_heads: dict[str, str] = {}
        self._abandoned: dict[str, tuple[str, int]] = {}
        self.bytes_down: dict[str, int] = {}
        self.bytes_up: dict[str, int] = {}

    def online(self) -> dict[str, int]:
        """Names of the sites that are connected now, with their node ids."""
        return {node.name: node.node_id for node in self._grid.get_nodes() if node.name}

    def ask(
        self,
        tasks: Mapping[str, Task],
        *,
        journal: Journal | None = None,
        quorum: int = 0,
        deadline_s: float | None = None,
    ) -> Replies:
        """Send one task to each named site and wait. Raises TemporaryStop E_QUORUM if fewer than `quorum` answer well.

        With a journal, replies that an interrupted run already had are taken from it. Raises TemporaryStop CANCELLED if
        a person stops the run meanwhile.
        """
        self.wait_while_paused()
        replies = Replies(self._store.next_wire_round())
        open_tasks = self._reuse(tasks, journal, replies) if journal else dict(tasks)
        waiting = self._send(open_tasks, replies)
        end = time.monotonic() + (deadline_s or self._plan.federation.deadline_s)
        pause = _FIRST_PAUSE_S
        while waiting and time.monotonic() < end:
            arrived = list(self._grid.pull_messages([*waiting, *self._abandoned]))
            for message in arrived:
                self._receive(message, waiting, replies, journal)
            if waiting:
                pause = _FIRST_PAUSE_S if arrived else min(pause * 1.3, _LONGEST_PAUSE_S)
                time.sleep(pause)
                self._stop_if_asked()
        for message_id, sent in waiting.items():
            replies.lost[sent.site] = "TIMEOUT"
            self._abandoned[message_id] = (sent.site, replies.round)
        self._finish(replies, quorum)
        return replies

    def wait_while_paused(self) -> None:
        """Between exchanges: hold while a person paused the run, raise TemporaryStop CANCELLED if stopped."""
        self._stop_if_asked()
        if self._store.control.pause:
            self._notify("paused; `fourdvq-server resume` or `pause --off` goes on")
            self._store.set_status({**self._store.status, "state": "paused"})
        while self._store.control.pause:
            time.sleep(_LONGEST_PAUSE_S)
            self._stop_if_asked()

    def _reuse(self, tasks: Mapping[str, Task], journal: Journal, replies: Replies) -> dict[str, Task]:
        left = {}
        for site, task in tasks.items():
            kept = journal.read(site, task, plan=self._plan.hash, parent=parent_of(task))
            if kept is None:
                left[site] = task
            else:
                replies.good[site] = Received(kept.envelope, kept.body, kept.bytes_up, 0.0)
                self._audit_heads[site] = kept.envelope.audit_head
        replies.reused = tuple(sorted(replies.good))
        return left

    def _send(self, tasks: Mapping[str, Task], replies: Replies) -> dict[str, _Sent]:
        nodes = self.online()
        messages, sent = [], []
        ttl = self._plan.federation.deadline_s + self._plan.federation.ttl_margin_s
        for site, task in tasks.items():
            if site not in nodes:
                replies.lost[site] = "E_UNREACHABLE"
                continue
            envelope = self._envelope(task, replies.round)
            records = pack(envelope, task)
            replies.bytes_down[site] = wire_bytes(records)
            kind = type(task).kind
            messages.append(Message(records, nodes[site], kind, group_id=str(replies.round), ttl=ttl))
            sent.append(_Sent(site, task, envelope, time.monotonic()))
        # A list: Flower's own grid walks over the messages twice. It answers [] if it could queue nothing.
        ids = list(self._grid.push_messages(messages)) or [None] * len(messages)
        waiting = {message_id: s for message_id, s in zip(ids, sent, strict=True) if message_id is not None}
        for message_id, s in zip(ids, sent, strict=True):
            if message_id is None:
                replies.lost[s.site] = "E_UNREACHABLE"
        return waiting

    def _envelope(self, task: Task, number: int) -> TaskEnvelope:
        return TaskEnvelope(
            protocol=PROTOCOL,
            run=self._store.name,
            round=number,
            task_id=secrets.token_hex(16),
            plan=self._plan.hash,
            parent=parent_of(task),
            profile=self._plan.profile_sha256,
            code=self._code,
        )

    def _receive(self, message: Message, waiting: dict[str, _Sent], replies: Replies, journal: Journal | None) -> None:
        request = message.metadata.reply_to_message_id
        if request in self._abandoned:
            site, number = self._abandoned.pop(request)
            self._notify(f"{site}: reply to exchange {number} came after its deadline and is not used (STALE_ROUND)")
            return
        sent = waiting.pop(request)
        if message.has_error():
            replies.lost[sent.site] = _FLOWER_ERRORS.get(message.error.code, "INTERNAL")
            return
        try:
            self._accept(message, sent, replies, journal)
        except FourdvqError as error:
            replies.quarantined[sent.site] = error.code
            self._notify(f"{sent.site}: reply put aside: {error}")

    def _accept(self, message: Message, sent: _Sent, replies: Replies, journal: Journal | None) -> None:
        size = wire_bytes(message.content)
        replies.bytes_up[sent.site] = size
        envelope, body = _unpack_reply(message, reply_types(type(sent.task).kind))
        last = self._audit_heads.get(sent.site)
        check_reply(sent.site, sent.envelope, envelope, body, last_audit_head=last)
        self._audit_heads[sent.site] = envelope.audit_head
        if isinstance(body, Refusal):
            replies.refused[sent.site] = body.code
            self._notify(f"{sent.site}: refused {type(sent.task).kind}: {body.code}")
            return
        check_body(sent.site, self._plan, sent.task, body)
        if journal:
            journal.write(type(sent.task).kind, envelope, body, size)
        replies.good[sent.site] = Received(envelope, body, size, time.monotonic() - sent.at)

    def _finish(self, replies: Replies, quorum: int) -> None:
        for total, part in ((self.bytes_down, replies.bytes_down), (self.bytes_up, replies.bytes_up)):
            for site, size in part.items():
                total[site] = total.get(site, 0) + size
        for site, code in sorted(replies.lost.items()):
            self._notify(f"{site}: no reply ({code})")
        if len(replies.good) < quorum:
            found = ", ".join(f"{site} {code}" for site, code in sorted(replies.failed.items())) or "no site"
            raise TemporaryStop(
                "E_QUORUM",
                where=f"run {self._store.name}, exchange {replies.round}",
                found=f"{len(replies.good)} valid replies; {found}",
                wanted=f"{quorum} valid replies",
            )

    def _stop_if_asked(self) -> None:
        if self._store.control.stop:
            raise TemporaryStop(
                "CANCELLED",
                where=f"run {self._store.name}",
                found="stopped by `fourdvq-server stop`",
                fix=f"fourdvq-server resume {self._store.name}",
            )


def parent_of(task: Task) -> str:
    """Payload sha256 of the weights that the task starts from; empty for a task without weights."""
    weights = getattr(task, "weights", None)
    return payload_sha256(weights) if weights is not None else ""


def _unpack_reply(message: Message, wanted: tuple[type[Reply], ...]) -> tuple[ReplyEnvelope, Reply]:
    """The reply as what was asked for, or as a refusal: that has one field and no tensors."""
    if not len(message.content.array_records.get("tensors", ())):
        with contextlib.suppress(WireError):
            return unpack(message.content, ReplyEnvelope, Refusal)
    return unpack(message.content, ReplyEnvelope, *wanted)


def _ignore(text: str) -> None:
    del text
