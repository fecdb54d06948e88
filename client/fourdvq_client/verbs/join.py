"""`join` and `leave`: work for the federation, and stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_TEMPORARY
from fourdvq_client.verbs._site import here

_LEAVE_WAIT_S = 600.0  # a step may have to end first


def join(
    coordinator: Annotated[str, typer.Option(help="host:port instead of site.yaml's")] = "",
    stay: Annotated[bool, typer.Option("--stay", help="stay connected when the experiment has ended")] = False,
    background: Annotated[bool, typer.Option("--background", help="go on without this terminal")] = False,
    patience: Annotated[float, typer.Option(help="seconds to go on when the coordinator says no")] = 75.0,
) -> Result:
    """Connect to the coordinator and work until the experiment has ended. Only ever calls out, to one address.

    Ctrl-C or SIGTERM end the step, disconnect and leave; the same command goes on later (exit 130 or 75).
    """
    from fourdvq_client.session import LEAVE_SIGNAL, work

    workspace, config = here()
    if background:
        return _in_background(coordinator, stay, patience)
    ending = work(workspace.root, address=coordinator, stay=stay, tell=console.note, patience=patience)
    facts = {
        "site": config.site,
        "messages": ending.messages,
        "bytes_up": ending.bytes_up,
        "bytes_down": ending.bytes_down,
        "ended_by": signal.Signals(ending.by).name if ending.by else "the end of the experiment",
    }
    codes = {0: EXIT_OK, int(LEAVE_SIGNAL): EXIT_OK, int(signal.SIGINT): EXIT_INTERRUPTED}
    line = f"{config.site}: {ending.messages} messages answered; ended by {facts['ended_by']}"
    return Result(facts, (line,), codes.get(ending.by, EXIT_TEMPORARY))


def leave() -> Result:
    """Ask the client that works in this folder to finish its step, save and disconnect; wait until it has."""
    from fourdvq.errors import FourdvqError, TemporaryStop
    from fourdvq_client.keys import lock_holder
    from fourdvq_client.session import LEAVE_SIGNAL

    workspace, config = here()
    key = workspace.keys / "site.key"
    holder = lock_holder(key)
    if holder is None:
        return Result({"site": config.site, "left": False}, (f"{config.site}: no client at work",))
    if holder["host"] != socket.gethostname():
        raise FourdvqError("E_BUSY", where=str(key), found=f"process {holder['pid']} on {holder['host']}")
    os.kill(int(holder["pid"]), LEAVE_SIGNAL)
    end = time.monotonic() + _LEAVE_WAIT_S
    while lock_holder(key) is not None:
        if time.monotonic() > end:
            raise TemporaryStop("E_BUSY", where=str(key), found=f"process {holder['pid']} still finishes its step")
        time.sleep(0.1)
    return Result({"site": config.site, "left": True, "pid": holder["pid"]}, (f"{config.site}: left",))


def _in_background(coordinator: str, stay: bool, patience: float) -> Result:
    from fourdvq_client.keys import lock_holder

    workspace, config = here()
    command = [sys.executable, "-c", "from fourdvq_client.cli import main; main()", "join"]
    command += ["--workdir", str(workspace.root), "--patience", str(patience)]
    command += ["--coordinator", coordinator] if coordinator else []
    command += ["--stay"] if stay else []
    workspace.logs.mkdir(parents=True, exist_ok=True)
    with (workspace.logs / "join.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    for _ in range(100):
        if process.poll() is not None or lock_holder(workspace.keys / "site.key") is not None:
            break
        time.sleep(0.1)
    code = process.poll() or EXIT_OK
    line = f"{config.site}: works as process {process.pid}; see logs/join.log and `fourdvq-client watch`"
    if code:
        line = f"{config.site}: did not start; see {workspace.logs / 'join.log'}"
    return Result({"site": config.site, "pid": process.pid}, (line,), code)
