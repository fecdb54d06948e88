"""Flower's SuperLink, hosted in this process: all its APIs on loopback, and the fleet-only gate for sites beside it.

One application, two TLS listeners. The private one (loopback, all routes) serves the SuperExec, the ServerApp and our
own commands; the public one serves what gate.py lets through. A run survives a restart of this process, because the
state is a SQLite file and the ServerApp runs elsewhere (isolation `process`). Internals of Flower 1.41 used here:
`create_app`, `SuperLinkLifespan`, `SuperLinkLifespanConfig`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import logging.handlers
import os
import secrets
import socket
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourdvq.errors import FourdvqError, Refused
from fourdvq_server.certificates import CertificateFiles, write_private
from fourdvq_server.gate import FleetGate, response_headers
from fourdvq_server.loopback import bind, spare_loopback
from fourdvq_server.settings import refuse_public

FLOWER_SERIES = "1.41."
_SECRET_BYTES = 32
_LOG_BYTES, _LOG_FILES = 10_000_000, 5
_MAX_CONNECTIONS = 256  # of the gate; a federation has a handful of sites with two or three connections each


@dataclass(frozen=True)
class LinkSettings:
    """What a SuperLink needs: ports (0 is any free one), certificates, and the folder of its state."""

    state: Path
    certificates: CertificateFiles
    log_file: Path
    gate_host: str = "127.0.0.1"
    gate_port: int = 0
    private_host: str = "127.0.0.1"
    private_port: int = 0

    @property
    def database(self) -> Path:
        return self.state / "link.db"

    @property
    def secret_file(self) -> Path:
        return self.state / "superexec.secret"

    @property
    def home(self) -> Path:
        return self.state / "flower"


class SuperLink:
    """Start and stop both listeners in a thread of this process; after `start` the addresses are known and answer.

    In a thread, because there uvicorn leaves the signals of the process to their owner.
    """

    def __init__(self, settings: LinkSettings) -> None:
        self.settings = settings
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._sockets: tuple[socket.socket, ...] = ()
        self._addresses = ("", "")

    @property
    def private_address(self) -> str:
        """host:port of all APIs, for processes of this machine; empty before `start`."""
        return self._addresses[0]

    @property
    def gate_address(self) -> str:
        """host:port of the door for sites."""
        return self._addresses[1]

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and self._ready.is_set()

    def raise_failure(self) -> None:
        """Raise why it is not running any more."""
        raise self._failure or FourdvqError("E_INTERNAL", where="SuperLink", found="it ended")

    def start(self, timeout: float = 60.0) -> None:
        """Bind, start, and wait until both listeners answer.

        Raises Refused E_FLOWER for another version of Flower, FourdvqError E_PORT if a port is taken, and what
        `refuse_unsafe` raises.
        """
        check_flower_version()
        spare_loopback(os.environ)
        private = bind(self.settings.private_host, self.settings.private_port)
        try:
            gate = bind(self.settings.gate_host, self.settings.gate_port)
        except FourdvqError:
            private.close()
            raise
        self._sockets = private, gate
        self._addresses = _address_of(private), _address_of(gate)
        self._thread = threading.Thread(target=self._run, name="superlink", daemon=True)
        self._thread.start()
        while not self._ready.wait(0.05):
            timeout -= 0.05
            if not self._thread.is_alive() or timeout < 0:
                self.stop()
                self.raise_failure()

    def stop(self, timeout: float = 20.0) -> None:
        """Close both listeners and end the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout)
        for listener in self._sockets:
            listener.close()

    def __enter__(self) -> SuperLink:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            with _flower_log(self.settings.log_file):
                asyncio.run(self._serve())
        # Flower and uvicorn end a failed start with SystemExit; nothing may escape a thread unseen.
        except BaseException as error:
            self._failure = error if isinstance(error, Exception) else FourdvqError("E_INTERNAL", where="SuperLink")

    async def _serve(self) -> None:
        import uvicorn

        private_socket, gate_socket = self._sockets
        config = link_config(self.settings, private_socket.getsockname()[1])
        refuse_unsafe(config)
        main = importlib.import_module("flwr.superlink.main")
        # The package re-exports a function under the name of this module: it must be imported by its full name.
        command = importlib.import_module("flwr.superlink.cli.flower_superlink")
        app = main.create_app(config, command.SuperLinkLifespan)
        certificates = self.settings.certificates
        common: dict[str, Any] = {
            "ssl_keyfile": str(certificates.server_key),
            "ssl_certfile": str(certificates.server),
            "access_log": False,
            "log_config": None,
            "server_header": False,
            "ws": "none",
            # An idle client may take half a minute to close its side of a TLS connection.
            "timeout_graceful_shutdown": 2,
        }
        private = uvicorn.Server(uvicorn.Config(app, **common))
        # lifespan off: the application starts and stops once, with the private listener.
        gate_config = uvicorn.Config(
            FleetGate(app), lifespan="off", headers=response_headers(), limit_concurrency=_MAX_CONNECTIONS, **common
        )
        gate = uvicorn.Server(gate_config)
        tasks = [asyncio.create_task(private.serve([private_socket]))]
        while not private.started and not tasks[0].done():
            await asyncio.sleep(0.02)
        if private.started:
            tasks.append(asyncio.create_task(gate.serve([gate_socket])))
        while not self._stop.is_set() and not any(task.done() for task in tasks):
            if gate.started:
                self._ready.set()
            await asyncio.sleep(0.05)
        # One listener alone is of no use.
        private.should_exit = gate.should_exit = True
        await asyncio.gather(*tasks)


