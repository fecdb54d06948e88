"""survival: which analyses of this site's patients were begun, and a person's yes to one more run of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourdvq import console
from fourdvq.console import GLOBAL_HELP, Result
from fourdvq_client.verbs._site import here, user_name

if TYPE_CHECKING:
    from fourdvq_client.cox_register import CoxRegister

app = typer.Typer(
    help="Survival analyses that were begun here, and leave for another run.", no_args_is_help=True, epilog=GLOBAL_HELP
)
_WHY_ONE = (
    "Each analysis of a cohort is answered for one run. The sums of a second run, above all with other folds or after "
    "a few patients came or went, can be subtracted from those of the first, and what is left belongs to few patients."
)


@app.command("runs", epilog=GLOBAL_HELP)
def runs() -> Result:
    """What was begun: cohort, purpose, run, when, and under which plan."""
    from fourdvq_client.cox_register import CoxRegister

    workspace, _ = here()
    register = CoxRegister(workspace.state)
    return Result(_facts(register), tuple(_lines(register)))


@app.command("allow-rerun", epilog=GLOBAL_HELP)
def allow_rerun(
    reason: Annotated[str, typer.Option(help="Why another run is right; it is written to the log.")] = "",
    by: Annotated[str, typer.Option(help="Name of the person who decides.")] = "",
) -> Result:
    """Allow one more run of the analyses that were begun (COX_REFUSED, rule `one_run`), after showing what was run.

    The yes is for the next run that asks, with all its purposes; a run that was refused must be started again.
    """
    from fourdvq.errors import ConfigError
    from fourdvq_client.audit import AuditLog
    from fourdvq_client.cox_register import CoxRegister
    from fourdvq_client.policy import load_policy
    from fourdvq_client.runtime import site_fingerprint

    workspace, _ = here()
    register = CoxRegister(workspace.state)
    if not register.begun():
        raise ConfigError(
            "E_VALUE", where="survival allow-rerun", found="no analysis was begun here", wanted="a refused run", fix=""
        )
    lines = [*_lines(register), _WHY_ONE]
    reason = reason or _asked(lines)
    if not reason.strip():
        raise ConfigError("E_USAGE", where="--reason", found="nothing", wanted="why another run is right")
    audit = AuditLog(workspace.audit_file, site_fingerprint(workspace))
    policy = load_policy(workspace.policy_yaml).sha256
    allowed = register.allow_one(audit, by=by or user_name(), reason=reason.strip(), policy=policy)
    lines.append(f"allowed by {by or user_name()}: {allowed} more")
    return Result({**_facts(register), "reason": reason.strip()}, tuple(lines))


def _asked(lines: list[str]) -> str:
    """The reason from the person at the terminal; empty where nobody sits there, or the output is for a program."""
    import sys

    if console.options().json or not sys.stdin.isatty():
        return ""
    for line in lines:
        console.note(line)
    return str(typer.prompt("Reason for another run", default="", show_default=False))


def _facts(register: CoxRegister) -> dict[str, Any]:
    return {"begun": [vars(row) for row in register.begun()], "allowed": register.read().approvals}


def _lines(register: CoxRegister) -> list[str]:
    rows = [(b.utc, b.purpose, b.run, b.plan[:12], b.cohort[:12]) for b in register.begun()]
    if not rows:
        return ["no survival analysis was begun here"]
    return [console.table(("begun", "purpose", "run", "plan", "cohort"), rows), _allowed(register.read().approvals)]


def _allowed(approvals: int) -> str:
    return f"further runs allowed: {approvals}"
