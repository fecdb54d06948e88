"""The site's validation report: facts from prep/, runs/, models/ and the audit log, in a local and a share edition."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fourdvq import __version__
from fourdvq.data.datasets import PreparedCohort, clinical_of, open_prepared
from fourdvq.data.prepared import MANIFEST_COLUMNS, read_table
from fourdvq.errors import CohortError
from fourdvq.evaluation.summary import RowSums, mean_interval
from fourdvq.reports.validation import (
    BiomarkerRow,
    Biomarkers,
    CohortFlow,
    Egress,
    MetricRow,
    ModelFacts,
    Picture,
    QualityCase,
    ReportData,
    write_report,
)
from fourdvq_client.audit import read_entries
from fourdvq_client.local_scores import LocalScores, load_scores
from fourdvq_client.policy import load_policy
from fourdvq_client.released import Released, open_release
from fourdvq_client.workspace import SiteConfig, Workspace

SHARE_JSON = "report.share.json"
_MAX_PICTURES = 4
_MAX_BIOMARKERS = 12
_SHOWN_LOSSES = frozenset({"loss_rec"})  # the L1 error of stage 1: the one that says something without its weights


def write_site_report(workspace: Workspace, config: SiteConfig, *, run: str = "") -> dict[str, Path]:
    """Write both editions under reports/<day>/ and return their paths. `run` picks the history shown, else the last.

    Raises CohortError E_NO_APPROVED without prepared scans, ModelError E_RELEASE without a model.
    """
    release = open_release(workspace)
    cohort = open_prepared(workspace.prep)
    scores = load_scores(workspace, release)
    day = datetime.now(UTC).date().isoformat()
    data = ReportData(
        site=config.site,
        role=load_policy(workspace.policy_yaml).rules.role,
        created=day,
        model=_model(release),
        flow=_flow(workspace, cohort),
        reconstruction=_table(scores, "reconstruction"),
        extrapolation=_table(scores, "extrapolation"),
        interpolation=_table(scores, "interpolation"),
        history=_history(workspace, run or str(release.card.get("run", ""))),
        biomarkers=_biomarkers(workspace, cohort, release),
        egress=_egress(workspace),
        refusals=_refusals(workspace),
        environment={"fourdvq": __version__, "python": platform.python_version(), "system": platform.system()},
        cases=_cases(workspace, cohort),
        pictures=_pictures(workspace, cohort),
    )
    out = workspace.reports / day
    local_html, local_json = write_report(data, out, "local")
    share_html, share_json = write_report(data, out, "share")
    return {"local": local_html, "json": local_json, "share": share_html, "share_json": share_json}


def latest_share(workspace: Workspace) -> Path | None:
    """The JSON of the newest share edition, or None."""
    found = sorted(workspace.reports.glob(f"*/{SHARE_JSON}"))
    return found[-1] if found else None


def metric_rows(sums: Sequence[RowSums], mode: str) -> tuple[MetricRow, ...]:
    """The rows of one mode as a report shows them: of predictions the lung, of reconstructions both regions."""
    rows = []
    for one in sums:
        parts = one.metric.split("/")
        if len(parts) != 3 or parts[0] != mode or one.n == 0 or (mode != "reconstruction" and parts[2] != "lung"):
            continue
        mean, low, high = mean_interval(one)
        known = one.n > 1
        name = parts[2] if mode == "reconstruction" else one.row
        rows.append(MetricRow(name, parts[1], one.n, mean, low if known else None, high if known else None))
    return tuple(rows)


def _table(scores: LocalScores | None, mode: str) -> tuple[MetricRow, ...]:
    return metric_rows(scores.sums, mode) if scores is not None else ()


def _model(release: Released) -> ModelFacts:
    card = release.card
    return ModelFacts(
        alias=str(card["version"]),
        sha256=str(card["weights_sha256"]),
        tokenizer_sha256=str(card["tokenizer_sha256"]),
        run=str(card.get("run", "")),
        round=int(card.get("round", 0)),
        plan_sha256=str(card["plan_sha256"]),
        plan_name=release.plan.name,
    )


def _biomarkers(workspace: Workspace, cohort: PreparedCohort, release: Released) -> Biomarkers:
    """The federation's selection as the released model's card brings it; patients and deaths are this site's own."""
    card = release.card.get("biomarkers") or {}
    rows = tuple(
        BiomarkerRow(
            code=int(row["code"]),
            hazard_ratio=float(row["hazard_ratio"]),
            low=float(row["low"]),
            high=float(row["high"]),
            worst_p=float(row["worst_p"]),
            concordance=float(row["concordance"]),
            selected=bool(row["selected"]),
        )
        for row in (card.get("codes") or ())[:_MAX_BIOMARKERS]
    )
    analysed = {p.pseudonym for p in cohort.of("train", "validation")}
    clinical = [row for row in clinical_of(workspace.prep) if row.complete and row.pseudonym in analysed]
    return Biomarkers(
        rows=rows,
        reason=str(card.get("why") or ""),
        withheld=int(card.get("withheld") or 0),
        patients=len(clinical),
        deaths=sum(row.event == 1 for row in clinical),
    )


