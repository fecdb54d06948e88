"""One working session of a site: its folder and key held, its ClientApp connected, its events told, a clean end.

Ways to end: the experiment has ended (its release was answered and its run is over), `leave` or a signal. A signal ends
the step in work at the next point where it can be ended, and says goodbye, so that the next start is accepted at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fourdvq.errors import Refused
from fourdvq.training.checkpoint import write_atomic
from fourdvq_client.network import LOOPBACK, split_address
from fourdvq_client.policy import CoordinatorRule
from fourdvq_client.workspace import SiteConfig, Workspace

LEAVE_SIGNAL: Final = signal.SIGUSR1  # what `leave` sends: a wish to end, not an interruption
_LAST_MESSAGE: Final = frozenset({"query.release"})
_WORDS: Final[dict[str, str]] = {
    "connecting": "connecting to {address}",
    "connected": "connected",
    "waiting": "not accepted yet ({code}); trying again",
    "unreachable": "cannot reach the coordinator ({code}: {found}); trying again",
    "back": "the connection is back",
    "run": "a run has begun",
    "message": "{type}: working, {bytes_down} bytes received",
    "replied": "{type}: answered in {seconds_work} s, {bytes_up} bytes sent",
    "app_failed": "an error that was not foreseen: see the log",
    "run_ended": "the run has ended",
    "failed": "a message could not be transferred ({error})",
    "left": "disconnected",
}


@dataclass
class Ending:
    """Why a session ended: `by` is the signal's number, 0 if the experiment ended."""

    by: int = 0
    messages: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


def coordinator_ca(workspace: Workspace, rule: CoordinatorRule, address: str) -> Path:
    """The authority's file, after the policy's own check of it.

    Raises Refused E_POLICY if the policy asks for a certain authority and the file is another, or if an address outside
    this machine has none; Refused E_TLS without a file.
    """
    path = workspace.root / rule.ca_file
    if not path.is_file():
        raise Refused("E_TLS", where=str(path), found="no file", fix="fourdvq-client init INVITATION brings it")
    found = _ca_sha256(path)
    local = split_address(address)[0] in LOOPBACK
    if rule.tls == "loopback" and not local:
        raise Refused("E_POLICY", where="policy.yaml: coordinator.tls", found=f"loopback, but {address}")
    if rule.ca_sha256 and rule.ca_sha256.lower() != found:
        raise Refused(
            "E_POLICY", where="policy.yaml: coordinator.ca_sha256", found=f"{found} in {path}", wanted=rule.ca_sha256
        )
    if not rule.ca_sha256 and not local:
        raise Refused("E_POLICY", where="policy.yaml: coordinator.ca_sha256", found="nothing", wanted=found)
    return path


def work(root: Path, *, address: str = "", stay: bool = False, tell: Callable[[str], None], patience: float) -> Ending:
    """Connect and work; returns how it ended. Raises what opening the site and `run_node` raise.

    `patience` is in seconds: how long to go on when the coordinator says no.
    """
    from fourdvq_client.workspace import locked, open_workspace

    workspace, config = open_workspace(root)
    address = address or _address_of(config)
    with locked(workspace):
        from fourdvq_client.app import make_client_app
        from fourdvq_client.node import NodeTimes, run_node
        from fourdvq_client.runtime import open_site
        from fourdvq_client.site_log import start_log

        site = open_site(root)
        log, ending = start_log(workspace), Ending()
        ca_file = coordinator_ca(workspace, site.facts.policy().rules.coordinator, address)
        cancel = threading.Event()
        try:
            with _signals(ending), _canceller(cancel, site.worker):
                run_node(
                    make_client_app(site),
                    address=address,
                    ca_file=ca_file,
                    key_file=workspace.keys / "site.key",
                    site=config.site,
                    on_event=_teller(workspace, log, ending, tell),
                    stop=ending.stop,
                    cancel=cancel,
                    leave_after=frozenset() if stay else _LAST_MESSAGE,
                    times=NodeTimes(activation=patience),
                )
        finally:
            site.close()
    return ending


def _address_of(config: SiteConfig) -> str:
    if not config.coordinator:
        raise Refused("E_INVITE", where="site.yaml: coordinator", found="nothing", wanted="host:port")
    return config.coordinator


def _ca_sha256(path: Path) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).fingerprint(hashes.SHA256()).hex()
    except ValueError:
        raise Refused("E_TLS", where=str(path), found="not a certificate") from None


@contextlib.contextmanager
def _signals(ending: Ending) -> Iterator[None]:
    """Turn the first signal into a wish to stop; a second Ctrl-C ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def wish(number: int, frame: Any) -> None:
        del frame
        if ending.stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        ending.by = ending.by or number
        ending.stop.set()

    before = {number: signal.signal(number, wish) for number in (signal.SIGINT, signal.SIGTERM, LEAVE_SIGNAL)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _canceller(cancel: threading.Event, worker: Any) -> Iterator[None]:
    """End the worker's process when the work in hand is not wanted any more; its finished rounds are on disk.

    An inline worker has no process: its step ends by itself.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            pid = getattr(worker, "pid", None)
            if cancel.is_set() and pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                cancel.clear()

    thread = threading.Thread(target=watch, name="canceller", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(1.0)


def _teller(
    workspace: Workspace, log: logging.Logger, ending: Ending, tell: Callable[[str], None]
) -> Callable[[Any], None]:
    """Events to the person, to the site's log, and to state/connection.json."""

    def on_event(event: Any) -> None:
        facts = dict(event.facts)
        log.info("%s %s", event.kind, json.dumps(facts, default=str))
        if event.kind == "replied":
            ending.messages += 1
            ending.bytes_up += int(facts["bytes_up"])
        if event.kind == "message":
            ending.bytes_down += int(facts["bytes_down"])
        tell(_WORDS.get(event.kind, event.kind).format(**facts))
        state = {"event": event.kind, "pid": os.getpid(), "messages": ending.messages}
        write_atomic(workspace.state / "connection.json", json.dumps(state).encode())

    return on_event
