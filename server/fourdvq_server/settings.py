"""server.yaml: the name of the federation, the address sites use, and the ports. Read here and nowhere else."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourdvq.config import build, to_plain
from fourdvq.errors import ConfigError

SCHEMA = 1


@dataclass(frozen=True)
class GateSettings:
    """Where the door for sites listens. 0.0.0.0 is every network of this machine; port 0 is any free one."""

    host: str = "0.0.0.0"
    port: int = 8443


@dataclass(frozen=True)
class ServerSettings:
    """`address` (host:port) is what sites connect to; `names` are further names the certificate is valid for.

    The private port carries Flower's Control API, which has no login, so `private_host` must be a loopback address.
    """

    federation: str
    address: str
    names: tuple[str, ...] = ()
    gate: GateSettings = field(default_factory=GateSettings)
    private_host: str = "127.0.0.1"
    private_port: int = 8000
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ConfigError("E_VALUE", where="server.yaml: schema", found=str(self.schema), wanted=str(SCHEMA))
        host_of(self.address)
        refuse_public(self.private_host)


def host_of(address: str) -> str:
    """The host of host:port. Raises ConfigError E_VALUE if there is no port."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError("E_VALUE", where="address", found=repr(address), wanted="host:port, e.g. fl.example.org:8443")
    return host.strip("[]")


def refuse_public(host: str) -> None:
    """Raise ConfigError E_UNSUPPORTED unless `host` is a loopback address of this machine."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            "E_UNSUPPORTED",
            where="server.yaml: private_host",
            found=host,
            wanted="a loopback address such as 127.0.0.1: this port runs code without a login",
            fix="set private_host back; sites use `gate`",
        )


def load_settings(path: Path) -> ServerSettings:
    """Read server.yaml. Raises ConfigError for a missing file, an unknown key or an interpolation."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        raise ConfigError("E_NOT_A_PROJECT", where=str(path.parent), found="no server.yaml")
    text = path.read_text(encoding="utf-8")
    if "${" in text:
        raise ConfigError("E_VALUE", where=str(path), found="${", wanted="plain values")
    try:
        data: Any = OmegaConf.to_container(OmegaConf.create(text))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError("E_VALUE", where=str(path), found=str(error).splitlines()[0], wanted="YAML") from None
    return build(ServerSettings, data)


def save_settings(path: Path, settings: ServerSettings) -> None:
    """Write server.yaml with a comment for each part that a person may change."""
    plain = to_plain(settings)
    names = "".join(f'\n  - "{name}"' for name in plain["names"]) or " []"
    text = f"""# The coordinator. Sites only ever see `address`.
schema: {SCHEMA}
federation: "{plain["federation"]}"
address: "{plain["address"]}"
# Further names or addresses that the certificate is valid for; after a change: fourdvq-server renew-cert
names:{names}
# Where the door for sites listens. Let your firewall forward `address` to it.
gate:
  host: "{plain["gate"]["host"]}"
  port: {plain["gate"]["port"]}
# Never reachable from outside: this port runs code without a login.
private_host: "{plain["private_host"]}"
private_port: {plain["private_port"]}
"""
    path.write_text(text, encoding="utf-8")
