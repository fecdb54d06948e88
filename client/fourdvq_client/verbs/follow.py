"""status, watch: what the site does right now."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq.errors import EXIT_FAILED, EXIT_OK
from fourdvq_client.verbs._site import here


def status() -> Result:
    """One look: is a client at work, which stage and round, how long still. With --quiet: exit 1 if none is at work."""
    from fourdvq_client.situation import look

    workspace, config = here()
    found = look(workspace, config)
    idle = console.options().quiet and not found.running
    return Result(found.as_dict(), () if console.options().quiet else found.lines(), EXIT_FAILED if idle else EXIT_OK)


def watch(
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="One look, as `status`.")] = False,
) -> Result:
    """Follow the work at this site until it ends or Ctrl-C."""
    from fourdvq_client.situation import look

    workspace, config = here()
    shown: tuple[str, ...] = ()
    while True:
        found = look(workspace, config)
        if once or console.options().json:
            return Result(found.as_dict(), found.lines())
        if found.lines() != shown:
            shown = found.lines()
            print("\n".join(shown), flush=True)
        time.sleep(every)
