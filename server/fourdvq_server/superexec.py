"""The process that starts ServerApps, supervised: Flower's own `flower-superexec`, apart from the SuperLink.

Apart, because a run must survive a restart of the SuperLink. It is the leader of a session of its own, so that it and
the ServerApps it started can be stopped together, by id. Two ways to begin: with `survives`, it outlives a crash of
this process, and the next one finds it by `pid_file` and takes it over; without, it watches our id and ends when we do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from fourdvq.training.checkpoint import write_atomic
from fourdvq_server.loopback import spare_loopback

_START = "from flwr.supercore.cli import flower_superexec; flower_superexec()"
_STOP_S = 10.0
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # before a restart, growing while it keeps dying


@dataclass(frozen=True)
class SuperExecSettings:
    """`address` is the private port of the SuperLink; `home` is where Flower unpacks bundles.

    `survives` needs an address that stays the same over restarts.
    """

    address: str
    ca_file: Path
    secret_file: Path
    home: Path
    log_file: Path
    pid_file: Path
    survives: bool = False
    poll_s: float = 0.2


class SuperExec:
    """Start, watch, restart and stop the process. Use as a context manager or call `start` and `stop`."""

    def __init__(self, settings: SuperExecSettings) -> None:
        self._settings = settings
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | _Adopted | None = None
        self._thread = threading.Thread(target=self._supervise, name="superexec", daemon=True)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        self._process = self._left_behind() or self._launch()
        self._thread.start()

    def stop(self, timeout: float = _STOP_S) -> None:
        """Stop the process and every ServerApp it started; returns when all of them are gone."""
        self._stopping.set()
        if self._process is not None:
            _stop_session(self._process, timeout)
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._settings.pid_file.unlink(missing_ok=True)

    def __enter__(self) -> SuperExec:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _launch(self) -> subprocess.Popen[bytes]:
        s = self._settings
        s.home.mkdir(parents=True, exist_ok=True)
        s.log_file.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", _START, "--runtime-api-address", s.address]
        command += ["--root-certificates", str(s.ca_file), "--superexec-auth-secret-file", str(s.secret_file)]
        command += [] if s.survives else ["--parent-pid", str(os.getpid())]
        with s.log_file.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(s),
                start_new_session=True,
            )
        if s.survives:
            record = {"pid": process.pid, "born": _born(process.pid), "address": s.address}
            write_atomic(s.pid_file, json.dumps(record).encode())
        return process

    def _left_behind(self) -> _Adopted | None:
        """The process that a killed predecessor of ours left, if it lives; one for another address is stopped."""
        try:
            record = json.loads(self._settings.pid_file.read_text(encoding="utf-8"))
            found = _Adopted(int(record["pid"]), str(record["born"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if found.poll() is not None:
            return None
        if self._settings.survives and record["address"] == self._settings.address:
            return found
        _stop_session(found, _STOP_S)
        return None

    def _supervise(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            process = self._process
            if process is None or process.poll() is None:
                self._stopping.wait(0.5)
                continue
            pause = _PAUSES_S[min(failures, len(_PAUSES_S) - 1)]
            failures += 1
            if not self._stopping.wait(pause):
                self._process = self._launch()


class _Adopted:
    """A process that is not our child. The time of its birth tells it from a later one that got the same id."""

    def __init__(self, pid: int, born: str) -> None:
        self.pid, self._born = pid, born

    def poll(self) -> int | None:
        """None while it lives."""
        return None if self._born and _born(self.pid) == self._born else 0

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.05)
        return 0


def _born(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" if it is gone, a zombie, or this system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _environment(settings: SuperExecSettings) -> dict[str, str]:
    """The ServerApp's environment: Flower finds its own commands by PATH, calls nobody outside, installs nothing."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {
        **os.environ,
        "PATH": path,
        "FLWR_HOME": str(settings.home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(settings.poll_s),
        "PYTHONUNBUFFERED": "1",
    }
    spare_loopback(environment)
    return environment


def _stop_session(process: subprocess.Popen[bytes] | _Adopted, timeout: float) -> None:
    """Ask the session to end, wait for all its processes, and kill what is left."""
    session = process.pid
    end = time.monotonic() + timeout
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGTERM)
    while time.monotonic() < end:
        process.poll()
        if not _is_alive(session):
            return
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    process.wait()


def _is_alive(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True
