"""The validation report of one site: its facts, in two editions.

`local` stays in the hospital: pictures and cases. `share` holds aggregates only, with small counts withheld; its JSON
is exactly what `submit` sends. Both are rendered from the same facts, so they cannot disagree. The sections follow
what reporting checklists for prediction models and imaging AI ask for; what a person must judge is left open and marked
as such.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fourdvq.config import to_plain

Edition = Literal["local", "share"]
SMALL_CELL = 5  # counts below are shown as "<5" in the share edition


@dataclass(frozen=True)
class ModelFacts:
    """Which model is reported on."""

    alias: str
    sha256: str
    tokenizer_sha256: str
    run: str
    round: int
    plan_sha256: str
    plan_name: str


@dataclass(frozen=True)
class CohortFlow:
    """How many scans reached each step, and why others did not."""

    patients: int
    received: int
    prepared: int
    approved: int
    longitudinal: int  # patients with two or more approved scans
    deaths: int
    refused: Mapping[str, int] = field(default_factory=dict)  # scans per reason code
    splits: Mapping[str, int] = field(default_factory=dict)  # patients per split


@dataclass(frozen=True)
class MetricRow:
    """One line of a results table: mean over `n` items with a 95 % t interval (None where n < 2)."""

    row: str
    metric: str
    n: int
    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class BiomarkerRow:
    """One code in the Cox selection: hazard ratio per SD with interval, mean over folds, and validation concordance."""

    code: int
    hazard_ratio: float
    low: float
    high: float
    worst_p: float
    concordance: float
    selected: bool


@dataclass(frozen=True)
class Biomarkers:
    """The federation's selection as the site received it, and why it is shorter than five codes, if it is."""

    rows: tuple[BiomarkerRow, ...] = ()
    reason: str = ""
    withheld: int = 0
    patients: int = 0
    deaths: int = 0


@dataclass(frozen=True)
class QualityCase:
    """One prepared scan (local edition only)."""

    pseudonym: str
    scan: int
    years: float
    grade: str
    decision: str
    lung_ml: float
    dice: float | None


@dataclass(frozen=True)
class Egress:
    """What left this site, by kind, counted from its audit log."""

    kind: str
    messages: int
    bytes: int


@dataclass(frozen=True)
class Picture:
    """An image of the local edition, as encoded bytes."""

    title: str
    caption: str
    data: bytes
    media: Literal["image/png", "image/webp"] = "image/png"


@dataclass(frozen=True)
class ReportData:
    """Every fact of the report. Empty sections are said to be empty, never left out silently."""

    site: str
    role: str
    created: str  # YYYY-MM-DD at the site; local edition only
    model: ModelFacts
    flow: CohortFlow
    reconstruction: tuple[MetricRow, ...] = ()
    extrapolation: tuple[MetricRow, ...] = ()
    interpolation: tuple[MetricRow, ...] = ()
    history: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # metric -> value per round
    biomarkers: Biomarkers = field(default_factory=Biomarkers)
    egress: tuple[Egress, ...] = ()
    refusals: Mapping[str, int] = field(default_factory=dict)
    privacy: str = "no differential privacy guarantee; the site's policy bounds what leaves"
    environment: Mapping[str, str] = field(default_factory=dict)
    cases: tuple[QualityCase, ...] = ()
    pictures: tuple[Picture, ...] = ()


def share_edition(data: ReportData) -> ReportData:
    """The facts without cases, pictures and the day they were gathered."""
    return replace(data, cases=(), pictures=(), created="")


def report_json(data: ReportData, edition: Edition) -> dict[str, Any]:
    """The facts as plain JSON, without pictures; share edition: counts below 5 become "<5"."""
    facts = share_edition(data) if edition == "share" else data
    plain: dict[str, Any] = {"schema": 1, "edition": edition, **to_plain(replace(facts, pictures=()))}
    if edition == "share":
        plain["flow"] = _small_cells(plain["flow"])
        plain["refusals"] = _small_cells(plain["refusals"])
        for key in ("patients", "deaths"):
            plain["biomarkers"][key] = _cell(plain["biomarkers"][key])
        for table in ("reconstruction", "extrapolation", "interpolation"):
            plain[table] = [row for row in plain[table] if row["n"] >= SMALL_CELL]
    for key in ("cases", "pictures", "created"):
        if edition == "share":
            del plain[key]
    return plain


def verdicts(data: ReportData) -> list[tuple[str, str, str]]:
    """The summary in three colours: (green | amber | red, what, why), most important first."""
    found = [_skill_verdict(data), _reconstruction_verdict(data), _size_verdict(data), _biomarker_verdict(data)]
    return sorted(found, key=lambda v: ("red", "amber", "green").index(v[0]))


def write_report(data: ReportData, out: Path, edition: Edition) -> tuple[Path, Path]:
    """Write `report.<edition>.html` and its JSON into the folder `out`; returns both paths."""
    from fourdvq.reports.html import render_report

    out.mkdir(parents=True, exist_ok=True)
    html = out / f"report.{edition}.html"
    facts = out / ("report.json" if edition == "local" else "report.share.json")
    html.write_text(render_report(data, edition), encoding="utf-8")
    facts.write_text(json.dumps(report_json(data, edition), indent=1, allow_nan=False), encoding="utf-8")
    return html, facts


def find_row(rows: tuple[MetricRow, ...], row: str, metric: str) -> MetricRow | None:
    """The line of a table with this name and metric."""
    return next((r for r in rows if (r.row, r.metric) == (row, metric)), None)


def _skill_verdict(data: ReportData) -> tuple[str, str, str]:
    skill = find_row(data.extrapolation, "model_residual", "skill") or find_row(data.extrapolation, "model", "skill")
    if skill is None or skill.low is None or skill.high is None:
        return (
            "amber",
            "forecast",
            "not enough follow-up scans at this site to compare with carrying the last scan forward",
        )
    interval = f"skill {skill.mean:.2f} (95 % {skill.low:.2f} to {skill.high:.2f}, n = {skill.n})"
    if skill.low > 0:
        return "green", "forecast", f"better than carrying the last scan forward: {interval}"
    if skill.high < 0:
        return "red", "forecast", f"worse than carrying the last scan forward: {interval}"
    return "amber", "forecast", f"not shown to be better than carrying the last scan forward: {interval}"


def _reconstruction_verdict(data: ReportData) -> tuple[str, str, str]:
    psnr = find_row(data.reconstruction, "lung", "psnr") or find_row(data.reconstruction, "whole", "psnr")
    if psnr is None:
        return "amber", "reconstruction", "no test scan at this site"
    colour = "green" if psnr.mean >= 20 else "amber"
    return colour, "reconstruction", f"PSNR {psnr.mean:.1f} dB on {psnr.n} scans ({psnr.row})"


def _size_verdict(data: ReportData) -> tuple[str, str, str]:
    tested = data.flow.splits.get("test", 0)
    colour = "green" if tested >= 64 else "amber"
    return colour, "size", f"{_cell(tested)} test patients; intervals are wide below 64"


def _biomarker_verdict(data: ReportData) -> tuple[str, str, str]:
    chosen = [b for b in data.biomarkers.rows if b.selected]
    if chosen:
        return "green", "biomarkers", f"{len(chosen)} codes selected over all sites"
    return "amber", "biomarkers", data.biomarkers.reason or "no selection was run"


def _cell(count: int) -> int | str:
    return f"<{SMALL_CELL}" if 0 < count < SMALL_CELL else count


def _small_cells(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _small_cells(v) for k, v in value.items()}
    return _cell(value) if isinstance(value, int) else value
