"""The only door that sites can reach: the nine Fleet routes that a registered site needs, and nothing else.

Flower 1.41 serves three APIs on one port, and the Control API among them asks for no login: whoever reaches that port
can run code on the coordinator. So that port stays on loopback, and this wrapper stands in front of the same
application on a second TLS listener. It compares whole paths as the server decoded them, so `..`, `%2e%2e` and `//`
cannot match, and answers 404 itself: what it does not let through never touches Flower. Left out on purpose are
`register-node` and `unregister-node` (people admit sites, see membership.py) and `get-fab` (no code travels to sites).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from fourdvq.wire.messages import PROTOCOL

FLEET_PREFIX: Final = "/v1/fleet/"
SITE_ROUTES: Final = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "get-run",
    "pull-messages",
    "push-messages",
    "pull-object",
    "push-object",
    "confirm-message-received",
)
# Flower cuts arrays into pieces of at most 5 MB; three times that leaves room for its envelope.
MAX_BODY_BYTES: Final = 16 * 1024 * 1024
PROTOCOL_HEADER: Final = "x-fourdvq-protocol"

_OK, _NOT_FOUND, _LENGTH_REQUIRED, _TOO_LARGE = 200, 404, 411, 413
_PATHS: Final = frozenset(FLEET_PREFIX + route for route in SITE_ROUTES)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class FleetGate:
    """An ASGI application around Flower's: exact paths, POST only, a stated and bounded length."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        status = verdict(scope)
        if status == _OK:
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def verdict(scope: Scope) -> int:
    """The HTTP status of a request: 200 lets it through to Flower, anything else is the gate's own answer."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in _PATHS:
        return _NOT_FOUND
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    if len(lengths) != 1 or not lengths[0].isdigit():
        return _LENGTH_REQUIRED
    return _OK if int(lengths[0]) <= MAX_BODY_BYTES else _TOO_LARGE


def response_headers() -> list[tuple[str, str]]:
    """Headers of every answer of the gate: a site's doctor reads the protocol number before it has a key."""
    return [(PROTOCOL_HEADER, str(PROTOCOL))]
