"""Parts of a cohort that are prepared by several runs at once, in one site folder: which patients, and the locks.

state/lock                 exclusive for a whole run (and for join), shared by all shards
state/shards/3-of-8.lock   exclusive for one shard
state/shards/tables.lock   exclusive while tables of the whole cohort are written; waited for
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fourdvq.errors import ConfigError, TemporaryStop
from fourdvq_client.workspace import PRIVATE_FILE, Workspace, locked

_FORM = re.compile(r"(\d{1,4})/(\d{1,4})")


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `of` parts. A patient's part depends on the pseudonym alone."""

    number: int = 1
    of: int = 1

    @property
    def whole(self) -> bool:
        """Whether this is all of the cohort."""
        return self.of == 1

    def has(self, pseudonym: str) -> bool:
        """Whether a patient belongs to this part."""
        digest = hashlib.sha256(f"shard {pseudonym}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.number - 1


WHOLE = Shard()


def parse_shard(text: str) -> Shard:
    """`3/8` as a shard; an empty text is the whole cohort. Raises ConfigError E_USAGE."""
    if not text:
        return WHOLE
    match = _FORM.fullmatch(text)
    number, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= of:
        fix = "--shard 1/4 to --shard 4/4, or --shard $SLURM_ARRAY_TASK_ID/4 with --array=1-4"
        raise ConfigError("E_USAGE", where="--shard", found=text, wanted="I/N with I from 1 to N", fix=fix)
    return Shard(number, of)


@contextlib.contextmanager
def preparing(workspace: Workspace, shard: Shard) -> Iterator[None]:
    """Hold the folder, or this shard of it. Raises TemporaryStop E_BUSY if another run has it.

    The kernel frees a lock when its holder dies, so a file left behind by a crash locks nobody out.
    """
    if shard.whole:
        with locked(workspace):
            yield
        return
    folder = _lock_folder(workspace)
    with contextlib.ExitStack() as held:
        held.enter_context(_flock(workspace.state / "lock", fcntl.LOCK_SH | fcntl.LOCK_NB))
        with tables_locked(workspace):
            held.enter_context(_flock(folder / f"{shard.number}-of-{shard.of}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
            _require_one_partition(folder, shard)
        yield


@contextlib.contextmanager
def tables_locked(workspace: Workspace) -> Iterator[None]:
    """Wait for, and hold, the tables of the whole cohort: names, splits, clinical rows, decisions, the manifest."""
    with _flock(_lock_folder(workspace) / "tables.lock", fcntl.LOCK_EX):
        yield


def _require_one_partition(folder: Path, shard: Shard) -> None:
    """Another N would cut the cohort elsewhere, and two runs would meet in one patient."""
    for path in folder.glob("*-of-*.lock"):
        if path.name.endswith(f"-of-{shard.of}.lock"):
            continue
        with contextlib.suppress(FileNotFoundError), _flock(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            path.unlink()


def _lock_folder(workspace: Workspace) -> Path:
    folder = workspace.state / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _flock(path: Path, how: int) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
    try:
        try:
            fcntl.flock(handle, how)
        except OSError:
            raise _busy(path, handle) from None
        if how & fcntl.LOCK_EX:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(handle)


def _busy(path: Path, handle: int) -> TemporaryStop:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        who = f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    fix = f"stop {who}, or wait until it ends; shards that run at once need one N"
    return TemporaryStop("E_BUSY", where=str(path), found=who, fix=fix)
