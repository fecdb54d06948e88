"""Decisions about prepared scans, and the contact sheet that a person decides from: one HTML file, no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fourdvq.data.files import write_atomic
from fourdvq.data.prepared import MANIFEST_COLUMNS, read_table
from fourdvq.data.review import ScanKey, decide
from fourdvq.errors import CohortError, ConfigError
from fourdvq_client.preparation import pseudonym_of
from fourdvq_client.workspace import Workspace

_STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:1.2rem;background:#fff;color:#1b1b1b}
figure{display:inline-block;margin:.4rem;vertical-align:top}img{max-width:520px;border:1px solid #ccc;display:block}
.PASS{border-left:6px solid #2a7d4f}.REVIEW{border-left:6px solid #c07a00}.FAIL{border-left:6px solid #b3261e}
figure{padding-left:.5rem}"""


def review_rows(workspace: Workspace) -> list[dict[str, str]]:
    """The manifest's rows. Raises CohortError E_FILE before the first preparation."""
    return read_table(workspace.prep / "manifest.csv", MANIFEST_COLUMNS)


def select(workspace: Workspace, named: Sequence[str], *, all_scans: bool, passed: bool) -> list[ScanKey]:
    """The scans that a person means. ConfigError E_USAGE if none is named, CohortError E_PATIENT for an unknown one."""
    rows = [r for r in review_rows(workspace) if r["content_sha256"]]
    if all_scans or passed:
        return [_key(r) for r in rows if all_scans or r["grade"] == "PASS"]
    if not named:
        raise ConfigError("E_USAGE", where="qc", found="no scan", wanted="PATIENT, PATIENT/SCAN, --all or --passed")
    keys: list[ScanKey] = []
    for text in named:
        patient, _, index = text.partition("/")
        pseudonym = pseudonym_of(workspace, patient)
        found = [_key(r) for r in rows if r["pseudonym"] == pseudonym and index in ("", r["index"])]
        if not found:
            raise CohortError("E_PATIENT", where="prep/manifest.csv", found=f"no prepared scan {pseudonym}/{index}")
        keys += found
    return keys


def record(
    workspace: Workspace,
    keys: Sequence[ScanKey],
    decision: Literal["approve", "reject"],
    *,
    by: str,
    reason: str = "",
) -> int:
    """Write the decisions with name and time; returns how many."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return decide(workspace.prep, keys, decision, reviewer=by, time=now, reason=reason)


def write_sheet(workspace: Workspace) -> Path:
    """prep/contact_sheet.html: the picture of every prepared scan with its grade, numbers and decision."""
    figures = [_figure(workspace.prep / row["folder"], row) for row in review_rows(workspace) if row["content_sha256"]]
    body = "\n".join(figures) or "<p>no prepared scan</p>"
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Contact sheet</title>"
        f"<style>{_STYLE}</style><h1>Contact sheet</h1><p>Baseline blue, follow-up yellow: aligned tissue is grey. "
        f"Decide with <code>fourdvq-client qc approve PATIENT/SCAN</code>.</p>{body}</html>"
    )
    path = workspace.prep / "contact_sheet.html"
    write_atomic(path, page.encode())
    return path


def _figure(folder: Path, row: dict[str, str]) -> str:
    picture = folder / "qc.png"
    data = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
    facts = ", ".join(f"{name} {row[name]}" for name in ("grade", "code", "dice", "lung_ml", "decision") if row[name])
    caption = html.escape(f"{row['pseudonym']}/{row['index']}, day {row['days']}: {facts}")
    return (
        f'<figure class="{html.escape(row["grade"])}"><img alt="" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _key(row: dict[str, str]) -> ScanKey:
    return row["pseudonym"], int(row["index"])
