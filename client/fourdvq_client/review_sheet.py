"""Decisions about prepared scans: which scans a person means, and what is written down."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from fourdvq.data.prepared import MANIFEST_COLUMNS, read_table
from fourdvq.data.review import ScanKey, decide
from fourdvq.errors import CohortError, ConfigError
from fourdvq.preprocessing.records import forget
from fourdvq_client.preparation import pseudonym_of
from fourdvq_client.shards import tables_locked
from fourdvq_client.workspace import Workspace

Row = dict[str, str]


@dataclass(frozen=True)
class Choice:
    """The scans that a person means: those `named`, or `every` scan, or every one that `passed` (grade PASS).

    Raises ConfigError E_USAGE unless it is exactly one of the three: a name beside --all would be lost without a word.
    """

    named: tuple[str, ...] = ()  # PATIENT or PATIENT/SCAN
    every: bool = False
    passed: bool = False

    def __post_init__(self) -> None:
        ways = ((" ".join(self.named), bool(self.named)), ("--all", self.every), ("--passed", self.passed))
        given = [words for words, holds in ways if holds]
        if len(given) != 1:
            found, wanted = " with ".join(given) or "no scan", "PATIENT and PATIENT/SCAN, or --all, or --passed"
            raise ConfigError("E_USAGE", where="qc", found=found, wanted=wanted)


@dataclass(frozen=True)
class Recorded:
    """How many scans were decided about, and how many rejected ones were left as they are."""

    decided: int
    left: int


class _Meant(NamedTuple):
    key: ScanKey
    decision: str  # up to now
    itself: bool  # named by its own number, not as one of many


def review_rows(workspace: Workspace) -> list[Row]:
    """The manifest's rows. Raises CohortError E_FILE before the first preparation."""
    return read_table(workspace.prep / "manifest.csv", MANIFEST_COLUMNS)


def record(
    workspace: Workspace,
    choice: Choice,
    decision: Literal["approve", "reject", "redo"],
    *,
    by: str,
    reason: str = "",
) -> Recorded:
    """Write the decisions with name and time, and bring the contact sheet up to them.

    Approving many at once decides about undecided scans only: a person who rejected one named it, and must name it to
    take that back. `redo` takes decisions back and has the scans, masks included, made again by the next `preprocess`.
    Raises CohortError E_PATIENT for an unknown patient or scan; then nothing is recorded.
    """
    from fourdvq_client.contact_sheet import write_sheet

    now = datetime.now(UTC).isoformat(timespec="seconds")
    with tables_locked(workspace):
        meant = _meant(workspace, choice)
        chosen = [m.key for m in meant if decision != "approve" or m.itself or not m.decision]
        keys = list(dict.fromkeys(chosen))
        left = {m.key for m in meant if m.decision == "reject"}.difference(keys)
        decide(workspace.prep, keys, decision, reviewer=by, time=now, reason=reason)
        write_sheet(workspace.prep)
    if decision == "redo":
        for pseudonym, index in keys:
            forget(workspace.prep / pseudonym / str(index), mask=True)
    return Recorded(len(keys), len(left))


def _meant(workspace: Workspace, choice: Choice) -> list[_Meant]:
    rows = [r for r in review_rows(workspace) if r["content_sha256"]]
    if not choice.named:
        return [_meant_as(r, itself=False) for r in rows if choice.every or r["grade"] == "PASS"]
    return [meant for text in choice.named for meant in _named(workspace, rows, text)]


def _named(workspace: Workspace, rows: list[Row], text: str) -> list[_Meant]:
    patient, _, index = text.partition("/")
    pseudonym = pseudonym_of(workspace, patient)
    found = [r for r in rows if r["pseudonym"] == pseudonym and index in ("", r["index"])]
    if not found:
        raise CohortError("E_PATIENT", where="prep/manifest.csv", found=f"no prepared scan {pseudonym}/{index}")
    return [_meant_as(r, itself=bool(index)) for r in found]


def _meant_as(row: Row, *, itself: bool) -> _Meant:
    return _Meant((row["pseudonym"], int(row["index"])), row["decision"], itself)
