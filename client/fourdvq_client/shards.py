"""Parts of a cohort that are prepared by several runs at once, in one site folder: which patients, and the locks.

state/lock                 exclusive for a whole run (and for join), shared by all shards
state/shards/3-of-8.lock   exclusive for one shard
state/shards/tables.lock   exclusive while tables of the whole cohort are written; waited for
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fourdvq.errors import ConfigError
from fourdvq_client.workspace import Workspace, flocked, locked

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
        held.enter_context(_held(workspace.state / "lock", fcntl.LOCK_SH | fcntl.LOCK_NB))
        with tables_locked(workspace):
            held.enter_context(_held(folder / f"{shard.number}-of-{shard.of}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
            _require_one_partition(workspace, shard)
        yield


@contextlib.contextmanager
def tables_locked(workspace: Workspace) -> Iterator[None]:
    """Wait for, and hold, the tables of the whole cohort: names, splits, clinical rows, decisions, the manifest."""
    with _held(_lock_folder(workspace) / "tables.lock", fcntl.LOCK_EX):
        yield


def _require_one_partition(workspace: Workspace, shard: Shard) -> None:
    """Another N would cut the cohort elsewhere, and two runs would meet in one patient."""
    for path in workspace.shard_locks():
        if path.name.endswith(f"-of-{shard.of}.lock"):
            continue
        with contextlib.suppress(FileNotFoundError), _held(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            path.unlink()


def _held(path: Path, how: int) -> contextlib.AbstractContextManager[None]:
    return flocked(path, how, hint="; shards that run at once need one N")


def _lock_folder(workspace: Workspace) -> Path:
    workspace.shards.mkdir(parents=True, exist_ok=True)
    return workspace.shards
