"""Decisions about prepared scans: which scans a person means, and what is written down."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from fourdvq.data.prepared import MANIFEST_COLUMNS, read_table
from fourdvq.data.review import ScanKey, decide
from fourdvq.errors import CohortError, ConfigError
from fourdvq.preprocessing.records import forget
from fourdvq_client.preparation import pseudonym_of
from fourdvq_client.shards import tables_locked
from fourdvq_client.workspace import Workspace


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
    decision: Literal["approve", "reject", "redo"],
    *,
    by: str,
    reason: str = "",
) -> int:
    """Write the decisions with name and time, and bring the contact sheet up to them; returns how many."""
    from fourdvq_client.contact_sheet import write_sheet

    now = datetime.now(UTC).isoformat(timespec="seconds")
    with tables_locked(workspace):
        done = decide(workspace.prep, keys, decision, reviewer=by, time=now, reason=reason)
        write_sheet(workspace.prep)
    return done


def redo(workspace: Workspace, keys: Sequence[ScanKey], *, by: str, reason: str = "") -> int:
    """Take decisions back and have the scans, masks included, made again by the next `preprocess`."""
    done = record(workspace, keys, "redo", by=by, reason=reason)
    for pseudonym, index in keys:
        forget(workspace.prep / pseudonym / str(index), mask=True)
    return done


def _key(row: dict[str, str]) -> ScanKey:
    return row["pseudonym"], int(row["index"])
