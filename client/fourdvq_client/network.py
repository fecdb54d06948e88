"""Small facts about this machine's network settings that both the connection and the doctor need."""

from __future__ import annotations

from collections.abc import MutableMapping

from fourdvq.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def spare_loopback(environ: MutableMapping[str, str]) -> None:
    """Append loopback to NO_PROXY: with HTTP_PROXY set, calls to this machine would go to the proxy and fail."""
    for name in ("NO_PROXY", "no_proxy"):
        have = [part for part in environ.get(name, "").split(",") if part.strip()]
        environ[name] = ",".join([*have, *(host for host in LOOPBACK if host not in have)])


def split_address(address: str) -> tuple[str, int]:
    """host:port as its parts; ConfigError E_VALUE if there is no port."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            "E_VALUE", where="site.yaml: coordinator", found=repr(address), wanted="host:port, e.g. fl.example.org:8443"
        )
    return host.strip("[]"), int(port)
