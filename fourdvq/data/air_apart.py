"""Air in images whose decoder is no Python, looked for in a process of its own: a damaged image may take it down.

The process is started when it is first needed, works for all that follow, and ends when the one that started it ends.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourdvq.data.air import air_pixels
from fourdvq.data.dicom_file import PixelPlace, SliceHeader
from fourdvq.errors import VolumeError

SECONDS = 60.0  # a few images take less than one
_PROGRAM = "import sys; sys.path[:] = {path!r}; from fourdvq.data.air_apart import serve; serve()"


class AirApart:
    """`air_pixels` in another process."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def air_pixels(self, slices: Sequence[SliceHeader], step: int) -> int | None:
        """None if an image cannot be decoded, takes too long or ends the process; the next one gets a new process."""
        process = self.process or self._start()
        try:
            return _ask(process, slices, step)
        except (OSError, ValueError):  # the process is gone, silent, or says what is no answer
            self.stop()
            return None

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        # A session of its own, because Ctrl-C is for the process that asks; this one ends with its standard input.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self.process


def _ask(process: subprocess.Popen[bytes], slices: Sequence[SliceHeader], step: int) -> int | None:
    if process.stdin is None or process.stdout is None:
        raise OSError("a process without pipes")
    process.stdin.write(_request(slices, step))
    process.stdin.flush()
    ready, _, _ = select.select([process.stdout], [], [], SECONDS)
    # Not as an object: what decodes untrusted images is not trusted to say what is made of its answer.
    found = json.loads(process.stdout.readline() if ready else b"")
    return found if isinstance(found, int) else None


def _request(slices: Sequence[SliceHeader], step: int) -> bytes:
    return json.dumps([step, [[os.fspath(s.path), *s[1:]] for s in slices]]).encode() + b"\n"


def _requested(line: bytes) -> tuple[list[SliceHeader], int]:
    step, rows = json.loads(line)
    return [_header(row) for row in rows], step


def _header(row: Sequence[Any]) -> SliceHeader:
    path, *values = row
    header = SliceHeader._make([Path(path), *(tuple(v) if isinstance(v, list) else v for v in values)])
    return header._replace(pixels=PixelPlace._make(header.pixels))


def serve() -> None:
    """Answer one line for each request on the standard input, until that ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a decoder prints is no answer
    for line in sys.stdin.buffer:
        slices, step = _requested(line)
        try:
            found: int | None = air_pixels(slices, step)
        except (VolumeError, OSError):
            found = None
        print(json.dumps(found), file=answers, flush=True)