def check_flower_version() -> None:
    """Raise Refused E_FLOWER unless the installed Flower is the one whose internals these modules know."""
    from importlib.metadata import version

    found = version("flwr")
    if not found.startswith(FLOWER_SERIES):
        raise Refused("E_FLOWER", where="flwr", found=found, wanted=f"{FLOWER_SERIES}x")


def link_config(settings: LinkSettings, private_port: int) -> Any:
    """Flower's own configuration object for these settings; makes the SuperExec's secret if there is none."""
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin

    files = settings.certificates
    settings.state.mkdir(parents=True, exist_ok=True)
    if not settings.secret_file.is_file():
        write_private(settings.secret_file, secrets.token_bytes(_SECRET_BYTES))
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=settings.private_host,
        port=private_port,
        insecure=False,
        certificates=(files.ca.read_bytes(), files.server.read_bytes(), files.server_key.read_bytes()),
        superexec_auth_secret=settings.secret_file.read_bytes(),
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(files.ca),
        ssl_certfile=str(files.server),
        ssl_keyfile=str(files.server_key),
        database=str(settings.database),
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )


def refuse_unsafe(config: Any) -> None:
    """Raise ConfigError or Refused E_UNSUPPORTED for a SuperLink that would be open, forgetful or would install code.

    A second look at the finished configuration, whoever made it.
    """
    refuse_public(config.host)
    rules = (
        (config.insecure or config.certificates is None, "no TLS"),
        (not config.enable_supernode_auth, "no authentication of sites"),
        (config.isolation != "process", f"isolation {config.isolation}: a run would end with the SuperLink"),
        (config.runtime_dependency_install, "installation of packages at run time"),
        (not config.superexec_auth_secret, "no secret for the SuperExec"),
        (not Path(config.database).is_absolute(), "no database file: a run would be lost with the process"),
        (bool(config.artifact_provider) or config.simulation, "a simulation or artifact provider"),
    )
    for broken, found in rules:
        if broken:
            raise Refused("E_UNSUPPORTED", where="SuperLink", found=found, wanted="the settings of link_config")
    for name, wanted in (("FLWR_TELEMETRY_ENABLED", "0"), ("FLWR_DISABLE_UPDATE_CHECK", "1")):
        if os.environ.get(name) != wanted:
            raise Refused("E_UNSUPPORTED", where=name, found=os.environ.get(name, "unset"), wanted=wanted)


def compact(database: Path) -> None:
    """Give the space of deleted rows back; only while no SuperLink has the file open. A missing file is left so."""
    if database.is_file():
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("VACUUM")


@contextlib.contextmanager
def _flower_log(path: Path) -> Iterator[None]:
    """Send what Flower and uvicorn log to a file instead of the terminal, where results are printed."""
    from flwr.supercore.logger import FLOWER_LOGGER

    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO)
    loggers = [FLOWER_LOGGER, logging.getLogger("uvicorn")]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()


def _address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
