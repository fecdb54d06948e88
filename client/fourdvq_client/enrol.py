"""Take an invitation into a site folder that exists already: a new coordinator, a new address, or a demo's.

What a person decides stays with the person: a policy that names another authority is not changed, it refuses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourdvq.config import build, to_plain
from fourdvq.errors import Refused
from fourdvq.training.checkpoint import write_atomic
from fourdvq.wire.invitation import Invitation
from fourdvq_client.keys import load_site_key, make_request
from fourdvq_client.policy import load_policy
from fourdvq_client.workspace import open_workspace


def take_invitation(root: Path, invitation: Mapping[str, Any]) -> dict[str, Any]:
    """Store authority and address of the invitation; returns the site's signed request, as plain data.

    Raises Refused E_INVITE for another site or role, E_POLICY if policy.yaml asks for another authority, E_PROFILE if
    the site prepares its scans under another profile.
    """
    invited = build(Invitation, invitation)
    workspace, config = open_workspace(root)
    rules = load_policy(workspace.policy_yaml).rules
    for name, ours, theirs in (("site", config.site, invited.site), ("role", rules.role, invited.role)):
        if ours != theirs:
            raise Refused("E_INVITE", where=f"invitation: {name}", found=theirs, wanted=ours)
    asked = rules.coordinator.ca_sha256.lower()
    if asked and asked != invited.ca_fingerprint.replace(":", ""):
        raise Refused("E_POLICY", where="policy.yaml: coordinator.ca_sha256", found=asked, wanted="the invitation's")
    _store_profile(workspace.profile_json, invited.profile)
    ca_file = workspace.root / rules.coordinator.ca_file
    write_atomic(ca_file, invited.ca_pem.encode("ascii"))
    write_atomic(workspace.invitation, (json.dumps(to_plain(invited), indent=1) + "\n").encode())
    _set_coordinator(workspace.site_yaml, invited.address)
    key = load_site_key(workspace.keys / "site.key")
    request: dict[str, Any] = to_plain(make_request(key, federation=invited.federation, site=config.site))
    return request


def role_of(root: Path) -> str:
    """The role that the site's own policy gives it."""
    workspace, _ = open_workspace(root)
    return load_policy(workspace.policy_yaml).rules.role


def _store_profile(path: Path, profile: Mapping[str, Any]) -> None:
    from fourdvq.preprocessing.profile import profile_from, profile_to_plain

    wanted = profile_from(profile)
    if path.is_file():
        have = profile_from(json.loads(path.read_text(encoding="utf-8")))
        if have.sha256 != wanted.sha256:
            raise Refused(
                "E_PROFILE",
                where=str(path),
                found=have.sha256[:12],
                wanted=wanted.sha256[:12],
                fix=f"move {path.name} away and run `fourdvq-client preprocess` again",
            )
        return
    write_atomic(path, (json.dumps(profile_to_plain(wanted), indent=1, sort_keys=True) + "\n").encode())


def _set_coordinator(path: Path, address: str) -> None:
    """Change one line of site.yaml; everything else, comments included, stays as the person wrote it."""
    text = path.read_text(encoding="utf-8")
    line = f"coordinator: {json.dumps(address)}"
    found = re.compile(r"^coordinator:[^#\n]*?(?=[ \t]*(#|$))", re.MULTILINE)
    text = found.sub(lambda _: line, text, count=1) if found.search(text) else f"{text.rstrip()}\n{line}\n"
    write_atomic(path, text.encode())
