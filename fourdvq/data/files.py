"""Files that are complete or absent: a temporary name beside the target, fsync, then one rename. Hashes, CSV, JSON."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`; a reader, or a run after a crash, sees the old file or the new one, never a part."""
    write_with(path, lambda temporary: temporary.write_bytes(data))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file (same folder, same suffixes), then rename it to `path`.

    The suffix is kept because image writers choose their format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        _fsync(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _fsync(path.parent)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def contents_sha256(files: Iterable[Path]) -> str:
    """Hex sha256 of what files hold, in any order; names are left out, because they may hold identifiers."""
    return hashlib.sha256("".join(sorted(map(file_sha256, files))).encode()).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def csv_bytes(columns: Sequence[str], rows: Iterable[Iterable[object]], errors: str = "strict") -> bytes:
    """A CSV as this package writes it: UTF-8, one `\\n` a row, None empty; `errors` as `str.encode` takes it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", errors)


def json_bytes(value: Any) -> bytes:
    """Readable JSON as this package writes it, sorted; NaN is an error."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
