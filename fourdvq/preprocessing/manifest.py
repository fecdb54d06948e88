"""The manifest: the sum of the step records, rebuilt from them and never edited; and the check of all their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourdvq.data.prepared import MANIFEST_COLUMNS, write_json, write_table
from fourdvq.data.review import read_decisions
from fourdvq.preprocessing.records import DAMAGED, FORMAT, damaged, read_qc, read_record, records, remove_leftovers

_KEPT = (
    "pseudonym", "index", "days", "baseline", "status", "code", "grade", "content_sha256", "recipe_sha256",
    "profile_sha256",
)  # fmt: skip


@dataclass(frozen=True)
class DamagedScan:
    """A prepared scan whose bytes are not those that were written."""

    pseudonym: str
    index: int
    files: tuple[str, ...]  # or step.json, if the record itself cannot be trusted


def write_manifest(prep: Path) -> list[dict[str, Any]]:
    """Rebuild prep/manifest.csv and manifest.json from the step records; returns the rows, by pseudonym and index.

    Whoever calls holds a lock on the folder's tables. Files that did not change are not written.
    """
    decisions = read_decisions(prep)
    profiles: dict[str, Any] = {}
    rows = []
    for folder, record in records(prep):
        row = _row(prep, folder, record)
        row["decision"] = decisions.about(row)
        rows.append(row)
        profiles[record["profile_sha256"]] = record["profile"]
    rows.sort(key=lambda row: (row["pseudonym"], row["index"]))
    remove_leftovers(prep)
    write_table(prep / "manifest.csv", MANIFEST_COLUMNS, rows)
    only = next(iter(profiles)) if len(profiles) == 1 else ""
    head = {"format": FORMAT, "profile_sha256": only, "profile": profiles.get(only), "profiles": sorted(profiles)}
    write_json(prep / "manifest.json", head)
    return rows


def verify(prep: Path, pseudonyms: Iterable[str]) -> Iterator[list[DamagedScan]]:
    """Hash every file of the patients' scans; yields what is damaged, patient by patient, and marks its folder.

    A marked scan is out of the manifest once that is rebuilt, and the next preparation makes it again; a check that
    finds it whole, because somebody brought the file back, takes the mark away. A scan without a record is still to be
    made, and not damaged.
    """
    for pseudonym in pseudonyms:
        found = []
        for folder in sorted(p for p in (prep / pseudonym).glob("*") if p.name.isdigit()):
            if not (folder / "step.json").exists():
                continue
            record = read_record(folder)
            bad = ["step.json"] if record is None else damaged(folder, record)
            if bad:
                (folder / DAMAGED).touch()
                found.append(DamagedScan(pseudonym, int(folder.name), tuple(bad)))
            else:
                (folder / DAMAGED).unlink(missing_ok=True)
        yield found


def _row(prep: Path, folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    qc = read_qc(folder) if record["files"] else {}
    pair, scan = qc.get("pair") or {}, qc.get("scan") or {}
    spacing = record.get("spacing_mm") or (None, None, None)
    return {
        **{name: record[name] for name in _KEPT},
        "lung_ml": _round(scan.get("lung_ml"), 1),
        "left_right": _round(scan.get("left_right"), 3),
        "dice": _round(pair.get("dice"), 4),
        "ncc": _round(pair.get("ncc"), 4),
        "fold_percent": _round(pair.get("fold_percent"), 4),
        "spacing_z": spacing[0],
        "spacing_y": spacing[1],
        "spacing_x": spacing[2],
        "folder": folder.relative_to(prep).as_posix(),
    }


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
