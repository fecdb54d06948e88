"""`init` and `renew-cert`: the coordinator's folder, its certificate authority and its certificate."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result


def init(
    federation: Annotated[str, typer.Argument(help="name of the federation: small letters, digits, hyphens")],
    address: Annotated[str, typer.Option(help="host:port that sites connect to, e.g. fl.example.org:8443")],
    name: Annotated[list[str] | None, typer.Option(help="a further name or IP address of this machine")] = None,
    gate_port: Annotated[int, typer.Option(help="port to listen on, if a firewall forwards another one")] = 0,
) -> Result:
    """Make the coordinator's folder: certificate authority, TLS certificate, server.yaml.

    The authority's key is the one secret of the federation: back ca/ up, and let nobody else read it.
    """
    from fourdvq_server.setup import create_project

    settings, fingerprint = create_project(
        console.options().workdir.resolve(), federation, address, tuple(name or ()), gate_port=gate_port
    )
    root = console.options().workdir.resolve()
    facts = {"federation": settings.federation, "address": settings.address, "folder": str(root)}
    lines = (
        f"federation {settings.federation} in {root}",
        f"authority  {fingerprint}",
        f"sites connect to {settings.address}; this machine listens on port {settings.gate.port}",
        "next  fourdvq-server invite SITE, then: fourdvq-server serve",
    )
    return Result({**facts, "ca_fingerprint": fingerprint}, lines)


def renew_cert() -> Result:
    """Make a new server certificate from server.yaml, signed by the same authority: sites notice nothing."""
    from fourdvq_server.setup import renew_certificate

    days = renew_certificate(console.options().workdir.resolve())
    return Result({"days": days}, (f"a new certificate, good for {days} days", "restart: fourdvq-server serve"))
