"""What a person decided about a prepared scan. A decision holds for the content it was made on and lapses with it.

A rejection also holds for the same scan prepared in the same way (its recipe): another baseline changes the content,
but not what was wrong with the scan. The number of a scan plays no part, because an older export that turns up shifts
all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from fourdvq.data.prepared import MANIFEST_COLUMNS, REVIEW_COLUMNS, read_table, write_table
from fourdvq.errors import CohortError

Decision = Literal["approve", "reject", "redo", "auto", "demo"]
# auto: grade PASS under a site's own switch; demo: synthetic scans; redo takes any decision back.
APPROVING = frozenset({"approve", "auto", "demo"})
_FOR_EVERY_BASELINE = frozenset({"reject", "redo"})
ScanKey = tuple[str, int]  # pseudonym, index


class Decisions:
    """The decisions of a prep folder, `rows` in the order in which they were made."""

    def __init__(self, rows: Iterable[Mapping[str, str]] = ()) -> None:
        self._about_content: dict[tuple[str, str], tuple[int, str]] = {}
        self._about_recipe: dict[tuple[str, str], tuple[int, str]] = {}
        self._last_of_recipe: dict[tuple[str, str], str] = {}
        for number, row in enumerate(rows, start=1):
            content, recipe = (row["pseudonym"], row["content_sha256"]), (row["pseudonym"], row["recipe_sha256"])
            self._about_content[content] = (number, row["decision"])
            if row["decision"] in _FOR_EVERY_BASELINE:
                self._about_recipe[recipe] = (number, row["decision"])
            self._last_of_recipe[recipe] = row["decision"]

    def about(self, scan: Mapping[str, Any]) -> str:
        """The decision about a row of the manifest; empty if there is none, it has lapsed or was taken back.

        An approval that nobody looked at ends with the grade that it was given for.
        """
        if not scan["content_sha256"]:
            return ""
        none = (0, "")
        of_content = self._about_content.get((scan["pseudonym"], scan["content_sha256"]), none)
        of_recipe = self._about_recipe.get((scan["pseudonym"], scan["recipe_sha256"]), none)
        _, decision = max(of_content, of_recipe)
        lapsed = decision == "redo" or (decision == "auto" and scan["grade"] != "PASS")
        return "" if lapsed else decision

    def rejected(self) -> dict[str, frozenset[str]]:
        """The recipes that each patient's scans may not be used under, for `prepare_patient(rejected=...)`."""
        found: dict[str, set[str]] = {}
        for (pseudonym, recipe), decision in self._last_of_recipe.items():
            if decision == "reject":
                found.setdefault(pseudonym, set()).add(recipe)
        return {pseudonym: frozenset(recipes) for pseudonym, recipes in found.items()}


def read_decisions(prep: Path) -> Decisions:
    """What was decided so far."""
    path = prep / "review.csv"
    return Decisions(read_table(path, REVIEW_COLUMNS) if path.exists() else ())


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
    usable = {(r["pseudonym"], int(r["index"])): r for r in manifest if r["content_sha256"]}
    wanted = list(usable) if scans is None else list(scans)
    for pseudonym, index in wanted:
        if (pseudonym, index) not in usable:
            raise CohortError(
                "E_PATIENT", where=str(prep / "manifest.csv"), found=f"no prepared scan {pseudonym} {index}"
            )
    path = prep / "review.csv"
    history = read_table(path, REVIEW_COLUMNS) if path.exists() else []
    said = {"decision": decision, "reason": reason, "reviewer": reviewer, "time": time}
    rows = [*history, *({**usable[key], **said} for key in wanted)]
    write_table(path, REVIEW_COLUMNS, rows)
    decisions = Decisions(rows)
    for row in manifest:
        row["decision"] = decisions.about(row)
    write_table(prep / "manifest.csv", MANIFEST_COLUMNS, manifest)
    return len(wanted)


def approve(prep: Path, scans: Iterable[ScanKey] | None, *, reviewer: str, time: str, reason: str = "") -> int:
    """A person has seen the pictures and accepts the scans."""
    return decide(prep, scans, "approve", reviewer=reviewer, time=time, reason=reason)


def reject(prep: Path, scans: Iterable[ScanKey], *, reviewer: str, time: str, reason: str) -> int:
    """A person leaves the scans out; if one is a baseline, the next preparation must be told so (`rejected`)."""
    return decide(prep, scans, "reject", reviewer=reviewer, time=time, reason=reason)
