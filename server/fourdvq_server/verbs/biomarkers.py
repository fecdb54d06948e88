"""biomarkers: which codes a run found to carry prognosis."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fourdvq.console import Result, table
from fourdvq_server.verbs._project import here
from fourdvq_server.verbs.runs import RunName


def biomarkers(
    run: RunName = "",
    top: Annotated[int, typer.Option(help="how many codes to show, selected ones first", min=1)] = 15,
) -> Result:
    """The codes of a finished selection: hazard ratios, p, concordance, and where table and figures lie."""
    from fourdvq.errors import ConfigError
    from fourdvq_server.biomarker_files import write_biomarkers
    from fourdvq_server.stages.survival import RECORD, TABLE
    from fourdvq_server.store import open_store, read_json

    store = open_store(here().run_folder(run))
    stage = store.stage("survival")
    if stage.result is None:
        raise ConfigError("E_RUN", where=store.name, found="no survival stage yet", wanted="a run with that stage done")
    record = read_json(stage.folder / RECORD, stage.result)
    files = [stage.folder / RECORD, *write_biomarkers(stage.folder, record)]
    if (stage.folder / TABLE).is_file():
        files.insert(0, stage.folder / TABLE)
    third = store.stage("longitudinal").result or {}
    data = {"run": store.name, **record, "longitudinal": third, "files": [str(path) for path in files]}
    lines = [*biomarker_lines(record, top), *longitudinal_lines(third)]
    return Result(data, tuple([*lines, "", *map(str, files)]))


def biomarker_lines(record: dict[str, Any], top: int) -> list[str]:
    """The record as a person reads it: what was asked, what was found, and what limits it."""
    selected = ", ".join(str(code) for code in record["selected"]) or "none"
    lines = [f"selected codes  {selected}"]
    if record["why"]:
        lines.append(record["why"])
    chance = record.get("permutation_p")
    lines.append(f"permutation P   {'not computed' if chance is None else f'{chance:.3g}'} (of the whole rule)")
    lines += [f"note            {text}" for text in record["warnings"]]
    for number, attempt in enumerate(record["analyses"], start=1):
        ended = ", ".join(f"{site} {code}" for site, code in attempt["ended_by"].items()) or "finished"
        masks = "masked" if attempt.get("masked") else "not masked"
        lines.append(f"analysis {number}      {', '.join(attempt['sites'])}: {masks}, {ended}")
    rows = [
        (
            r["code"],
            f"{r['hazard_ratio']:.2f}",
            f"{r['low']:.2f} to {r['high']:.2f}",
            f"{r['worst_p']:.2g}",
            *("-" if c is None else f"{c:.3f}" for c in (r["concordance"], r["worst_concordance"])),
            "selected" if r["selected"] else "",
        )
        for r in record["codes"][:top]
    ]
    if rows:
        heads = ("code", "HR per SD", "95 % interval", "largest p", "mean C", "smallest C", "")
        lines += ["", table(heads, rows)]
    return lines


def longitudinal_lines(facts: dict[str, Any]) -> list[str]:
    """C of the frozen model on test patients, by what stands for their third scan, or why there is none."""
    if not facts:
        return []
    banner = facts.get("model", {}).get("banner", "")
    lines = [
        "",
        "third scans of test patients",
        *([banner] if banner else []),
        *([facts["why"]] if facts["why"] else []),
    ]
    if facts["concordance"]:
        rows = [(source, "-" if c is None else f"{c:.3f}") for source, c in facts["concordance"].items()]
        lines += [table(("third scan", "C of the frozen model"), rows), facts["note"]]
    for part in facts.get("ended", ()):
        ended = ", ".join(f"{site} {code}" for site, code in part["ended_by"].items())
        lines.append(f"{part['purpose']}: {ended}")
    return lines
