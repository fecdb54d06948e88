"""dry-run: one round of everything against a coordinator in this process; nothing leaves."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq_client.verbs._site import here


def dry_run(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings, as experiment=tiny.")] = None,
    until: Annotated[str, typer.Option(help="Last stage to try.")] = "ode",
) -> Result:
    """Try a short experiment on this site's own scans against a coordinator in this process; nothing leaves."""
    from fourdvq_client.rehearsal import rehearse

    workspace, _ = here()
    found = rehearse(workspace, tuple(overrides or ()), until=until, notify=console.note)
    refused = found.refusals
    lines = [f"stages tried: {', '.join(found.stages)}", f"{found.messages} messages answered in {found.seconds:.0f} s"]
    lines += [f"  refused: {kind}: {code} ({rule})" for kind, code, rule in refused]
    lines.append("nothing left this machine; the rehearsal's folder is removed")
    facts = {
        "stages": list(found.stages),
        "messages": found.messages,
        "seconds": found.seconds,
        "refusals": [{"kind": k, "code": c, "rule": r} for k, c, r in refused],
        "summary": found.summary,
    }
    return Result(facts, tuple(lines))
