"""The open door: SuperLink with gate, SuperExec and registrar, started and stopped as one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fourdvq.errors import FourdvqError
from fourdvq_server.certificates import CertificateFiles
from fourdvq_server.control import Control
from fourdvq_server.membership import Registrar, certificate_files
from fourdvq_server.settings import ServerSettings
from fourdvq_server.superexec import SuperExec, SuperExecSettings
from fourdvq_server.superlink import LinkSettings, SuperLink, compact

DOOR_FILE = "door.json"


@dataclass(frozen=True)
class Door:
    """Where a running coordinator listens, and the process that holds it open."""

    private_address: str
    gate_address: str
    pid: int


@dataclass(frozen=True)
class OpenDoor:
    """What `open_door` yields: the running parts."""

    door: Door
    link: SuperLink
    superexec: SuperExec
    control: Control


@contextlib.contextmanager
def open_door(
    root: Path, settings: ServerSettings, notify: Callable[[str], None], *, survives: bool = False
) -> Iterator[OpenDoor]:
    """Hold the door of the coordinator folder `root` open; everything is stopped on the way out, also after an error.

    With `survives`, a run outlives a crash of this process: the next one that opens this folder takes it over.
    Raises FourdvqError E_BUSY if another process holds it, E_PORT if a port is taken, and what SuperLink.start raises.
    """
    state = root / "state"
    state.mkdir(parents=True, exist_ok=True)
    files = certificate_files(root)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_hold(state))
        (state / DOOR_FILE).unlink(missing_ok=True)  # of a predecessor that was killed
        link_settings = LinkSettings(
            state=state.resolve(),
            certificates=CertificateFiles(files.folder.resolve()),
            log_file=root / "logs" / "superlink.log",
            gate_host=settings.gate.host,
            gate_port=settings.gate.port,
            private_host=settings.private_host,
            private_port=settings.private_port,
        )
        compact(link_settings.database)
        link = stack.enter_context(SuperLink(link_settings))
        control = stack.enter_context(Control(link.private_address, files.ca))
        registrar = Registrar(root, control, notify)
        registrar.start()
        stack.callback(registrar.stop)
        superexec = stack.enter_context(SuperExec(_superexec_settings(root, link, survives)))
        door = Door(link.private_address, link.gate_address, os.getpid())
        (state / DOOR_FILE).write_text(json.dumps(vars(door)), encoding="utf-8")
        stack.callback((state / DOOR_FILE).unlink, missing_ok=True)
        yield OpenDoor(door, link, superexec, control)


def find_door(root: Path) -> Door | None:
    """The door that another process holds open for this folder at this moment, or None."""
    state = root / "state"
    path = state / DOOR_FILE
    if not path.is_file():
        return None
    with _lock_file(state).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return Door(**json.loads(path.read_text(encoding="utf-8")))
    return None  # left behind by a process that was killed


def _superexec_settings(root: Path, link: SuperLink, survives: bool) -> SuperExecSettings:
    return SuperExecSettings(
        address=link.private_address,
        ca_file=link.settings.certificates.ca,
        secret_file=link.settings.secret_file,
        home=link.settings.home,
        log_file=root / "logs" / "superexec.log",
        pid_file=link.settings.state / "superexec.json",
        survives=survives,
    )


def _lock_file(state: Path) -> Path:
    return state / "door.lock"


@contextlib.contextmanager
def _hold(state: Path) -> Iterator[None]:
    with _lock_file(state).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _busy(state) from None
        yield


def _busy(state: Path) -> FourdvqError:
    try:
        pid = json.loads((state / DOOR_FILE).read_text(encoding="utf-8"))["pid"]
    except (OSError, ValueError, KeyError):
        pid = "?"
    return FourdvqError("E_BUSY", where=str(state), found=f"process {pid} holds the door open")
