"""The tables of a prep folder: their columns, reading and atomic writing.

    manifest.csv   one row per scan, rebuilt from the step records    manifest.json  the profile it was made under
    review.csv     decisions, bound to the content they were made on  splits.csv     pseudonym, split
    clinical.csv   pseudonym, age, sex, smoking, time_days, event

Nothing here holds a real id, a patient's date or a path outside the prep folder; free text and a time, that of the
decision, are in review.csv alone. docs/reference/data.md describes every column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fourdvq.data.files import csv_bytes, json_bytes, write_atomic
from fourdvq.data.tables import read_lines
from fourdvq.errors import CohortError

MANIFEST_COLUMNS = (
    "pseudonym", "index", "days", "baseline", "status", "code", "grade", "decision", "lung_ml", "left_right", "dice",
    "ncc", "fold_percent", "spacing_z", "spacing_y", "spacing_x", "content_sha256", "recipe_sha256", "profile_sha256",
    "folder",
)  # fmt: skip
REVIEW_COLUMNS = ("pseudonym", "index", "decision", "reason", "reviewer", "time", "content_sha256", "recipe_sha256")
SPLIT_COLUMNS = ("pseudonym", "split")
CLINICAL_COLUMNS = ("pseudonym", "age", "sex", "smoking", "time_days", "event")

MADE_AGAIN = "`fourdvq-client preprocess` makes it again"
_RESTORE = "mend the row, or restore the file from a backup"
_REMEDIES = {
    "manifest.csv": MADE_AGAIN,
    "clinical.csv": MADE_AGAIN,
    "review.csv": f"{_RESTORE}; if it is removed, every scan is to be decided about anew",
    "splits.csv": f"{_RESTORE}; if it is removed, patients may move to another split",
    "patients.csv": f"{_RESTORE}; if it is removed, `fourdvq-client preprocess` writes it for the patients of today",
}
_NUMBERS: dict[str, Callable[[str], object]] = {
    "index": int, "days": int, "baseline": int, "spacing_z": float, "spacing_y": float, "spacing_x": float,
    "age": float, "smoking": int, "time_days": int,
}  # fmt: skip
_NEVER_EMPTY = frozenset({"index", "days", "baseline", "split"})
_WORDS = {
    "decision": ("approve", "reject", "redo", "auto", "demo"),
    "split": ("train", "validation", "test"),
}


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
    """Rows of a CSV of ours, also after a spreadsheet has saved it: with a byte-order mark, semicolons or blank rows.

    Raises CohortError with the row and a remedy for this very file: E_FILE if it is absent, E_COLUMN if a column is,
    E_TABLE for bytes that are no text, a row that is cut short, and a field that cannot be what it should be; and what
    `from_os` says of a file that cannot be read.
    """
    fix = _REMEDIES.get(path.name, "")
    lines = read_lines(path, fix=fix)
    missing = [c for c in columns if c not in lines.names]
    if missing:
        found, wanted = "no column " + ", ".join(missing), ", ".join(columns)
        raise CohortError("E_COLUMN", where=str(path), found=found, wanted=wanted, fix=fix)
    rows = []
    for number, fields in lines.rows:
        row = dict(zip(lines.names, fields, strict=False))
        wrong = _fault(row, lines.names)
        if wrong:
            raise CohortError("E_TABLE", where=f"{path.name} row {number}", found=wrong, fix=fix)
        rows.append(row)
    return rows


def read_splits(prep: Path) -> dict[str, str]:
    """Pseudonym to split; empty if no splits were written yet."""
    path = prep / "splits.csv"
    return {r["pseudonym"]: r["split"] for r in read_table(path, SPLIT_COLUMNS)} if path.exists() else {}


def write_splits(prep: Path, splits: Mapping[str, str]) -> None:
    """Write prep/splits.csv, sorted by pseudonym."""
    write_table(prep / "splits.csv", SPLIT_COLUMNS, ({"pseudonym": p, "split": s} for p, s in sorted(splits.items())))


def _fault(row: Mapping[str, str], names: Sequence[str]) -> str:
    """What is wrong with a row, without its content; empty if nothing is."""
    if len(row) < len(names):
        return f"{len(row)} fields, the header has {len(names)}"
    return next((f"column {name}" for name in names if not _possible(name, row[name])), "")


def _possible(column: str, text: str) -> bool:
    if not text:
        return column not in _NEVER_EMPTY
    if column in _WORDS:
        return text in _WORDS[column]
    try:
        _NUMBERS.get(column, str)(text)
    except ValueError:
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, sorted, atomic, written if it changed; NaN is an error."""
    write_changed(path, json_bytes(value))
