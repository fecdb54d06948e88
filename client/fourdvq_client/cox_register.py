"""Which survival analyses of which cohort began at this site, and how many more runs a person has allowed.

state/cox_register.json. The client adds what began; a person allows one more run with `survival allow-rerun`, also
while the client runs: each change is made to the file's present state, under a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fourdvq.survival.disclosure import RunRegister
from fourdvq.training.checkpoint import write_atomic
from fourdvq_client.audit import AuditLog, Entry
from fourdvq_client.workspace import flocked

FILE = "cox_register.json"


@dataclass(frozen=True)
class Begun:
    """An analysis that began: sha256 of its table and of the fold key, purpose, run, time and approved plan."""

    cohort: str
    key: str
    purpose: str
    run: str
    utc: str
    plan: str


@dataclass(frozen=True)
class _Content:
    begun: tuple[Begun, ...] = ()
    approvals: int = 0
    admitted: tuple[tuple[str, str], ...] = ()


class CoxRegister:
    """The register in a site's state folder."""

    def __init__(self, state: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = state / FILE
        self._clock = clock

    def read(self) -> RunRegister:
        """What the disclosure rules need of it."""
        content = self._read()
        claims = [(b.cohort, b.key, b.purpose, b.run) for b in content.begun]
        return RunRegister(claims, content.approvals, list(content.admitted))

    def begun(self) -> tuple[Begun, ...]:
        """Every analysis that began, oldest first."""
        return self._read().begun

    def keep(self, register: RunRegister, *, plan: str) -> None:
        """Add the claims and admissions that `register` got since it was read."""
        now = self._now()
        with self._locked() as content:
            new = [Begun(*claim, now, plan) for claim in register.claims[len(content.begun) :]]
            admitted = tuple(register.admitted[len(content.admitted) :])
            approvals = max(0, content.approvals - len(admitted))
            self._write(_Content((*content.begun, *new), approvals, (*content.admitted, *admitted)))

    def allow_one(self, audit: AuditLog, *, by: str, reason: str, policy: str) -> int:
        """One more run of the analyses that were begun; returns how many are allowed now.

        The log's line comes first: an approval that is not on record must not exist. Raises Refused E_AUDIT_LOG.
        """
        with self._locked() as content:
            audit.append(
                Entry("approve", kind="survival", decision=f"one more run, by {by}", rule=reason, policy=policy)
            )
            self._write(_Content(content.begun, content.approvals + 1, content.admitted))
            return content.approvals + 1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Content]:
        with flocked(self._path.with_suffix(".lock"), fcntl.LOCK_EX):
            yield self._read()

    def _read(self) -> _Content:
        if not self._path.is_file():
            return _Content()
        plain = json.loads(self._path.read_text(encoding="utf-8"))
        return _Content(
            tuple(Begun(**row) for row in plain["begun"]),
            int(plain["approvals"]),
            tuple((str(key), str(run)) for key, run in plain["admitted"]),
        )

    def _write(self, content: _Content) -> None:
        plain: dict[str, Any] = {
            "begun": [asdict(row) for row in content.begun],
            "approvals": content.approvals,
            "admitted": [list(pair) for pair in content.admitted],
        }
        write_atomic(self._path, (json.dumps(plain, indent=1) + "\n").encode())

    def _now(self) -> str:
        return self._clock().isoformat(timespec="seconds")
