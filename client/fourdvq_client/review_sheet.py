"""Decisions about prepared scans: which scans a person means, and what is written down."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from fourdvq.data.review import ScanKey, decide
from fourdvq.errors import CohortError, ConfigError
from fourdvq.preprocessing.records import forget
from fourdvq_client.preparation import pseudonym_of
from fourdvq_client.review_rows import SEEN_DIGITS, Row, review_rows, why_undecidable
from fourdvq_client.shards import tables_locked
from fourdvq_client.workspace import Workspace

_NAME = re.compile(r"(?P<patient>.*?)(?:/(?P<index>[0-9]+)(?:@(?P<content>\w*))?)?")


@dataclass(frozen=True)
class Choice:
    """The scans that a person means: those `named`, or `every` scan, or every one that `passed` (grade PASS).

    Raises ConfigError E_USAGE unless it is exactly one of the three: a name beside --all would be lost without a word.
    """

    named: tuple[str, ...] = ()  # PATIENT, PATIENT/SCAN or PATIENT/SCAN@CONTENT
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

    Raises CohortError E_PATIENT for an unknown patient or scan, E_NO_RESULT for one that has no result, E_CONTENT if a
    scan is named with another content than it has now; then nothing is recorded.
    """
    from fourdvq_client.contact_sheet import write_sheet

    now = datetime.now(UTC).isoformat(timespec="seconds")
    with tables_locked(workspace):
        meant = _meant(workspace, choice)
        chosen = [m.key for m in meant if decision != "approve" or m.itself or not m.decision]
        keys = list(dict.fromkeys(chosen))
        left = {m.key for m in meant if m.decision == "reject"}.difference(keys)
        decide(workspace.prep, keys, decision, reviewer=by, time=now, reason=reason)
        for pseudonym, index in keys if decision == "redo" else ():
            forget(workspace.prep / pseudonym / str(index), mask=True)
        write_sheet(workspace.prep)
    return Recorded(len(keys), len(left))


def _meant(workspace: Workspace, choice: Choice) -> list[_Meant]:
    rows = review_rows(workspace.prep)
    if choice.named:
        return [meant for text in choice.named for meant in _named(workspace, rows, text)]
    wanted = [r for r in rows if choice.every or r["grade"] == "PASS"]
    return [_meant_as(r, itself=False) for r in wanted if r["content_sha256"]]


def _named(workspace: Workspace, rows: list[Row], text: str) -> list[_Meant]:
    match = _NAME.fullmatch(text)
    patient, number, content = match.groups() if match else (text, None, None)
    pseudonym, index = pseudonym_of(workspace, patient), None if number is None else int(number)
    found = [r for r in rows if r["pseudonym"] == pseudonym and index in (None, int(r["index"]))]
    ready = [r for r in found if r["content_sha256"]]
    if not ready:
        raise why_undecidable(workspace.prep, found, pseudonym, index)
    if content is not None and not _is_content(content, ready[0]):
        raise CohortError("E_CONTENT", where="prep/manifest.csv", found=text)
    return [_meant_as(r, itself=index is not None) for r in ready]


def _is_content(given: str, row: Row) -> bool:
    return len(given) >= SEEN_DIGITS and row["content_sha256"].startswith(given)


def _meant_as(row: Row, *, itself: bool) -> _Meant:
    return _Meant((row["pseudonym"], int(row["index"])), row["decision"], itself)
