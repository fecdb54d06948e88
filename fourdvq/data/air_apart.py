"""Air in images whose decoder is no Python, looked for in a process of its own: a damaged image may take it down.

The process is started when it is first needed, works for all that follow, and ends with the one that started it.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from fourdvq.data.air import air_pixels
from fourdvq.data.dicom_file import SliceHeader
from fourdvq.errors import VolumeError

SECONDS = 60.0  # a few images take less than one


class AirApart:
    """`air_pixels` in another process."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def air_pixels(self, slices: Sequence[SliceHeader], step: int) -> int | None:
        """None if an image cannot be decoded, takes too long or ends the process; the next one gets a new process."""
        connection = self._connection or self._start()
        try:
            connection.send((list(slices), step))
            if connection.poll(SECONDS):
                # Not as an object: what decodes untrusted images is not trusted to say what is made of its answer.
                found = json.loads(connection.recv_bytes())
                return found if isinstance(found, int) else None
        except (EOFError, OSError):
            pass  # the process is gone
        self.stop()
        return None

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # the caller may hold threads that a fork would copy
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection = ours
        return ours


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; the other one decides
    while True:
        try:
            slices, step = connection.recv()
        except EOFError:
            return
        try:
            found: int | None = air_pixels(slices, step)
        except (VolumeError, OSError):
            found = None
        connection.send_bytes(json.dumps(found).encode())
