"""Invitation, request, approval, revocation: files that people send each other, and what is refused in them."""

from __future__ import annotations

import json
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import federation_parts as parts
from fourdvq.errors import ConfigError, FourdvqError, Refused
from fourdvq.wire.invitation import SiteRequest, dump, load_invitation, load_request
from fourdvq_client.keys import SiteKey, create_site_key, load_site_key, make_request
from fourdvq_server.membership import approve, approved_roles, invite, load_members, revoke
from fourdvq_server.settings import GateSettings, ServerSettings, load_settings, refuse_public, save_settings
from fourdvq_server.setup import create_project, renew_certificate


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, ServerSettings]:
    root = tmp_path / "coordinator"
    return root, parts.make_project(root)


def request_of(key: SiteKey, site: str = "leuven") -> SiteRequest:
    return make_request(key, federation=parts.FEDERATION, site=site)


def refusal(root: Path, settings: ServerSettings, request: SiteRequest) -> FourdvqError:
    with pytest.raises(FourdvqError) as caught:
        approve(root, settings, request, parts.NOW)
    return caught.value


def test_a_site_is_invited_requests_is_approved_and_may_be_revoked(
    project: tuple[Path, ServerSettings], tmp_path: Path
) -> None:
    root, settings = project
    invitation = load_invitation(dump(invite(root, settings, "leuven", "train", {"name": "x"}, parts.NOW)))
    assert (invitation.site, invitation.role, invitation.profile) == ("leuven", "train", {"name": "x"})
    assert approved_roles(root) == {}
    key = create_site_key(tmp_path / "site.key")
    request = load_request(dump(request_of(key)))
    assert approve(root, settings, request, parts.NOW).fingerprint == key.fingerprint
    assert approved_roles(root) == {"leuven": "train"}
    revoke(root, "leuven", parts.NOW)
    assert approved_roles(root) == {}
    assert load_members(root)["leuven"].status == "revoked"


def test_neither_file_holds_anything_of_the_private_key(project: tuple[Path, ServerSettings], tmp_path: Path) -> None:
    root, settings = project
    key = create_site_key(tmp_path / "site.key")
    number = key.private.private_numbers().private_value
    text = dump(request_of(key)) + dump(invite(root, settings, "leuven", "train", {}, parts.NOW))
    assert "PRIVATE" not in text
    assert str(number) not in text
    assert f"{number:x}" not in text


def test_a_key_that_was_shut_out_does_not_come_back_and_a_new_one_does(
    project: tuple[Path, ServerSettings], tmp_path: Path
) -> None:
    root, settings = project
    key = parts.admit(root, settings, "leuven", tmp_path / "one")
    revoke(root, "leuven", parts.NOW)
    invite(root, settings, "leuven", "train", {}, parts.NOW)
    assert refusal(root, settings, request_of(key)).code == "E_EXISTS"
    fresh = create_site_key(tmp_path / "two" / "site.key")
    assert approve(root, settings, request_of(fresh), parts.NOW).fingerprint == fresh.fingerprint


def test_a_request_signed_by_another_key_is_refused(project: tuple[Path, ServerSettings], tmp_path: Path) -> None:
    root, settings = project
    invite(root, settings, "leuven", "train", {}, parts.NOW)
    mine, theirs = create_site_key(tmp_path / "mine.key"), create_site_key(tmp_path / "theirs.key")
    request = request_of(mine)
    stolen = replace(request, public_key=theirs.public_line, fingerprint=theirs.fingerprint)
    assert refusal(root, settings, stolen).code == "E_INVITE"
    renamed = replace(request, site="southampton")
    assert refusal(root, settings, renamed).where == "request: signature"
    assert refusal(root, settings, replace(request, fingerprint=theirs.fingerprint)).code == "E_INVITE"


def test_one_key_cannot_serve_two_sites_and_nobody_comes_uninvited(
    project: tuple[Path, ServerSettings], tmp_path: Path
) -> None:
    root, settings = project
    key = parts.admit(root, settings, "leuven", tmp_path)
    assert refusal(root, settings, request_of(key, "southampton")).code == "E_INVITE"
    invite(root, settings, "southampton", "train", {}, parts.NOW)
    assert refusal(root, settings, request_of(key, "southampton")).code == "E_EXISTS"
    with pytest.raises(Refused, match="E_EXISTS"):
        invite(root, settings, "leuven", "train", {}, parts.NOW)


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_only_keys_of_the_stated_curve_are_admitted(
    project: tuple[Path, ServerSettings], tmp_path: Path, kind: str
) -> None:
    root, settings = project
    invite(root, settings, "leuven", "train", {}, parts.NOW)
    other = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    line = other.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    request = replace(request_of(create_site_key(tmp_path / "k")), public_key=line)
    assert refusal(root, settings, request).where == "request: public_key"


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("site"),
        lambda d: d.update(site="../../etc"),
        lambda d: d.update(site="Leuven Hospital"),
        lambda d: d.update(more="x"),
        lambda d: d.update(schema=2),
        lambda d: d.update(public_key=7),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(tmp_path: Path, damage: object) -> None:
    data = json.loads(dump(request_of(create_site_key(tmp_path / "k"))))
    damage(data)  # type: ignore[operator]
    with pytest.raises(Refused) as caught:
        load_request(json.dumps(data), "leuven.request.json")
    assert caught.value.code == "E_INVITE"
    assert caught.value.where.startswith("leuven.request.json")
    with pytest.raises(Refused):
        load_request("not json")


def test_the_site_key_is_read_by_openssh_which_prints_the_same_fingerprint(tmp_path: Path) -> None:
    key = create_site_key(tmp_path / "keys" / "site.key")
    assert stat.S_IMODE((tmp_path / "keys" / "site.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert load_site_key(tmp_path / "keys" / "site.key").fingerprint == key.fingerprint
    command = ["ssh-keygen", "-l", "-E", "sha256", "-f", str(tmp_path / "keys" / "site.key")]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("OpenSSH is not installed here")
    assert printed.split()[:2] == ["384", key.fingerprint]


def test_settings_survive_the_round_trip_and_a_public_private_port_is_refused(tmp_path: Path) -> None:
    settings = ServerSettings(
        "ipf", "fl.example.org:8443", ("10.0.0.1",), gate=GateSettings("0.0.0.0", 9443), private_port=8001
    )
    save_settings(tmp_path / "server.yaml", settings)
    assert load_settings(tmp_path / "server.yaml") == settings
    for host in ("0.0.0.0", "192.168.1.4", "fl.example.org", "::"):
        with pytest.raises(ConfigError, match="E_UNSUPPORTED"):
            refuse_public(host)
    text = (tmp_path / "server.yaml").read_text().replace('"127.0.0.1"', '"0.0.0.0"')
    (tmp_path / "server.yaml").write_text(text)
    with pytest.raises(ConfigError, match="E_UNSUPPORTED"):
        load_settings(tmp_path / "server.yaml")


def test_a_coordinators_folder_is_made_once_and_its_certificate_renewed(tmp_path: Path) -> None:
    settings, fingerprint = create_project(tmp_path, "ipf-europe", "fl.example.org:8443")
    assert load_settings(tmp_path / "server.yaml") == settings
    assert settings.gate.port == 8443
    assert len(fingerprint.split(":")) == 32
    assert renew_certificate(tmp_path) > 390
    with pytest.raises(ConfigError, match="E_EXISTS"):
        create_project(tmp_path, "ipf-europe", "fl.example.org:8443")
