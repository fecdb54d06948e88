"""audit.jsonl: what this site accepted, released and refused, as a hash-chained log that can only grow.

Each line holds the hash of the line before, so edits, deletions and reorderings show; cutting lines off the end shows
because every reply carries the head of its time, and the coordinator keeps it. A site that rewrites its whole log
together with the coordinator is not detected.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fourdvq.config import canonical_json
from fourdvq.errors import Refused

Action = Literal["accept", "release", "refuse", "approve", "reserve", "commit", "override", "start", "stop"]


@dataclass(frozen=True)
class Entry:
    """What a line says; the log adds `seq`, `utc`, `prev_hash` and `hash`. `patients` is a bucket, never a count."""

    action: Action
    kind: str = ""
    decision: str = ""
    rule: str = ""
    run: str = ""
    round: int = 0
    task_id: str = ""
    payload_sha256: str = ""
    bytes: int = 0
    patients: str = ""
    plan: str = ""
    code: str = ""
    policy: str = ""
    ledger_head: str = ""
    eps_after: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: `first_bad` is the seq of the first line that breaks the chain, None if it is sound."""

    lines: int
    head: str
    first_bad: int | None
    reason: str = ""


class AuditLog:
    """Appends lines, each written in one piece and forced to the disk before the caller goes on.

    Opening drops a last line without its end (a crash in the middle of a write) and says so in the next line. Another
    process may append between our lines (`approve` while `join` runs): each append takes the file's lock and goes on
    from the line that is last then. Raises Refused E_AUDIT_LOG if the chain is broken: nothing may leave a site whose
    log is not sound.
    """

    def __init__(self, path: Path, site_fingerprint: str, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)):
        self.path = path
        self._clock = clock
        self._lock = threading.Lock()
        torn = _drop_torn_line(path)
        verdict = verify(path, site_fingerprint)
        if verdict.first_bad is not None:
            raise _broken(path, verdict.first_bad, verdict.reason)
        self._seq, self._head = verdict.lines, verdict.head
        self._size = path.stat().st_size if path.is_file() else 0
        if torn:
            self.append(Entry("start", rule="a torn last line was dropped"))

    @property
    def head(self) -> str:
        """Hash of the last line, or of the site's fingerprint while the log is empty."""
        return self._head

    def append(self, entry: Entry, *, after: str | None = None) -> str:
        """Write one line and return its hash; `after` is the head that must still be the last.

        Raises Refused E_AUDIT_LOG if the line cannot be written, or if another line came after `after`.
        """
        with self._lock, self._opened() as handle:
            self._catch_up(handle)
            if after is not None and after != self._head:
                raise _broken(self.path, self._seq, "another process wrote a line at this very moment")
            body = {
                **asdict(entry),
                "seq": self._seq,
                "utc": self._clock().isoformat(timespec="milliseconds"),
                "prev_hash": self._head,
            }
            digest = _digest(body)
            line = (canonical_json({**body, "hash": digest}) + "\n").encode()
            self._write(handle, line)
            self._seq, self._head, self._size = self._seq + 1, digest, self._size + len(line)
            return digest

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)

    def _catch_up(self, handle: int) -> None:
        """Take in the lines that others wrote since our last."""
        size = os.fstat(handle).st_size
        if size < self._size:
            raise _broken(self.path, self._seq, "lines were cut off while the client ran")
        for text in os.pread(handle, size - self._size, self._size).decode().splitlines():
            reason = _wrong(text, self._seq, self._head)
            if reason:
                raise _broken(self.path, self._seq, reason)
            self._seq, self._head = self._seq + 1, str(json.loads(text)["hash"])
        self._size = size

    def _write(self, handle: int, line: bytes) -> None:
        try:
            if os.write(handle, line) != len(line):
                raise OSError("short write")
            os.fsync(handle)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> Refused:
        return Refused("E_AUDIT_LOG", where=str(self.path), found=type(error).__name__)


def first_hash(site_fingerprint: str) -> str:
    """What stands before the first line: no two sites have the same chain."""
    return hashlib.sha256(("fourdvq-audit-1" + site_fingerprint).encode()).hexdigest()


def verify(path: Path, site_fingerprint: str, *, head: str | None = None) -> Verdict:
    """Check every line; `head` is a hash that someone else remembers and that must therefore be in the chain."""
    previous, seq = first_hash(site_fingerprint), 0
    seen = {previous}
    for seq, text in enumerate(_lines(path)):
        reason = _wrong(text, seq, previous)
        if reason:
            return Verdict(seq, previous, seq, reason)
        previous = str(json.loads(text)["hash"])
        seen.add(previous)
    count = len(seen) - 1
    if head is not None and head not in seen:
        return Verdict(count, previous, count, "the line with the remembered hash is gone: lines were cut off")
    return Verdict(count, previous, None)


def read_entries(path: Path, *, run: str | None = None) -> list[dict[str, Any]]:
    """The lines as plain values, oldest first; of one run if named."""
    entries = [json.loads(text) for text in _lines(path)]
    return [e for e in entries if run is None or e["run"] == run]


def bucket(count: int, min_cell: int) -> str:
    """A count as it may be written down: `<5`, or the multiple of `min_cell` at or below it with a plus sign."""
    if count <= 0:
        return "0"
    return f"<{min_cell}" if count < min_cell else f"{count // min_cell * min_cell}+"


def _wrong(text: str, seq: int, previous: str) -> str:
    try:
        line = json.loads(text)
        stated = line.pop("hash")
    except (ValueError, KeyError, AttributeError, TypeError):
        return "not a line of this log"
    if _digest(line) != stated:
        return "the line was edited"
    if line.get("prev_hash") != previous or line.get("seq") != seq:
        return "a line before it was removed, added or moved"
    return ""


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                yield line.rstrip("\n")


def _broken(path: Path, seq: int, reason: str) -> Refused:
    return Refused("E_AUDIT_LOG", where=f"{path} line {seq}", found=reason)


def _drop_torn_line(path: Path) -> bool:
    if not path.is_file():
        return False
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return False
    with path.open("r+b") as stream:
        stream.truncate(data.rfind(b"\n") + 1)
        os.fsync(stream.fileno())
    return True