def _flow(workspace: Workspace, cohort: PreparedCohort) -> CohortFlow:
    manifest = read_table(workspace.prep / "manifest.csv", MANIFEST_COLUMNS)
    try:
        deaths = sum(row.event == 1 for row in clinical_of(workspace.prep))
    except CohortError:
        deaths = 0
    return CohortFlow(
        patients=len({row["pseudonym"] for row in manifest}),
        received=len(manifest),
        prepared=sum(bool(row["content_sha256"]) for row in manifest),
        approved=sum(len(p.scans) for p in cohort.patients),
        longitudinal=sum(len(p.scans) > 1 for p in cohort.patients),
        deaths=deaths,
        refused=dict(Counter(row["code"] for row in manifest if row["status"] in ("refused", "failed"))),
        splits=dict(Counter(p.split for p in cohort.patients)),
    )


def _history(workspace: Workspace, run: str) -> dict[str, tuple[float, ...]]:
    path = workspace.runs / run / "rounds.jsonl"
    if not run or not path.is_file():
        return {}
    history: dict[str, list[float]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        for name in _SHOWN_LOSSES & set(line["losses"]):
            history.setdefault(name, []).append(float(line["losses"][name]))
    return {name: tuple(values) for name, values in history.items()}


def _egress(workspace: Workspace) -> tuple[Egress, ...]:
    messages: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for entry in read_entries(workspace.audit_file):
        if entry["action"] == "release":
            messages[entry["kind"]] += 1
            size[entry["kind"]] += int(entry["bytes"])
    return tuple(Egress(kind, messages[kind], size[kind]) for kind in sorted(messages))


def _refusals(workspace: Workspace) -> dict[str, int]:
    refused = [e["decision"] for e in read_entries(workspace.audit_file) if e["action"] == "refuse"]
    return dict(Counter(refused))


def _cases(workspace: Workspace, cohort: PreparedCohort) -> tuple[QualityCase, ...]:
    rows = {(r["pseudonym"], int(r["index"])): r for r in read_table(workspace.prep / "manifest.csv", MANIFEST_COLUMNS)}
    cases = []
    for patient in cohort.patients:
        for scan in patient.scans:
            row = rows[scan.pseudonym, scan.index]
            dice = float(row["dice"]) if row["dice"] else None
            lung = float(row["lung_ml"] or 0)
            cases.append(QualityCase(scan.pseudonym, scan.index, scan.years, row["grade"], row["decision"], lung, dice))
    return tuple(cases)


def _pictures(workspace: Workspace, cohort: PreparedCohort) -> tuple[Picture, ...]:
    known = {p.pseudonym for p in cohort.patients}
    figures = [p for p in sorted(workspace.generated.glob("*/trajectory.png")) if p.parent.name in known]
    return tuple(
        Picture(f"Trajectory of {path.parent.name}", "generated scans are synthetic", path.read_bytes())
        for path in figures[:_MAX_PICTURES]
    )
