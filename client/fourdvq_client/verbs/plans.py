"""approve: a person's yes to a plan."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq_client.verbs._site import here, user_name


def approve(
    plan: Annotated[str, typer.Argument(help="A plan file, or 8 digits or more of its hash.")] = "",
    latest: Annotated[bool, typer.Option("--latest", help="The plan the coordinator sent last.")] = False,
    by: Annotated[str, typer.Option(help="Name of the person who decides.")] = "",
    show: Annotated[bool, typer.Option("--show", help="Only show the plan and what it changes.")] = False,
) -> Result:
    """Show a plan, or its difference from the last approved one, and record a yes in policy.yaml."""
    from fourdvq.errors import ConfigError
    from fourdvq_client import approval

    workspace, _ = here()
    if bool(plan) == latest:
        raise ConfigError("E_USAGE", where="approve", found="", wanted="PLAN or --latest")
    found = approval.find_plan(workspace, plan or approval.LATEST)
    before = approval.last_approved(workspace)
    changes = approval.differences(before, found)
    rows = [(c.key, "" if before is None else c.before, c.after) for c in changes]
    facts = {
        "plan": found.hash,
        "name": found.name,
        "profile": found.profile_sha256,
        "compared_with": before.hash if before is not None else "",
        "differences": [vars(c) for c in changes],
        "approved": not show,
    }
    against = f"against the last approved plan {before.hash[:12]}" if before is not None else "in full"
    lines = [f"plan {found.name} {found.hash}, {against}"]
    lines.append(console.table(("setting", "before", "now"), rows) if rows else "no setting differs")
    if not show:
        approval.approve(workspace, found, by=by or user_name())
        lines.append(f"approved on the present cohort by {by or user_name()}")
    return Result(facts, tuple(lines))
