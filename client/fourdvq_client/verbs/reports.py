"""report, submit: the site's validation report, and the part of it that may go to the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fourdvq.console import Result
from fourdvq_client.verbs._site import here, user_name


def report(
    run: Annotated[str, typer.Option(help="Run whose rounds are shown; without it the model's own.")] = "",
) -> Result:
    """Write report.local.html, report.share.html and their JSON for the model that came last."""
    from fourdvq_client.site_report import write_site_report

    workspace, config = here()
    paths = {name: str(path) for name, path in write_site_report(workspace, config, run=run).items()}
    return Result({"files": paths}, tuple(f"{name:<11}{path}" for name, path in paths.items()))


def submit(
    file: Annotated[Path | None, typer.Argument(help="A share edition's JSON; without it the newest.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    by: Annotated[str, typer.Option(help="Name of the person who decides.")] = "",
) -> Result:
    """Show exactly what would be sent, ask, and put it into the outbox; it goes up when the coordinator asks."""
    from fourdvq_client.outbox import put_in_outbox, text_to_submit

    workspace, _ = here()
    path, text = text_to_submit(workspace, file)
    if not yes:
        typer.echo(text, err=True)
        typer.confirm(f"Send these {len(text)} characters of {path}?", abort=True, err=True)
    sha256 = put_in_outbox(workspace, text, by=by or user_name())
    facts = {"file": str(path), "sha256": sha256, "characters": len(text)}
    return Result(
        facts, (f"in the outbox: {path}, sha256 {sha256}", "it is sent when the coordinator asks for reports")
    )
