"""The site's connection to the coordinator: an in-process Flower node that runs one ClientApp, the installed one.

The node only calls out, to one address, over TLS that must lead to the federation's own certificate authority. It
takes messages, hands them to the given ClientApp and brings back its replies. It never asks for a bundle, so no code
arrives; and when the ClientApp raises, a code of `fourdvq.errors.WIRE_CODES` leaves, never the text of the error.

Activation, heartbeats and retries are our own, because Flower's end the process or send signals to it; the calls
themselves are in fleet.py.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fourdvq.errors import FourdvqError, Refused, TemporaryStop, wire_code
from fourdvq_client.fleet import Fleet, TransferFailed, check_flower_version, error_reply, open_fleet
from fourdvq_client.keys import KeyLock, load_site_key
from fourdvq_client.link import Caller, RunEnded, Stopped

_BEATS_PER_INTERVAL = 0.6  # a beat may be lost and the site still counts as online
ONLINE_WINDOW_S = 70.0  # after a crash the coordinator counts this site as online for up to a minute


@dataclass(frozen=True)
class NodeEvent:
    """Something that happened, for the log and the live view of this site; it never leaves.

    Kinds: connecting, connected, waiting (refused for now), unreachable, back, run, message, replied, app_failed,
    run_ended, failed, left.
    """

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeTimes:
    """Seconds. The coordinator counts a site as online for twice `heartbeat` after its last sign of life.

    `activation`: how long to go on knocking when the coordinator says no. `first_contact`: how long to try to reach it
    at all; once connected, the node tries for ever. `watch`: how often to ask, during work, if the run still goes on.
    """

    poll: float = 0.5
    heartbeat: float = 30.0  # Flower allows 10 to 1800
    watch: float = 30.0
    activation: float = 75.0
    activation_pause: float = 5.0
    first_contact: float = 120.0


def run_node(
    app: ClientApp,
    *,
    address: str,
    ca_file: Path,
    key_file: Path,
    site: str,
    on_event: Callable[[NodeEvent], None] | None = None,
    stop: threading.Event | None = None,
    cancel: threading.Event | None = None,
    leave_after: frozenset[str] = frozenset(),
    times: NodeTimes | None = None,
    max_message_bytes: int = 8 * 1024**3,
) -> None:
    """Connect, work until `stop` is set, disconnect. The ClientApp runs in the calling thread.

    `cancel` is set while a message is in work and its run has ended or the node is asked to stop: long steps look at it
    and end early. With `leave_after` (message types) the node also leaves once one of these was answered and its run
    has ended.

    Raises Refused E_BUSY if another process uses the key, E_KEY_FILE, E_FLOWER, E_CLOCK, E_ACTIVATION (as TemporaryStop
    while the coordinator may still count an earlier connection); ConnectionFailed E_TLS, E_UNREACHABLE, E_PROXY.
    """
    check_flower_version()
    key = load_site_key(key_file)
    node = _Node(app, site, on_event, stop, cancel, leave_after, times or NodeTimes())
    with KeyLock(key_file) as lock, open_fleet(address, ca_file, key, max_message_bytes) as fleet:
        node.tell("connecting", address=address)
        with contextlib.suppress(Stopped):
            while node.connect_and_work(fleet, lock):
                pass


class _Node:
    """The working loop: one message at a time through the ClientApp."""

    def __init__(
        self,
        app: ClientApp,
        site: str,
        on_event: Callable[[NodeEvent], None] | None,
        stop: threading.Event | None,
        cancel: threading.Event | None,
        leave_after: frozenset[str],
        times: NodeTimes,
    ) -> None:
        self._app, self._site, self._on_event = app, site, on_event
        self._stop, self._cancel = stop or threading.Event(), cancel or threading.Event()
        self._leave_after, self._times = leave_after, times
        self._call = Caller(self._stop, on_trouble=self._trouble)
        self._memory: dict[int, RecordDict] = {}  # per run; never sent
        self._last_run: int | None = None
        self._may_leave = False

    def tell(self, kind: str, **facts: Any) -> None:
        if self._on_event is not None:
            self._on_event(NodeEvent(kind, facts))

    def connect_and_work(self, fleet: Fleet, lock: KeyLock) -> bool:
        """Activate, work, say goodbye. True if the coordinator forgot this node and it should knock again."""
        self._activate(fleet, lock)
        self.tell("connected", node_id=str(fleet.node_id))
        heart = _Every(self._times.heartbeat * _BEATS_PER_INTERVAL, lambda: self._beat(fleet))
        heart.start()
        try:
            self._work(fleet)
        except Refused as refusal:
            # The database was replaced, or the key revoked: knocking again tells which.
            if refusal.code != "E_ACTIVATION":
                raise
            self.tell("waiting", code=refusal.code, found=refusal.found)
            return not self._stop.is_set()
        finally:
            heart.stop()
            # Without a network there is no goodbye.
            with contextlib.suppress(FourdvqError, RunEnded):
                fleet.deactivate()
            self.tell("left")
        return False

    def _activate(self, fleet: Fleet, lock: KeyLock) -> None:
        started = time.monotonic()
        knock = Caller(self._stop, patience=self._times.first_contact, on_trouble=self._trouble)
        while True:
            try:
                fleet.activate(knock, self._times.heartbeat)
            except Refused as refusal:
                if refusal.code != "E_ACTIVATION":
                    raise
                refused_for = lock.note_refusal()
                if time.monotonic() - started >= self._times.activation or self._stop.is_set():
                    raise _final(refusal, refused_for) from None
                self.tell("waiting", code=refusal.code, found=refusal.found, seconds=round(refused_for))
                self._stop.wait(self._times.activation_pause)
            else:
                lock.forget_refusal()
                return

    def _work(self, fleet: Fleet) -> None:
        while not self._stop.is_set():
            try:
                received = fleet.receive(self._call)
                if received is not None:
                    self._handle(fleet, *received)
                    continue
                if self._may_leave and self._last_run is not None:
                    fleet.confirm_run(self._last_run, self._call)
            except RunEnded:
                self.tell("run_ended", run=str(self._last_run))
                if self._may_leave:
                    return
            except Refused:
                raise
            except (TransferFailed, FourdvqError) as error:
                # One message that cannot be fetched or sent must not end the service: it counts as lost there.
                self.tell("failed", error=f"{type(error).__name__}: {error}")
            self._stop.wait(self._times.poll)

    def _handle(self, fleet: Fleet, head: Message, tree: Any) -> None:
        started, run_id, kind = time.monotonic(), head.metadata.run_id, head.metadata.message_type
        if run_id != self._last_run:
            self._last_run = run_id
            fleet.confirm_run(run_id, self._call)
            self.tell("run", run=str(run_id))
        message, bytes_down = fleet.pull(self._call, head, tree)
        self.tell("message", run=str(run_id), type=kind, bytes_down=bytes_down)
        pulled = time.monotonic()
        reply = self._answer(message, fleet)
        worked = time.monotonic()
        bytes_up = fleet.push(self._call, reply, worked - pulled)
        self._may_leave = self._may_leave or kind in self._leave_after
        self.tell(
            "replied",
            run=str(run_id),
            type=kind,
            bytes_up=bytes_up,
            seconds_work=round(worked - pulled, 3),
            seconds_transfer=round(pulled - started + time.monotonic() - worked, 3),
        )

    def _answer(self, message: Message, fleet: Fleet) -> Message:
        """Run the ClientApp. Whatever it does, the result is a reply without the text of an error."""
        run_id = message.metadata.run_id
        context = Context(
            run_id=run_id,
            node_id=fleet.node_id,
            node_config={"site": self._site},
            state=self._memory.setdefault(run_id, RecordDict()),
            run_config={},  # lives in the bundle, which is not fetched: what a task needs is in its message
        )
        self._cancel.clear()
        watchers = (
            _Every(self._times.watch, lambda: self._check_run(fleet, run_id)),
            _Every(0.2, lambda: self._cancel.set() if self._stop.is_set() else None),
        )
        for watcher in watchers:
            watcher.start()
        try:
            reply = self._app(message, context)
        except Exception as error:
            self.tell("app_failed", error=f"{type(error).__name__}: {error}")
            return error_reply(message, wire_code(error))
        finally:
            for watcher in watchers:
                watcher.stop()
        if reply.has_error():
            return error_reply(message, reply.error.reason)
        return reply

    def _check_run(self, fleet: Fleet, run_id: int) -> None:
        """During work: cancel it if the run has ended or this site was shut out."""
        try:
            fleet.confirm_run(run_id)
        except (RunEnded, Refused):
            self._cancel.set()
        except FourdvqError:
            return  # a network in trouble says nothing about the run

    def _beat(self, fleet: Fleet) -> None:
        # A heartbeat that fails needs no answer: the next one follows, and the loop's own calls say what is wrong.
        with contextlib.suppress(FourdvqError, RunEnded):
            fleet.beat(self._times.heartbeat)

    def _trouble(self, error: FourdvqError | None) -> None:
        if error is None:
            self.tell("back")
        else:
            self.tell("unreachable", code=error.code, found=error.found)


class _Every:
    """Call a function every `seconds` in a thread of its own until stopped."""

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self._seconds, self._action = seconds, action
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Return at once; a call on its way may still end after this."""
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(self._seconds):
            self._action()


def _final(refusal: Refused, refused_for: float) -> FourdvqError:
    """Inside the online window a later start may succeed (exit 75); after it a person must act (exit 5)."""
    if refused_for < ONLINE_WINDOW_S:
        fix = f"start again in a minute; refused for {refused_for:.0f} s so far"
        return TemporaryStop(refusal.code, where=refusal.where, found=refusal.found, fix=fix)
    fix = "ask the coordinator whether the key with this site's fingerprint is approved (fourdvq-server sites)"
    return Refused(refusal.code, where=refusal.where, found=refusal.found, fix=fix)
