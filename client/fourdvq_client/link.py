"""Calls over a bad network: what every failure means, which ones to try again, and for how long.

Failures become our own errors: RunEnded when the coordinator says that a run is over, Refused for keys, clocks and
versions, ConnectionFailed for everything between. Only the last kind is tried again. Flower itself takes any HTTP 403
for a stopped run; here a 403 without Flower's own error code is what it is: a firewall in between.
"""

from __future__ import annotations

import email.utils
import json
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import httpx

from fourdvq.errors import ConnectionFailed, FourdvqError, Refused

# Flower's error codes that we act on (flwr.supercore.error.ApiErrorCode).
_RUN_OVER: Final = {2007, 2008}
_NOT_ACTIVATED: Final = 2004
_OTHER_VERSION: Final = 1001
# How far a clock may be off before Flower refuses its signatures: 5 s ahead, 305 s behind. A little less, so that the
# cause is named while the network's own delay is still inside the tolerance.
CLOCK_AHEAD_S: Final = 4.0
CLOCK_BEHIND_S: Final = 295.0
_PASSING: Final = {502, 503, 504}
_BROKEN_OFF: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
_TRIES_ODD: Final = 4  # for answers that nobody foresaw, such as HTTP 500: one message may be at fault
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 20.0

Method = Callable[[Any], Any]


class RunEnded(Exception):
    """The coordinator says that the run is not running: its replies are not wanted any more."""


class Stopped(Exception):
    """The node was asked to stop while it waited for the network."""


class OddAnswer(ConnectionFailed):
    """An HTTP status that has no meaning here."""


def call_once(method: Method, request: Any) -> Any:
    """One call, with its failure translated."""
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise _of_status(error.response) from None
    except httpx.ProxyError as error:
        raise ConnectionFailed("E_PROXY", found=str(error)) from None
    except httpx.TransportError as error:
        raise _of_transport(error) from None


class Caller:
    """Calls that are tried again while the other side cannot be reached, with a growing pause.

    `patience` is in seconds, None for ever. A wrong certificate ends a first contact at once; later it is waited out,
    because a reply is in hand and the coordinator may be renewing its certificate. `on_trouble(error)` is told when a
    call fails for the first time, `on_trouble(None)` when calls work again.
    """

    def __init__(
        self,
        stop: threading.Event,
        *,
        patience: float | None = None,
        on_trouble: Callable[[FourdvqError | None], None] | None = None,
    ) -> None:
        self._stop = stop
        self._patience = patience
        self._on_trouble = on_trouble

    def __call__(self, method: Method, request: Any) -> Any:
        started, pause, tries, troubled = time.monotonic(), _FIRST_PAUSE_S, 0, False
        while True:
            try:
                result = call_once(method, request)
            except ConnectionFailed as error:
                tries += 1
                waited = time.monotonic() - started
                impatient = self._patience is not None and (waited >= self._patience or error.code == "E_TLS")
                if impatient or (isinstance(error, OddAnswer) and tries >= _TRIES_ODD):
                    raise
                if not troubled and self._on_trouble:
                    self._on_trouble(error)
                troubled = True
                if self._stop.wait(pause):
                    raise Stopped from error
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                if troubled and self._on_trouble:
                    self._on_trouble(None)
                return result


def clock_ahead(response: httpx.Response, now: float) -> float | None:
    """Seconds that this machine's clock (`now`, Unix time) is ahead of the other side's Date header; None without one.

    The header has whole seconds, so the true value is up to a second smaller.
    """
    try:
        return now - email.utils.parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return None


def is_tls_failure(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is about certificates or encryption.

    A connection that broke during the handshake is an SSLError too, but a cut line: trying again helps.
    """
    while error is not None:
        if isinstance(error, ssl.SSLError) and not isinstance(error, _BROKEN_OFF):
            return True
        error = error.__cause__ or error.__context__
    return False


def _of_status(response: httpx.Response) -> Exception:
    status, code = response.status_code, _flower_code(response)
    where = str(response.request.url.host)
    if code in _RUN_OVER:
        return RunEnded()
    if code == _NOT_ACTIVATED:
        return Refused("E_ACTIVATION", where=where, found="the coordinator does not activate this key")
    if code == _OTHER_VERSION:
        return Refused("E_FLOWER", where=where, found="the coordinator does not accept this version of Flower")
    if status == httpx.codes.UNAUTHORIZED:
        return _unauthorised(response, where)
    if status in (httpx.codes.FORBIDDEN, httpx.codes.PROXY_AUTHENTICATION_REQUIRED):
        return ConnectionFailed("E_PROXY", where=where, found=f"HTTP {status} from something between the two sides")
    kind = ConnectionFailed if status in _PASSING else OddAnswer
    return kind("E_UNREACHABLE", where=where, found=f"HTTP {status}", wanted="a fourdvq coordinator at this address")


def _unauthorised(response: httpx.Response, where: str) -> Refused:
    ahead = clock_ahead(response, time.time())
    if ahead is not None and not -CLOCK_BEHIND_S < ahead < CLOCK_AHEAD_S:
        side = "ahead of" if ahead > 0 else "behind"
        return Refused("E_CLOCK", where="this machine", found=f"{abs(ahead):.0f} s {side} the coordinator")
    return Refused("E_ACTIVATION", where=where, found="the coordinator does not know this key (any more)")


def _of_transport(error: httpx.TransportError) -> ConnectionFailed:
    if is_tls_failure(error):
        return ConnectionFailed("E_TLS", found=str(error))
    return ConnectionFailed("E_UNREACHABLE", found=f"{type(error).__name__}: {error}")


def _flower_code(response: httpx.Response) -> int | None:
    try:
        code = json.loads(response.text)["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, int) else None
