"""`invite`, `approve`, `revoke`, `sites`: who belongs to the federation."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fourdvq import console
from fourdvq.console import Result


def invite(
    site: Annotated[str, typer.Argument(help="name of the site: small letters, digits, hyphens")],
    role: Annotated[str, typer.Option(help="train, or external: validates and never trains")] = "train",
    profile: Annotated[str, typer.Option(help="preprocessing profile: a name or a file")] = "paper-v1",
    out: Annotated[Path | None, typer.Option(help="where to write the invitation")] = None,
) -> Result:
    """Put a site on the list and write its invitation, to be sent by mail: it holds no secret.

    Tell the site the authority's fingerprint by another way, so that it can compare.
    """
    from fourdvq.preprocessing.profile import load_profile, profile_to_plain
    from fourdvq.wire.invitation import dump
    from fourdvq_server.membership import invite as put_on_list

    root, settings = _project()
    plain = profile_to_plain(load_profile(_profile_file(profile)))
    invitation = put_on_list(root, settings, site, _role(role), plain, _now())
    path = (out or root / "invitations" / f"{site}.invitation.json").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(invitation), encoding="utf-8")
    facts = {"site": site, "role": role, "invitation": str(path), "ca_fingerprint": invitation.ca_fingerprint}
    lines = (
        f"invitation  {path}",
        f"authority   {invitation.ca_fingerprint}",
        f"at the site  fourdvq-client init {path.name}, which writes a request; then: fourdvq-server approve REQUEST",
    )
    return Result(facts, lines)


def approve(
    request: Annotated[Path, typer.Argument(help="the request file that the site sent back")],
    fingerprint: Annotated[str, typer.Option(help="what the site told you; asked for at the terminal otherwise")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="do not ask; the fingerprint was compared otherwise")] = False,
) -> Result:
    """Admit a site with the key of its request. Compare the fingerprint with the site first, by telephone."""
    from fourdvq.errors import ConfigError, Refused
    from fourdvq.wire.invitation import load_request
    from fourdvq_server.membership import approve as admit
    from fourdvq_server.membership import check_request

    root, settings = _project()
    if not request.is_file():
        raise ConfigError("E_FILE", where=str(request))
    asked = load_request(request.read_text(encoding="utf-8"), request.name)
    found = check_request(asked)
    if fingerprint and fingerprint != found:
        raise Refused("E_INVITE", where="fingerprint", found=found, wanted=fingerprint)
    if not fingerprint and not yes and not typer.confirm(f"{asked.site}: key {found}. Is this what the site says?"):
        raise Refused("E_INVITE", where="fingerprint", found="not confirmed", fix="compare again by telephone")
    member = admit(root, settings, asked, _now())
    facts = {"site": asked.site, "role": member.role, "fingerprint": member.fingerprint}
    return Result(facts, (f"{asked.site} is admitted as {member.role} with key {member.fingerprint}",))


def revoke(site: Annotated[str, typer.Argument(help="name of the site")]) -> Result:
    """Shut a site out; a running coordinator refuses its key within seconds. Its entry stays on record."""
    from fourdvq_server.membership import revoke as shut_out

    root, _ = _project()
    member = shut_out(root, site, _now())
    return Result({"site": site, "status": member.status}, (f"{site} is shut out",))


def sites() -> Result:
    """All sites: role, status, key, and who is online if the door is open."""
    from fourdvq_server.membership import load_members

    root, _ = _project()
    online = _online(root)
    members = load_members(root)
    rows = [
        (name, m.role, m.status, online.get(name, "-"), m.fingerprint or "-", m.revoked or m.approved or m.invited)
        for name, m in sorted(members.items())
    ]
    names = ("site", "role", "status", "connection", "fingerprint", "since")
    facts = {"sites": [dict(zip(names, row, strict=True)) for row in rows]}
    return Result(facts, (console.table(("site", "role", "status", "connection", "key", "since"), rows),))


def _online(root: Path) -> dict[str, str]:
    from fourdvq.errors import FourdvqError
    from fourdvq_server.control import Control
    from fourdvq_server.coordinator import find_door
    from fourdvq_server.membership import certificate_files

    door = find_door(root)
    if door is None:
        return {}
    try:
        with Control(door.private_address, certificate_files(root).ca) as control:
            return {node.name: node.status for node in control.nodes()}
    except FourdvqError:
        return {}


def _project() -> tuple[Path, Any]:
    from fourdvq_server.project import Project
    from fourdvq_server.settings import load_settings

    root = console.options().workdir.resolve()
    return root, load_settings(Project(root).server_yaml)


def _profile_file(name: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec("fourdvq_configs")
    if Path(name).suffix or spec is None or spec.origin is None:
        return Path(name)
    return Path(spec.origin).parent / "preprocessing" / f"{name}.yaml"


def _role(text: str) -> Literal["train", "external"]:
    from fourdvq.errors import ConfigError

    if text == "train":
        return "train"
    if text == "external":
        return "external"
    raise ConfigError("E_VALUE", where="--role", found=text, wanted="train or external")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
