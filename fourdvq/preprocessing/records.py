"""Step records: what was made from what, under which key, and whether it is still there; the manifest is their sum.

    prep/<pseudonym>/<index>/hu.npy  mask.npy  qc.png  qc.json  step.json

`step.json` is written last and removed first, so a folder with one is complete. No clock, path, date or id is in it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fourdvq.config import sha256_of, to_plain
from fourdvq.data.files import write_atomic
from fourdvq.data.prepared import MANIFEST_COLUMNS, write_json, write_table
from fourdvq.data.review import read_decisions, valid_decision
from fourdvq.preprocessing.profile import Profile

FORMAT = 1
Status = Literal["ok", "review", "refused", "failed"]


@dataclass(frozen=True)
class ScanResult:
    """What became of one scan. `detail` is for people at the site: it may name a path."""

    index: int
    days: int
    status: Status
    code: str
    grade: str
    qc: dict[str, Any] = field(default_factory=dict)
    content_sha256: str = ""
    baseline: int | None = None
    codes: tuple[str, ...] = ()
    reused: bool = False
    detail: str = ""


@dataclass(frozen=True)
class PatientResult:
    """What became of a patient's scans, in time order."""

    pseudonym: str
    scans: tuple[ScanResult, ...]


def read_key(source_sha256: str, profile: Profile) -> str:
    """Identity of a scan as read, segmented and checked."""
    versions = profile.step_versions
    parts = [source_sha256, "read", versions.intake, versions.segment, profile.segmentation, profile.limits]
    return sha256_of([to_plain(p) for p in parts])


def output_key(scan_key: str, profile: Profile, baseline_key: str | None) -> str:
    """Identity of a scan on the target grid: of a baseline (`baseline_key` None), or of a follow-up on its baseline."""
    versions = profile.step_versions
    parts: list[Any] = [scan_key, "resample", versions.resample, profile.grid, profile.fov, profile.resample]
    if baseline_key is not None:
        parts += [baseline_key, "register", versions.register, profile.registration, profile.outside_lung]
    return sha256_of([to_plain(p) for p in parts])


def read_record(folder: Path) -> dict[str, Any] | None:
    """The step record of a scan folder, or None if there is none that can be read."""
    try:
        record = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def is_intact(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the files that a record promises are there with their sizes; a refused scan promises none."""
    sizes = record.get("sizes", {})
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def write_outputs(folder: Path, hu: np.ndarray, mask: np.ndarray, picture: bytes) -> dict[str, Any]:
    """Write the arrays and the picture; returns the part of the record that describes them."""
    (folder / "step.json").unlink(missing_ok=True)
    packed = np.packbits(mask)
    write_atomic(folder / "hu.npy", _npy(hu))
    write_atomic(folder / "mask.npy", _npy(packed))
    write_atomic(folder / "qc.png", picture)
    digest = hashlib.sha256()
    digest.update(np.ascontiguousarray(hu).tobytes())
    digest.update(packed.tobytes())
    sizes = {name: (folder / name).stat().st_size for name in ("hu.npy", "mask.npy", "qc.png")}
    return {"content_sha256": digest.hexdigest(), "sizes": sizes}


def write_record(folder: Path, record: dict[str, Any], qc: dict[str, Any]) -> None:
    """Write qc.json, then step.json, which makes the folder complete."""
    write_json(folder / "qc.json", qc)
    write_json(folder / "step.json", record)


def result_of(folder: Path, record: dict[str, Any], *, reused: bool) -> ScanResult:
    """The result that a record stands for."""
    try:
        qc = json.loads((folder / "qc.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        qc = {}
    return ScanResult(
        index=record["index"],
        days=record["days"],
        status=record["status"],
        code=record["code"],
        grade=record["grade"],
        qc=qc,
        content_sha256=record.get("content_sha256", ""),
        baseline=record["baseline"],
        codes=tuple(record["codes"]),
        reused=reused,
    )


def write_manifest(prep: Path, rows: Sequence[PatientResult] | None = None) -> int:
    """Rebuild prep/manifest.csv and manifest.json from the step records; returns the number of rows.

    `rows` are the results of a run: a scan of theirs that left no record (its worker died, a disk error) gets a row of
    status `failed`, so that it is not forgotten.
    """
    decisions = read_decisions(prep)
    table: dict[tuple[str, int], dict[str, Any]] = {}
    profiles: dict[str, Any] = {}
    for folder, record in _records(prep):
        row = _manifest_row(prep, folder, record)
        key = (row["pseudonym"], row["index"])
        row["decision"] = valid_decision(decisions, key, row["content_sha256"])
        table[key] = row
        profiles[record["profile_sha256"]] = record["profile"]
    for key, row in _failed_rows(rows or ()):
        table.setdefault(key, row)
    write_table(prep / "manifest.csv", MANIFEST_COLUMNS, [table[key] for key in sorted(table)])
    only = next(iter(profiles)) if len(profiles) == 1 else ""
    head = {"format": FORMAT, "profile_sha256": only, "profile": profiles.get(only), "profiles": sorted(profiles)}
    write_json(prep / "manifest.json", head)
    return len(table)


def _records(prep: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(prep.glob("*/*/step.json")):
        record = read_record(path.parent)
        if record is not None and is_intact(path.parent, record):
            yield path.parent, record


def _manifest_row(prep: Path, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    qc = result_of(folder, record, reused=True).qc
    pair = qc.get("pair") or {}
    spacing = record.get("spacing_mm") or (None, None, None)
    return {
        "pseudonym": record["pseudonym"],
        "index": record["index"],
        "days": record["days"],
        "baseline": record["baseline"],
        "status": record["status"],
        "code": record["code"],
        "grade": record["grade"],
        "lung_ml": _round((qc.get("scan") or {}).get("lung_ml"), 1),
        "left_right": _round((qc.get("scan") or {}).get("left_right"), 3),
        "dice": _round(pair.get("dice"), 4),
        "ncc": _round(pair.get("ncc"), 4),
        "fold_percent": _round(pair.get("fold_percent"), 4),
        "spacing_z": spacing[0],
        "spacing_y": spacing[1],
        "spacing_x": spacing[2],
        "content_sha256": record.get("content_sha256", ""),
        "profile_sha256": record["profile_sha256"],
        "folder": folder.relative_to(prep).as_posix(),
    }


def _failed_rows(rows: Iterable[PatientResult]) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    for patient in rows:
        for scan in patient.scans:
            if scan.status == "failed":
                key = (patient.pseudonym, scan.index)
                values = {"days": scan.days, "status": scan.status, "code": scan.code, "content_sha256": ""}
                yield key, {"pseudonym": patient.pseudonym, "index": scan.index, **values}


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _npy(array: np.ndarray) -> bytes:
    """The .npy form in memory: numpy's own writing to a full disk loses the reason."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
