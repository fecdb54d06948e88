"""Whether a hospital's file is there and can be opened. A share in trouble or a missing right is no missing file.

What was prepared of such a scan stays, and the patient's other scans keep their numbers.
"""

from __future__ import annotations

import os
from pathlib import Path

from fourdvq.os_errors import reason


def lies_there(path: Path) -> bool:
    """Whether something is at `path`; also if the system does not let us look."""
    try:
        return path.exists()
    except OSError:
        return True


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; not if the system does not let us look."""
    try:
        return path.is_dir()
    except OSError:
        return False


def why_unreadable(path: Path) -> str:
    """Why a file or folder cannot be opened just now, in the system's words; empty if it can. Not all of it is read."""
    try:
        if path.is_dir():
            os.scandir(path).close()
        elif path.is_file():  # opening a pipe would wait for ever
            with path.open("rb") as stream:
                stream.read(1)
    except OSError as error:
        return reason(error)
    return ""
