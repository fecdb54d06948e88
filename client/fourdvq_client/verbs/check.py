"""check: the doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result


def check(
    data: Annotated[bool, typer.Option("--data", help="Also read the tables and the scans' headers.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Also look at the device of site.yaml.")] = False,
    network: Annotated[bool, typer.Option("--network", help="Also try the way to the coordinator.")] = False,
) -> Result:
    """Look at this installation and this site; one line per check, with what to do about each problem."""
    from fourdvq_client.checks import exit_code_of, run_checks

    groups = ["base", *(name for name, wanted in (("data", data), ("gpu", gpu), ("network", network)) if wanted)]
    found = run_checks(console.options().workdir, groups)
    rows = [(c.status, c.name, c.found, c.fix) for c in found]
    code = exit_code_of(found)
    worst = next((s for s in ("FAIL", "WARN") if any(c.status == s for c in found)), "PASS")
    facts = {"result": worst, "checks": [vars(c) for c in found]}
    return Result(facts, (console.table(("", "check", "found", "what to do"), rows),), code)
