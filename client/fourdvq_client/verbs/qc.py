"""qc: look at prepared scans and decide about them."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import GLOBAL_HELP, Result
from fourdvq_client.verbs._site import here, user_name

app = typer.Typer(help="Look at prepared scans and decide about them.", no_args_is_help=True, epilog=GLOBAL_HELP)

Patients = Annotated[list[str] | None, typer.Argument(help="PATIENT, or PATIENT/SCAN; pseudonym or hospital id.")]


@app.command("list", epilog=GLOBAL_HELP)
def list_scans(
    undecided: Annotated[bool, typer.Option("--undecided", help="Only scans that wait for a decision.")] = False,
) -> Result:
    """Every prepared scan with its grade, code and decision."""
    from fourdvq_client.review_sheet import review_rows

    workspace, _ = here()
    rows = [r for r in review_rows(workspace) if not undecided or (r["content_sha256"] and not r["decision"])]
    columns = ("pseudonym", "index", "days", "status", "grade", "code", "decision", "dice", "lung_ml")
    shown = [{c: r[c] for c in columns} for r in rows]
    waiting = sum(bool(r["content_sha256"]) and not r["decision"] for r in rows)
    table = console.table(columns, [[r[c] for c in columns] for r in shown])
    return Result({"scans": shown, "undecided": waiting}, (table, f"{waiting} wait for a decision"))


@app.command("approve", epilog=GLOBAL_HELP)
def approve(
    scans: Patients = None,
    all_scans: Annotated[bool, typer.Option("--all", help="Every prepared scan.")] = False,
    passed: Annotated[bool, typer.Option("--passed", help="Every scan of grade PASS.")] = False,
    by: Annotated[str, typer.Option(help="Name of the person who looked.")] = "",
) -> Result:
    """Accept scans after looking at their pictures: training reads approved scans only."""
    from fourdvq_client.review_sheet import record, select

    workspace, _ = here()
    keys = select(workspace, scans or [], all_scans=all_scans, passed=passed)
    done = record(workspace, keys, "approve", by=by or user_name())
    return Result({"approved": done}, (f"{done} scans approved",))


@app.command("reject", epilog=GLOBAL_HELP)
def reject(
    scans: Patients = None,
    reason: Annotated[str, typer.Option(help="Why, for the record at this site.")] = "",
    by: Annotated[str, typer.Option(help="Name of the person who looked.")] = "",
) -> Result:
    """Leave scans out; where a baseline is rejected, `preprocess` takes the next one."""
    from fourdvq_client.review_sheet import record, select

    workspace, _ = here()
    keys = select(workspace, scans or [], all_scans=False, passed=False)
    done = record(workspace, keys, "reject", by=by or user_name(), reason=reason)
    return Result({"rejected": done}, (f"{done} scans rejected; run `fourdvq-client preprocess` again",))


@app.command("open", epilog=GLOBAL_HELP)
def open_sheet() -> Result:
    """Write the contact sheet of all scans, one file for any browser, and say where it is."""
    from fourdvq_client.review_sheet import write_sheet

    workspace, _ = here()
    path = write_sheet(workspace)
    return Result({"file": str(path)}, (f"open {path} in a browser",))
