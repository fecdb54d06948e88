"""Make a coordinator's folder, and renew its certificate."""

from __future__ import annotations

import datetime
from pathlib import Path

from fourdvq.errors import ConfigError
from fourdvq.wire.invitation import check_federation_name
from fourdvq_server.certificates import (
    certificate_fingerprint,
    create_authority,
    create_server_certificate,
    days_left,
)
from fourdvq_server.membership import certificate_files
from fourdvq_server.project import Project
from fourdvq_server.settings import GateSettings, ServerSettings, host_of, load_settings, save_settings


def create_project(
    root: Path,
    federation: str,
    address: str,
    names: tuple[str, ...] = (),
    *,
    gate_host: str = "0.0.0.0",
    gate_port: int = 0,
    private_port: int = 8000,
) -> tuple[ServerSettings, str]:
    """Folders, authority, certificate and server.yaml; returns the settings and the authority's fingerprint.

    `gate_port` 0 listens on the port of `address`. Raises ConfigError E_EXISTS if there is a server.yaml or authority,
    E_VALUE for an address without a port or an impossible name.
    """
    project = Project(root)
    if project.server_yaml.exists():
        raise ConfigError("E_EXISTS", where=str(project.server_yaml), found="a coordinator's folder")
    check_federation_name(federation)
    host = host_of(address)
    port = gate_port or int(address.rpartition(":")[2])
    settings = ServerSettings(federation, address, names, gate=GateSettings(gate_host, port), private_port=private_port)
    for folder in (root, project.state, project.runs, project.releases, project.logs):
        folder.mkdir(parents=True, exist_ok=True)
    project.state.chmod(0o700)
    now = datetime.datetime.now(datetime.UTC)
    files = certificate_files(root)
    create_authority(files, federation, now)
    files.folder.chmod(0o700)
    create_server_certificate(files, [host, *names], now)
    # Last: a folder with server.yaml is a complete one.
    save_settings(project.server_yaml, settings)
    return settings, certificate_fingerprint(files.ca.read_bytes())


def renew_certificate(root: Path) -> int:
    """Replace the server's key and certificate; returns the days it is good for."""
    settings = load_settings(Project(root).server_yaml)
    now = datetime.datetime.now(datetime.UTC)
    files = certificate_files(root)
    create_server_certificate(files, [host_of(settings.address), *settings.names], now)
    return days_left(files.server, now)
