"""What the operating system refuses, as errors of ours. The numbers stand here once, for commands and for preparation.

A full disk and a share that went away pass, and the same command goes on then; a right has to be given by a person.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fourdvq.errors import FourdvqError, TemporaryStop

NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_STORAGE: Final = (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT)
NO_RIGHT: Final = (errno.EACCES, errno.EPERM)

_KINDS: tuple[tuple[tuple[int, ...], type[FourdvqError], str], ...] = (
    (NO_SPACE, TemporaryStop, "DISK_FULL"),
    (NO_STORAGE, TemporaryStop, "E_STORAGE"),
    (NO_RIGHT, FourdvqError, "E_RIGHTS"),
)
_OURS = frozenset({
    "site.yaml", "policy.yaml", "profile.json", "series.yaml", "invitation.json", "findings.csv", "candidates.csv",
    "audit.jsonl", "keys", "private", "prep", "latents", "runs", "models", "reports", "generated", "state", "logs",
    "weights", "server.yaml", "sites.json", "ca", "releases",
})  # fmt: skip
_ELSEWHERE = "a file outside the working folder"


def from_os(error: OSError, where: str) -> FourdvqError | None:
    """The error of ours that `error` stands for, at `where`; None if it may be a fault of this program."""
    for numbers, kind, code in _KINDS:
        if error.errno in numbers:
            return kind(code, where=where, found=reason(error))
    return None


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """What the system refuses in here is said of `where`, a name of ours. Raises as `from_os` says."""
    try:
        yield
    except OSError as error:
        ours = from_os(error, where)
        if ours is None:
            raise
        raise ours from None


def reason(error: OSError) -> str:
    """The system's words alone: its message ends in a path, and a folder's name may be a patient's."""
    return error.strerror or type(error).__name__


def place_of(error: OSError, folder: Path) -> str:
    """Where it happened, as we name the places of a working folder; what a hospital brings is never named.

    No more than two names: a folder of scans may lie in one of ours.
    """
    if not isinstance(error.filename, str):
        return "the working folder"
    path = Path(error.filename)
    root = folder.resolve()
    names = path.relative_to(root).parts[:2] if path.is_relative_to(root) else ()
    if not names or names[0] not in _OURS:
        return _ELSEWHERE
    return "/".join(name for name in names if not name.startswith("."))
