"""Loopback: free ports, ports that are taken, and proxies that must not get in between."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import MutableMapping

from fourdvq.errors import FourdvqError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free port. Raises FourdvqError E_PORT if another program has it.

    The caller hands the socket on, so between finding a free port and using it nobody else can take it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        server.listen(128)
    except OSError as error:
        server.close()
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise FourdvqError(
            "E_PORT", where=f"{host}:{port}", found=os.strerror(error.errno or 0) if taken else str(error)
        ) from None
    server.setblocking(False)
    return server


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with bind(host, 0) as server:
        return int(server.getsockname()[1])


def spare_loopback(environ: MutableMapping[str, str]) -> None:
    """Append loopback to NO_PROXY: with HTTP_PROXY set, calls to this machine would go to the proxy and fail."""
    for name in ("NO_PROXY", "no_proxy"):
        have = [part for part in environ.get(name, "").split(",") if part.strip()]
        environ[name] = ",".join([*have, *(host for host in _LOOPBACK if host not in have)])
