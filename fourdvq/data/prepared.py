"""The tables of a prep folder: their columns, reading and atomic writing.

    manifest.csv   one row per scan, rebuilt from the step records    manifest.json  the profile it was made under
    review.csv     decisions, bound to the content they were made on  splits.csv     pseudonym, split
    clinical.csv   pseudonym, age, sex, smoking, time_days, event

Nothing here holds a real id, a date or a path outside the prep folder. docs/reference/data.md describes every column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fourdvq.data.files import csv_bytes, write_atomic
from fourdvq.errors import CohortError

MANIFEST_COLUMNS = (
    "pseudonym", "index", "days", "baseline", "status", "code", "grade", "decision", "lung_ml", "left_right", "dice",
    "ncc", "fold_percent", "spacing_z", "spacing_y", "spacing_x", "content_sha256", "recipe_sha256", "profile_sha256",
    "folder",
)  # fmt: skip
REVIEW_COLUMNS = ("pseudonym", "index", "decision", "reason", "reviewer", "time", "content_sha256", "recipe_sha256")
SPLIT_COLUMNS = ("pseudonym", "split")
CLINICAL_COLUMNS = ("pseudonym", "age", "sex", "smoking", "time_days", "event")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV atomically, unless it is there with these very bytes; None becomes an empty field."""
    write_changed(path, csv_bytes(columns, ([row.get(c) for c in columns] for row in rows)))


def write_changed(path: Path, data: bytes) -> bool:
    """Write a file atomically unless it holds `data` already; says whether it was written."""
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return False
    write_atomic(path, data)
    return True


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV of ours. Raises CohortError E_FILE if it is absent and E_COLUMN if a column is."""
    if not path.is_file():
        raise CohortError("E_FILE", where=str(path))
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [c for c in columns if c not in (reader.fieldnames or [])]
        if missing:
            raise CohortError("E_COLUMN", where=str(path), found="no column " + ", ".join(missing))
        return list(reader)


def read_splits(prep: Path) -> dict[str, str]:
    """Pseudonym to split; empty if no splits were written yet."""
    path = prep / "splits.csv"
    return {r["pseudonym"]: r["split"] for r in read_table(path, SPLIT_COLUMNS)} if path.exists() else {}


def write_splits(prep: Path, splits: Mapping[str, str]) -> None:
    """Write prep/splits.csv, sorted by pseudonym."""
    write_table(prep / "splits.csv", SPLIT_COLUMNS, ({"pseudonym": p, "split": s} for p, s in sorted(splits.items())))


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, sorted, atomic, written if it changed; NaN is an error."""
    write_changed(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
