"""scan, preprocess: from the hospital's tables and scans to prepared arrays."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq.errors import EXIT_OK, EXIT_SOME_REFUSED
from fourdvq_client.verbs._site import here

_SHOWN = 40


def scan() -> Result:
    """Find scans, read headers, compare with the clinical table; writes findings.csv. No pixel is read."""
    from fourdvq_client.preparation import blocking, read_cohort

    workspace, config = here()
    cohort = read_cohort(workspace, config)
    blocked = blocking(cohort.findings)
    facts = {
        "patients": len(cohort.patients),
        "usable": len(cohort.usable),
        "scans": len(cohort.scans),
        "blocking": blocked,
        "findings": [{"code": f.code, "where": f.where, "found": f.found, "fix": f.fix} for f in cohort.findings],
        "file": str(workspace.findings),
    }
    rows = [(f.code, f.where, f.found, f.fix) for f in cohort.findings[:_SHOWN]]
    lines = [f"{len(cohort.scans)} scans of {len(cohort.patients)} patients, {len(cohort.usable)} usable"]
    if rows:
        lines.append(console.table(("code", "where", "found", "what to do"), rows))
    if len(cohort.findings) > _SHOWN:
        lines.append(f"... and {len(cohort.findings) - _SHOWN} more in {workspace.findings}")
    return Result(facts, tuple(lines), EXIT_SOME_REFUSED if blocked else EXIT_OK)


def preprocess(
    workers: Annotated[int, typer.Option(help="Processes side by side; 0 takes the number of site.yaml.", min=0)] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try refused scans again.")] = False,
) -> Result:
    """Mask, align and resample every usable patient's scans; what is already there and unchanged is kept."""
    from fourdvq_client.preparation import prepare_site
    from fourdvq_client.workspace import locked

    workspace, config = here()
    with locked(workspace), console.progress("patients") as advance:
        summary = prepare_site(
            workspace,
            config,
            workers=workers,
            retry_failed=retry_failed,
            progress=lambda _done, total: advance(1, f"of {total}"),
        )
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.by_status.items()))
    lines = [f"{summary.scans} scans of {summary.patients} patients: {counts} ({summary.reused} unchanged)"]
    lines += [f"  {detail}" for detail in summary.details[:_SHOWN]]
    if summary.blocking:
        lines.append(f"{summary.blocking} faults of the tables left patients or scans out: {workspace.findings}")
    lines.append("next   fourdvq-client qc list, look at the pictures, then qc approve")
    return Result(summary.as_dict(), tuple(lines), EXIT_SOME_REFUSED if summary.some_refused else EXIT_OK)
