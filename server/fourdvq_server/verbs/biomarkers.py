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
    from fourdvq_server.biomarker_files import PICTURES, RECORD, write_biomarkers
    from fourdvq_server.stages.survival import TABLE
    from fourdvq_server.store import open_store, read_json

    store = open_store(here().run_folder(run))
    stage = store.stage("survival")
    if stage.result is None:
        raise ConfigError("E_RUN", where=store.name, found="no survival stage yet", wanted="a run with that stage done")
    record = read_json(stage.folder / RECORD, stage.result)
    files = [stage.folder / RECORD, *write_biomarkers(stage.folder, record)]
    files = [stage.folder / name for name in (TABLE, PICTURES) if (stage.folder / name).is_file()] + files
    third = store.stage("longitudinal").result or {}
    data = {"run": store.name, **record, "longitudinal": third, "files": [str(path) for path in files]}
    lines = [*biomarker_lines(record, top), *prognosis_lines(record), *longitudinal_lines(third)]
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


def prognosis_lines(record: dict[str, Any]) -> list[str]:
    """The model of the selected codes, its risk groups and their calibration; nothing where there is no model."""
    model, groups = record.get("model") or {}, record.get("risk_groups") or {}
    lines = []
    if model:
        rows = [
            (r["name"], f"{r['hazard_ratio']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}", _p(r["p"]), _p(r["ph_p"]))
            for r in model["coefficients"]
        ]
        heads = ("model", "HR per SD", "95 % interval", "p", "proportional hazards p")
        lines += ["", *([model["banner"]] if model["banner"] else []), table(heads, rows)]
        lines.append(f"ridge {model['ridge']:g} per SD, {model['deaths_per_parameter']:.1f} deaths per parameter")
    if groups:
        lines += ["", f"risk groups     log-rank p {_p(groups['logrank_p'])} (stratified by site)"]
        seen = [
            (r["group"], f"{r['years']:.1f}", _number(r["expected"]), _number(r["observed"], r["low"], r["high"]))
            for r in groups["calibration"]
        ]
        lines += [table(("risk", "years", "expected alive", "observed, 95 % interval"), seen)] if seen else []
        lines.append(f"note            {groups['note']}")
    return [*lines, *_ended(record)]


def longitudinal_lines(facts: dict[str, Any]) -> list[str]:
    """C of the frozen model on test patients, by what stands for their later scan, or why there is none."""
    if not facts:
        return []
    lines = ["", "later scans of test patients"]
    lines += [text for text in (facts.get("banner", ""), facts["why"]) if text]
    titles = {"level": "third scan", "change": "change over a year"}
    for feature, title in titles.items():
        part = facts.get(feature) or {}
        rows = [
            (name, _number(row["c"], row["low"], row["high"]))
            for name, row in [*part.get("sources", {}).items(), *part.get("differences", {}).items()]
        ]
        if rows:
            lines.append(table((title, "C of the frozen model, 95 % interval"), rows))
        elif part.get("why") and part["why"] != facts["why"]:
            lines.append(f"{title}: {part['why']}")
    return [*lines, *([facts["note"]] if facts["concordance"] else []), *_ended(facts)]


def _ended(facts: dict[str, Any]) -> list[str]:
    """What ended an analysis, by purpose."""
    return [
        f"{part['purpose']}: " + ", ".join(f"{site} {code}" for site, code in part["ended_by"].items())
        for part in facts.get("ended", ())
    ]


def _number(value: float | None, low: float | None = None, high: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
