"""The manifest as a person reviews it: which scans can be decided about, and why one cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fourdvq.data.prepared import MANIFEST_COLUMNS, read_table
from fourdvq.errors import CohortError, explain
from fourdvq.preprocessing.records import DAMAGED

Row = dict[str, str]
GRADES = ("PASS", "REVIEW", "FAIL")
SEEN_DIGITS = 8  # of content_sha256: enough to tell what a person looked at from what the scan is now
REDO = "redo"  # status of a scan whose record was taken away, so that the next `preprocess` makes it again
_NO_RESULT = dict.fromkeys(("grade", "code", "decision", "content_sha256"), "")
_RETRY = {"refused": "fourdvq-client preprocess", "failed": "fourdvq-client preprocess --retry-failed"}


def review_rows(prep: Path) -> list[Row]:
    """The manifest's rows; a scan that is to be made again has status redo, and nothing to decide about.

    Raises CohortError E_FILE before the first preparation.
    """
    rows = read_table(prep / "manifest.csv", MANIFEST_COLUMNS)
    return [row if _is_made(prep / row["folder"]) else {**row, **_NO_RESULT, "status": REDO} for row in rows]


def undecided(row: Row) -> bool:
    """Whether a scan waits for a decision."""
    return bool(row["content_sha256"]) and not row["decision"]


def why_undecidable(prep: Path, rows: Sequence[Row], pseudonym: str, index: int | None) -> CohortError:
    """What to tell a person who names a scan (`index` None: a patient) of which the manifest has these `rows` at most.

    None of the rows has a result.
    """
    if rows:
        return _no_result(rows[0])
    name = pseudonym if index is None else f"{pseudonym}/{index}"
    folder = prep / name
    if index is None or not folder.is_dir():
        return CohortError("E_PATIENT", where="prep/manifest.csv", found=f"no prepared scan {name}")
    # The manifest, rebuilt since, leaves both out: what was found damaged, and what somebody wants made again.
    state = "is damaged" if _is_made(folder) or (folder / DAMAGED).exists() else "is to be made again"
    return CohortError("E_NO_RESULT", where="prep/manifest.csv", found=f"{name} {state}")


def _no_result(row: Row) -> CohortError:
    name, code = f"{row['pseudonym']}/{row['index']}", row["code"]
    if row["status"] == REDO:
        return CohortError("E_NO_RESULT", where="prep/manifest.csv", found=f"{name} is to be made again")
    found = f"{name} {row['status']}: {code} {explain(code).title}"
    fix = f"{explain(code).fix}; then {_RETRY[row['status']]}"
    return CohortError("E_NO_RESULT", where="prep/manifest.csv", found=found, fix=fix)


def _is_made(folder: Path) -> bool:
    return (folder / "step.json").exists()
