"""What runs came to: validate again, compare, report, export, release."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fourdvq.console import Result, note, table
from fourdvq_server.verbs._project import here
from fourdvq_server.verbs.runs import RunName


def validate(
    run: RunName = "",
    number: Annotated[int, typer.Option("--round", help="a round of stage 1; 0: the frozen model and its ODE")] = 0,
    site: Annotated[list[str] | None, typer.Option(help="ask this site only; may be repeated")] = None,
) -> Result:
    """Ask the sites for test scores of a run's model again: external, cross-site, any round."""
    from fourdvq_server.app import allow_to_run
    from fourdvq_server.network_run import run_over_network
    from fourdvq_server.revalidate import Question, put_question, validations
    from fourdvq_server.store import read_json

    project = here()
    store = allow_to_run(project, run)
    put_question(store, Question(number, tuple(site or ())))
    run_over_network(project, store.name, notify=note)
    result = read_json(validations(store)[-1], {})
    return Result({"run": store.name, **result}, tuple(_score_lines(result)))


def compare(
    first: Annotated[str, typer.Argument(help="a run")],
    second: Annotated[str, typer.Argument(help="another run")],
    group: Annotated[str, typer.Option(help="all, train or external")] = "external",
) -> Result:
    """Two runs side by side: the settings that differ, and the scores that both have."""
    from fourdvq_server.federation_report import compare_rows, different_settings
    from fourdvq_server.store import open_store

    project = here()
    ours, theirs = (open_store(project.run_folder(name)) for name in (first, second))
    settings, rows = different_settings(ours, theirs), compare_rows(ours, theirs, group)
    shown = [(f"{r['row']} {r['metric']}", _mean(r["first"]), _mean(r["second"])) for r in rows]
    lines = [table(["setting", first, second], settings), "", table([group, first, second], shown)]
    data = {"first": first, "second": second, "group": group, "settings": settings, "scores": rows}
    return Result(data, tuple(lines))


def report(
    run: RunName = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the page; default: in the run folder")] = None,
) -> Result:
    """The federation's report of a run: one HTML page, and with --json its facts."""
    from fourdvq_server.federation_report import facts_of, write_html
    from fourdvq_server.store import open_store

    store = open_store(here().run_folder(run))
    path = write_html(store, output or store.folder / "report.html")
    return Result({"path": str(path), **facts_of(store)}, (str(path),))


def export(
    run: RunName = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="an empty or new folder")] = None,
) -> Result:
    """A folder for a paper: plan, profile, metrics and scores as CSV, report, checksums. No weights."""
    from fourdvq_server.federation_report import export_folder
    from fourdvq_server.store import open_store

    store = open_store(here().run_folder(run))
    files = export_folder(store, output or Path(f"{store.name}-export"))
    return Result({"run": store.name, "files": [str(p) for p in files]}, tuple(str(p) for p in files))


def release(
    run: RunName = "",
    number: Annotated[str, typer.Option("--round", help="best, or the number of the frozen round")] = "best",
) -> Result:
    """Write the released bundle of a finished run again and check it; sites get it in stage release or with `pull`."""
    from fourdvq_server.bundle import SUMS
    from fourdvq_server.store import open_store
    from fourdvq_server.stored_release import write_stored

    project = here()
    folder, card = write_stored(open_store(project.run_folder(run)), project.releases, number)
    lines = (str(folder), f"weights sha256 {card['weights_sha256']}", f"check: cd {folder} && sha256sum -c {SUMS}")
    return Result({"folder": str(folder), **card}, lines)


def _score_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"== {group} ==\n{text}" for group, text in result.get("tables", {}).items()]
    if not lines:
        rows = [(f"{r['row']} {r['metric']}", r["n"], _mean(r)) for r in result.get("groups", {}).get("all", ())]
        lines = [table(["score", "n", "mean"], rows)]
    return lines + [f"{site}: {codes}" for site, codes in result.get("failed", {}).items()]


def _mean(row: dict[str, Any]) -> str:
    return "-" if row["mean"] is None else f"{row['mean']:.5g}"
