"""`serve`: hold the door for sites open."""

from __future__ import annotations

from fourdvq import console
from fourdvq.console import Result


def serve() -> Result:
    """Open the door: SuperLink on loopback behind the fleet-only TLS port. Runs until Ctrl-C or SIGTERM.

    Changes of the list of sites take effect while it runs. A run that goes on survives a restart of this command.
    """
    import signal
    import threading

    from fourdvq_server.coordinator import open_door
    from fourdvq_server.project import Project
    from fourdvq_server.settings import load_settings

    root = console.options().workdir.resolve()
    settings = load_settings(Project(root).server_yaml)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with open_door(root, settings, console.note, survives=True) as running:
        console.note(f"sites connect to {settings.address}; listening on {running.door.gate_address}")
        while not stop.wait(0.5):
            if not running.link.is_running:
                running.link.raise_failure()
    return Result({"gate": running.door.gate_address, "stopped": True}, ("the door is closed",))
