"""qc: look at prepared scans and decide about them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import GLOBAL_HELP, Result
from fourdvq.errors import CODES, ConfigError
from fourdvq_client.verbs._site import here, user_name

app = typer.Typer(help="Look at prepared scans and decide about them.", no_args_is_help=True, epilog=GLOBAL_HELP)

_NAMES = "PATIENT or PATIENT/SCAN, pseudonym or hospital id; PATIENT/SCAN@CONTENT is refused if the scan has changed."
Patients = Annotated[list[str] | None, typer.Argument(help=_NAMES)]


@app.command("list", epilog=GLOBAL_HELP)
def list_scans(
    only_undecided: Annotated[bool, typer.Option("--undecided", help="Only scans that wait for a decision.")] = False,
    grade: Annotated[str, typer.Option(help="Only scans of this grade: PASS, REVIEW or FAIL.")] = "",
    code: Annotated[str, typer.Option(help="Only scans that show this code.")] = "",
) -> Result:
    """Every scan with its grade, code and decision."""
    from fourdvq_client.review_rows import GRADES, review_rows, undecided

    workspace, _ = here()
    of_grade, of_code = _known("--grade", grade, GRADES), _known("--code", code, tuple(CODES))
    every = review_rows(workspace.prep)
    rows = [r for r in every if undecided(r) or not only_undecided]
    rows = [r for r in rows if of_grade in ("", r["grade"]) and of_code in ("", r["code"])]
    columns = ("pseudonym", "index", "days", "status", "grade", "code", "decision", "dice", "lung_ml")
    shown = [{c: r[c] for c in columns} for r in rows]
    waiting = sum(undecided(r) for r in every)
    table = console.table(columns, [[r[c] for c in columns] for r in shown])
    return Result({"scans": shown, "undecided": waiting}, (table, f"{waiting} wait for a decision"))


def _known(option: str, given: str, words: Sequence[str]) -> str:
    """One of the words, whatever its case: an unknown one would select nothing, which reads as if there were none."""
    word = given.upper()
    if word and word not in words:
        close = difflib.get_close_matches(word, words, n=1)
        raise ConfigError("E_USAGE", where=option, found=given, fix=f"did you mean {close[0]}?" if close else "")
    return word


@app.command("approve", epilog=GLOBAL_HELP)
def approve(
    scans: Patients = None,
    every: Annotated[bool, typer.Option("--all", help="Every undecided scan.")] = False,
    passed: Annotated[bool, typer.Option("--passed", help="Every undecided scan of grade PASS.")] = False,
    by: Annotated[str, typer.Option(help="Name of the person who looked.")] = "",
) -> Result:
    """Accept scans after looking at their pictures: training reads approved scans only.

    A rejection is taken back only where the scan itself is named, as PATIENT/SCAN.
    """
    from fourdvq_client.review_sheet import Choice, record

    workspace, _ = here()
    done = record(workspace, Choice(tuple(scans or ()), every, passed), "approve", by=by or user_name())
    lines = [f"{done.decided} scans approved"]
    if done.left:
        lines.append(f"{done.left} rejected scans left as they are; to approve one, name it: PATIENT/SCAN")
    return Result({"approved": done.decided, "left_rejected": done.left}, tuple(lines))


@app.command("reject", epilog=GLOBAL_HELP)
def reject(
    scans: Patients = None,
    reason: Annotated[str, typer.Option(help="Why, for the record at this site.")] = "",
    by: Annotated[str, typer.Option(help="Name of the person who looked.")] = "",
) -> Result:
    """Leave scans out; where a baseline is rejected, `preprocess` takes the next one."""
    from fourdvq_client.review_sheet import Choice, record

    workspace, _ = here()
    done = record(workspace, Choice(tuple(scans or ())), "reject", by=by or user_name(), reason=reason).decided
    return Result({"rejected": done}, (f"{done} scans rejected; run `fourdvq-client preprocess` again",))


@app.command("redo", epilog=GLOBAL_HELP)
def redo(
    scans: Patients = None,
    reason: Annotated[str, typer.Option(help="Why, for the record at this site.")] = "",
    by: Annotated[str, typer.Option(help="Name of the person who asks.")] = "",
) -> Result:
    """Take decisions back and have scans made again from the start by the next `preprocess`."""
    from fourdvq_client.review_sheet import Choice, record
    from fourdvq_client.workspace import locked

    workspace, _ = here()
    with locked(workspace):
        done = record(workspace, Choice(tuple(scans or ())), "redo", by=by or user_name(), reason=reason).decided
    return Result({"redo": done}, (f"{done} scans to make again; run `fourdvq-client preprocess`",))


@app.command("open", epilog=GLOBAL_HELP)
def open_sheet() -> Result:
    """Write the contact sheet of all scans, one file for any browser, and say where it is."""
    from fourdvq_client.contact_sheet import write_sheet
    from fourdvq_client.shards import tables_locked

    workspace, _ = here()
    with tables_locked(workspace):
        path = write_sheet(workspace.prep)
    return Result({"file": str(path)}, (f"open {path} in a browser",))
