"""The tables of the whole cohort, written by whoever ends: names, splits, clinical rows, manifest, contact sheet.

Several shards may end at once: each holds the tables' lock, and writes what the records on disk say. What depends on
all patients (the splits) is written once every patient has been prepared, so that no order of ends can change it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fourdvq.data.cohort import Cohort, write_clinical
from fourdvq.data.files import csv_bytes
from fourdvq.data.prepared import read_splits, write_splits
from fourdvq.data.review import decide
from fourdvq.data.splits import SplitPatient, assign_splits
from fourdvq.preprocessing.manifest import write_manifest
from fourdvq_client.contact_sheet import write_sheet
from fourdvq_client.shards import Shard, tables_locked
from fourdvq_client.site_secret import NAME_COLUMNS, real_ids, site_secret
from fourdvq_client.workspace import Workspace, write_private

_LEFT_OUT = ".left-out"  # below the depth at which prepared scans are looked for


@dataclass(frozen=True)
class Finished:
    """What was written: patients by split, approved scans, scans that other shards still owe, the contact sheet."""

    splits: dict[str, int]
    auto_approved: int
    waiting: int
    contact_sheet: Path


def finish_tables(
    workspace: Workspace, cohort: Cohort, names: Mapping[str, str], *, whole: bool, auto_approve: bool
) -> Finished:
    """Bring all tables up to the records on disk; `names` are pseudonyms by patient id, `whole` says there is no shard.

    `auto_approve` approves scans of grade PASS about which nobody decided yet.
    """
    prep = workspace.prep
    with tables_locked(workspace):
        write_clinical(prep, cohort.usable, names)
        rows = write_manifest(prep)
        waiting = 0 if whole else _waiting(cohort, names, rows)
        splits = _splits(workspace, cohort, names, rows) if waiting == 0 else read_splits(prep)
        approved = _auto_approve(prep, rows) if auto_approve else 0
        sheet = write_sheet(prep)
    present = {row["pseudonym"] for row in rows if row["content_sha256"]}
    counts = Counter(split for pseudonym, split in splits.items() if pseudonym in present)
    return Finished(dict(counts), approved, waiting, sheet)


def write_names(workspace: Workspace, names: Mapping[str, str]) -> None:
    """The table of all patients ever seen: a name once given is never forgotten. Needs the tables' lock."""
    known = {real: pseudonym for pseudonym, real in real_ids(workspace).items()} | dict(names)
    data = csv_bytes(NAME_COLUMNS, sorted(known.items()))
    if not workspace.patients.is_file() or workspace.patients.read_bytes() != data:
        write_private(workspace.patients, data)


def set_apart_others(workspace: Workspace, present: set[str], shard: Shard) -> None:
    """Move prepared patients that are no longer in the tables out of what training reads, and back if they return.

    Not deleted: a table that was saved half would cost days of work. Only the shard's own patients are touched.
    """
    apart = workspace.prep / _LEFT_OUT
    for folder in [p for p in workspace.prep.glob("*") if p.is_dir() and p.name != _LEFT_OUT and shard.has(p.name)]:
        if folder.name not in present:
            apart.mkdir(exist_ok=True)
            shutil.rmtree(apart / folder.name, ignore_errors=True)
            folder.rename(apart / folder.name)
    for folder in apart.glob("*") if apart.is_dir() else ():
        if folder.name in present and shard.has(folder.name) and not (workspace.prep / folder.name).exists():
            folder.rename(workspace.prep / folder.name)


def _waiting(cohort: Cohort, names: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> int:
    """How many scans of the cohort have no record yet."""
    scans = Counter(s.patient_id for s in cohort.scans)
    wanted = sum(scans[p.patient_id] for p in cohort.usable)
    mine = {names[p.patient_id] for p in cohort.usable}
    return max(0, wanted - sum(row["pseudonym"] in mine for row in rows))


def _splits(
    workspace: Workspace, cohort: Cohort, names: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Give every prepared patient a split; those who have one keep it."""
    prepared = Counter(row["pseudonym"] for row in rows if row["content_sha256"])
    patients = [
        SplitPatient(names[p.patient_id], prepared[names[p.patient_id]], p.event == "death")
        for p in cohort.usable
        if prepared[names[p.patient_id]]
    ]
    existing = read_splits(workspace.prep)
    if all(p.pseudonym in existing for p in patients):
        return existing
    from fourdvq_client.split_shares import split_shares

    assigned = assign_splits(
        patients, key=site_secret(workspace), shares=split_shares(workspace), existing=existing
    )  # fmt: skip
    write_splits(workspace.prep, assigned)
    return assigned


def _auto_approve(prep: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    passed = [(r["pseudonym"], r["index"]) for r in rows if r["grade"] == "PASS" and not r["decision"]]
    if not passed:
        return 0
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return decide(prep, passed, "auto", reviewer="--auto-approve-pass", time=now)
