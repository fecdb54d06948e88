"""The files below a folder of a hospital's export, whatever else lies there: links in circles, pipes, empty files."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """Where a file lies, and what becomes another when its content does; times in ns.

    `changed_ns` is set by the system alone, so that it tells of a content whose time of change was set back.
    """

    folder: str
    name: str
    size: int
    modified_ns: int
    changed_ns: int


@dataclass
class FileWalk:
    """Files in sorted order with their states, and how many were left out: empty, unreadable, special (no regular
    file), loop.
    """

    files: list[Path] = field(default_factory=list)
    states: list[FileState] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def walk_files(folder: Path) -> FileWalk:
    """Files below a folder. A link to a folder already seen is counted as a loop and not followed.

    Hidden files and DICOMDIR are passed over without a count: they are never images.
    """
    walk = FileWalk()
    seen: set[tuple[int, int]] = set()
    waiting = [os.fspath(folder)]
    while waiting:
        here = waiting.pop()
        parent = Path(here)
        try:
            status = parent.stat()
            entries = sorted(os.scandir(here), key=lambda e: e.name)
        except OSError:
            walk.skipped["unreadable"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            walk.skipped["loop"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        below = [path for entry in entries if (path := _take(here, parent, entry, walk))]
        waiting += reversed(below)  # the last one in is the first one out: folders come in the order of their names
    return walk


def _take(here: str, parent: Path, entry: os.DirEntry[str], walk: FileWalk) -> str:
    """Note a file; the path of a folder that is to be walked, else empty."""
    name = entry.name
    if name.startswith(".") or name.upper() == "DICOMDIR":
        return ""
    try:
        status = entry.stat()
    except OSError:
        walk.skipped["unreadable"] += 1  # a link to nothing, or no permission
        return ""
    if stat.S_ISDIR(status.st_mode):
        return entry.path
    if not stat.S_ISREG(status.st_mode):
        walk.skipped["special"] += 1  # opening a pipe would wait for ever
    elif status.st_size == 0:
        walk.skipped["empty"] += 1
    else:
        walk.files.append(parent / name)  # a joined path costs half of one that is parsed from its text
        walk.states.append(FileState(here, name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return ""
