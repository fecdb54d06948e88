"""How a command ends that is stopped: Ctrl-C gives 130, SIGTERM of a batch system 75, both in words of ours."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from fourdvq.errors import EXIT_INTERRUPTED, EXIT_TEMPORARY, FourdvqError

EXIT_OF: Final = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TEMPORARY}
_USUAL: Final[dict[int, Any]] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def stop_error(number: int, program: str) -> FourdvqError:
    """What is said about a stop by signal `number`."""
    return FourdvqError("E_INTERRUPTED", where=program, found=signal.Signals(number).name)


@contextlib.contextmanager
def answered(number: int, answer: Callable[[int, object], object]) -> Iterator[None]:
    """Let `answer` handle a signal meanwhile, unless somebody else cares for it already, or this is no main thread."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(number) != _USUAL[number]:
        yield
        return
    before = signal.signal(number, answer)
    try:
        yield
    finally:
        signal.signal(number, before)
