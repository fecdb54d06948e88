"""The demo's federation as real processes on this machine: TLS, keys, a door, and one `fourdvq-client join` per site.

What is different from hospitals is only that everything listens on loopback and that a person's decisions (admitting
sites, approving the plan) are made here, by the demo. Every process is stopped by its id at the end, also after an
error or Ctrl-C.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fourdvq import console
from fourdvq.config import build, to_plain
from fourdvq.errors import EXIT_OK, FourdvqError
from fourdvq.wire.invitation import SiteRequest
from fourdvq.wire.messages import Role
from fourdvq_server.app import new_run
from fourdvq_server.coordinator import OpenDoor, open_door
from fourdvq_server.experiment import Experiment
from fourdvq_server.loopback import free_port
from fourdvq_server.membership import approve, invite, load_members, revoke
from fourdvq_server.network_run import follow
from fourdvq_server.project import Project
from fourdvq_server.settings import GateSettings, ServerSettings, load_settings, save_settings
from fourdvq_server.setup import create_project

_START_CLIENT = "from fourdvq_client.cli import main; main()"
_STOP_S = 20.0
_APPROVAL_POLL_S = 0.5
_LAST_LINES = 15


def run_with_processes(
    project: Project,
    experiment: Experiment,
    roots: Mapping[str, Path],
    *,
    notify: Callable[[str], None] = console.note,
) -> tuple[str, dict[str, Any]]:
    """Run `experiment` over the site folders `roots` (site name to folder); returns the run's name and its summary.

    Raises what stopped the experiment (see network_run), or FourdvqError E_INTERNAL with the last lines of a client
    that ended by itself with an error.
    """
    client = _client_parts()
    settings = prepare_coordinator(project, roots, experiment, client)
    run = new_run(project, experiment)
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(open_door(project.root, settings, notify))
        clients = stack.enter_context(_clients(roots, running))
        stack.enter_context(_approving(client, roots, experiment.plan.hash, notify))
        stack.enter_context(_watching(clients, running))
        try:
            return run, follow(project, run, running.control, notify)
        except FourdvqError:
            clients.raise_failure()
            raise


def prepare_coordinator(
    project: Project, roots: Mapping[str, Path], experiment: Experiment, client: Mapping[str, Any]
) -> ServerSettings:
    """The coordinator's folder with free ports, and every site invited and admitted with its own key."""
    gate_port, private_port = free_port(), free_port()
    address = f"localhost:{gate_port}"
    if project.server_yaml.is_file():
        old = load_settings(project.server_yaml)
        gate = GateSettings("127.0.0.1", gate_port)
        settings = ServerSettings(old.federation, address, old.names, gate, private_port=private_port)
        save_settings(project.server_yaml, settings)
    else:
        settings, _ = create_project(project.root, "demo", address, gate_host="127.0.0.1", private_port=private_port)
    now = datetime.datetime.now(datetime.UTC)
    admitted = {name for name, member in load_members(project.root).items() if member.status == "approved"}
    for name in admitted - set(roots):
        revoke(project.root, name, now)
    for name, root in roots.items():
        if name in admitted:
            continue  # by an earlier demo in this folder, with the key that the site still has
        role: Role = client["role_of"](root)
        invitation = invite(project.root, settings, name, role, experiment.profile_plain, now)
        request = build(SiteRequest, client["take_invitation"](root, to_plain(invitation)))
        approve(project.root, settings, request, now)
    return settings


class Clients:
    """The sites' processes. Their output goes to logs/join.log of each site folder."""

    def __init__(self, roots: Mapping[str, Path], running: OpenDoor) -> None:
        self._roots = dict(roots)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        address = running.door.gate_address.replace("127.0.0.1", "localhost")
        for name, root in roots.items():
            self._processes[name] = _start_client(root, address)

    def failed(self) -> dict[str, int]:
        """Clients that ended by themselves with an error, and their exit codes."""
        codes = {name: process.poll() for name, process in self._processes.items()}
        return {name: code for name, code in codes.items() if code not in (None, EXIT_OK)}

    def raise_failure(self) -> None:
        """Raise FourdvqError if a client has ended with an error; its last lines say why."""
        for name, code in self.failed().items():
            path = _log_of(self._roots[name])
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
            raise FourdvqError("E_INTERNAL", where=f"client of {name}", found=f"exit {code}: " + " | ".join(lines))

    def stop(self) -> None:
        """Ask all of them to leave, wait, and end by force what does not; their workers end with them."""
        for process in self._processes.values():
            if process.poll() is None:
                _signal_session(process, signal.SIGTERM, only_leader=True)
        end = time.monotonic() + _STOP_S
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
            _signal_session(process, signal.SIGKILL, only_leader=False)
            process.wait()


@contextlib.contextmanager
def _clients(roots: Mapping[str, Path], running: OpenDoor) -> Iterator[Clients]:
    clients = Clients(roots, running)
    try:
        yield clients
    finally:
        clients.stop()


@contextlib.contextmanager
def _watching(clients: Clients, running: OpenDoor) -> Iterator[None]:
    """Stop the run if a client ends with an error: nobody restarts it here, and the round would wait in vain."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            if clients.failed():
                with contextlib.suppress(FourdvqError):
                    for run_id in running.control.active_runs():
                        running.control.stop_run(run_id)
                return

    yield from _beside(watch, done)


@contextlib.contextmanager
def _approving(
    client: Mapping[str, Any], roots: Mapping[str, Path], plan: str, notify: Callable[[str], None]
) -> Iterator[None]:
    """Approve this plan, in the demo's name, at each site that has received it: at a hospital a person does this."""
    done = threading.Event()
    waiting = dict(roots)

    def approve_plans() -> None:
        while waiting and not done.wait(_APPROVAL_POLL_S):
            for name, root in list(waiting.items()):
                # A site folder may hold the plans of earlier demos, and the one that came last is approved.
                if not (root / "state" / "plans" / f"{plan}.json").is_file():
                    continue
                with contextlib.suppress(FourdvqError):
                    if client["approve"](root, by="demo") == plan:
                        notify(f"{name}: plan {plan[:12]} approved by the demo")
                        del waiting[name]

    yield from _beside(approve_plans, done)


def _beside(action: Callable[[], None], done: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5.0)


def _start_client(root: Path, address: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _START_CLIENT, "join", "--workdir", str(root), "--coordinator", address]
    path = _log_of(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with path.open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _signal_session(process: subprocess.Popen[bytes], number: int, *, only_leader: bool) -> None:
    """To the client alone (it ends its own worker), or to its whole session, workers included."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if only_leader:
            os.kill(process.pid, number)
        else:
            os.killpg(process.pid, number)


def _log_of(root: Path) -> Path:
    return root / "logs" / "join.log"


def _client_parts() -> dict[str, Any]:
    """What is done at the sites, by name through the entry point `fourdvq.apps: client`, never by import."""
    found = [entry for entry in entry_points(group="fourdvq.apps") if entry.name == "client"]
    if not found:
        raise FourdvqError("E_UNSUPPORTED", where="entry point fourdvq.apps: client", found="not installed")
    package = found[0].module.rpartition(".")[0]
    enrol = importlib.import_module(f"{package}.enrol")
    return {
        "approve": found[0].load().approve,
        "take_invitation": enrol.take_invitation,
        "role_of": enrol.role_of,
    }
