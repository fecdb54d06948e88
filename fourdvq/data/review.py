"""What a person decided about a prepared scan. A decision holds for the content it was made on and lapses with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from fourdvq.data.prepared import MANIFEST_COLUMNS, REVIEW_COLUMNS, read_table, write_table
from fourdvq.errors import CohortError

Decision = Literal["approve", "reject", "redo", "auto", "demo"]
# auto: grade PASS under a site's own switch; demo: synthetic scans; redo takes any decision back.
APPROVING = frozenset({"approve", "auto", "demo"})
ScanKey = tuple[str, int]  # pseudonym, index


def read_decisions(prep: Path) -> dict[ScanKey, tuple[str, str]]:
    """The last decision per scan, and the content sha256 that it was made on; empty if nobody decided yet."""
    path = prep / "review.csv"
    rows = read_table(path, REVIEW_COLUMNS) if path.exists() else []
    return {(r["pseudonym"], int(r["index"])): (r["decision"], r["content_sha256"]) for r in rows}


def decide(
    prep: Path,
    scans: Iterable[ScanKey] | None,
    decision: Decision,
    *,
    reviewer: str,
    time: str,
    reason: str = "",
) -> int:
    """Record one decision for the given scans (None: every prepared scan) and return how many.

    Decisions are appended, so the history stays. `time` is the caller's, in ISO form. The manifest's decision column is
    brought up to date. Raises CohortError E_PATIENT for a scan that is not in the manifest or was refused.
    """
    manifest = read_table(prep / "manifest.csv", MANIFEST_COLUMNS)
    usable = {(r["pseudonym"], int(r["index"])): r["content_sha256"] for r in manifest if r["content_sha256"]}
    wanted = list(usable) if scans is None else list(scans)
    for pseudonym, index in wanted:
        if (pseudonym, index) not in usable:
            raise CohortError(
                "E_PATIENT", where=str(prep / "manifest.csv"), found=f"no prepared scan {pseudonym} {index}"
            )
    path = prep / "review.csv"
    history = read_table(path, REVIEW_COLUMNS) if path.exists() else []
    rows = [(p, i, decision, reason, reviewer, time, usable[p, i]) for p, i in wanted]
    new = [dict(zip(REVIEW_COLUMNS, row, strict=True)) for row in rows]
    write_table(path, REVIEW_COLUMNS, [*history, *new])
    decisions = read_decisions(prep)
    for row in manifest:
        row["decision"] = valid_decision(decisions, (row["pseudonym"], int(row["index"])), row["content_sha256"])
    write_table(prep / "manifest.csv", MANIFEST_COLUMNS, manifest)
    return len(wanted)


def approve(prep: Path, scans: Iterable[ScanKey] | None, *, reviewer: str, time: str, reason: str = "") -> int:
    """A person has seen the pictures and accepts the scans."""
    return decide(prep, scans, "approve", reviewer=reviewer, time=time, reason=reason)


def reject(prep: Path, scans: Iterable[ScanKey], *, reviewer: str, time: str, reason: str) -> int:
    """A person leaves the scans out; if one is a baseline, the next `prepare_patient` must be told so (`excluded`)."""
    return decide(prep, scans, "reject", reviewer=reviewer, time=time, reason=reason)


def valid_decision(decisions: dict[ScanKey, tuple[str, str]], scan: ScanKey, content_sha256: str) -> str:
    """The decision about this very content, or an empty text if there is none, it has lapsed or was taken back."""
    decision, content = decisions.get(scan, ("", ""))
    return decision if decision != "redo" and content and content == content_sha256 else ""


def rejected_by_patient(prep: Path) -> dict[str, frozenset[int]]:
    """Indices of the rejected scans of each patient who has one, for `prepare_patient(excluded=...)`."""
    found: dict[str, set[int]] = {}
    for (pseudonym, index), (decision, _) in read_decisions(prep).items():
        if decision == "reject":
            found.setdefault(pseudonym, set()).add(index)
    return {pseudonym: frozenset(indices) for pseudonym, indices in found.items()}
