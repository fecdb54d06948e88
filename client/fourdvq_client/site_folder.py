"""A new site folder from a template: settings, policy, key pair, secret. Nothing that exists is overwritten."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fourdvq.config import to_plain
from fourdvq.errors import ConfigError, Refused
from fourdvq.wire.invitation import Invitation
from fourdvq_client.code_identity import Installed, installed_code
from fourdvq_client.keys import create_site_key
from fourdvq_client.policy import parse_policy
from fourdvq_client.site_secret import SECRET_BYTES
from fourdvq_client.workspace import Workspace, write_private

_SITE = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class SiteSettings:
    """What the template does not know. Empty or None leaves the template's own text."""

    site: str
    role: str = ""
    scans: Path | None = None
    clinical: Path | None = None
    scans_csv: Path | None = None
    device: str = ""
    worker: str = ""


def template_names() -> list[str]:
    """The templates that come with the package."""
    return sorted(p.name for p in _templates().iterdir() if (p / "policy.yaml").is_file())


def create_site(
    root: Path,
    settings: SiteSettings,
    *,
    template: str,
    invitation: Invitation | None = None,
    profile: Mapping[str, Any] | None = None,
) -> str:
    """Make the folder and return the fingerprint of its new key.

    Raises ConfigError E_EXISTS if there is a site already, E_VALUE for an unknown template or an impossible name, and
    what the profile's own reader raises.
    """
    workspace = Workspace(root.resolve())
    if workspace.site_yaml.exists():
        raise ConfigError("E_EXISTS", where=str(workspace.site_yaml), found="a site folder", wanted="a new folder")
    if template not in template_names():
        raise ConfigError("E_VALUE", where="template", found=template, wanted=" or ".join(template_names()))
    if not _SITE.fullmatch(settings.site):
        raise ConfigError("E_VALUE", where="site", found=settings.site, wanted="small letters, digits and hyphens")
    source = _templates() / template
    policy = _policy_text((source / "policy.yaml").read_text(encoding="utf-8"), settings, invitation)
    config = _site_text((source / "site.yaml").read_text(encoding="utf-8"), settings, invitation)
    plain_profile = dict(invitation.profile) if invitation is not None else dict(profile or {})
    profile_text = _profile_text(plain_profile)
    workspace.make_folders()
    fingerprint = create_site_key(workspace.keys / "site.key").fingerprint
    write_private(workspace.secret, secrets.token_bytes(SECRET_BYTES))
    (workspace.state / "fingerprint").write_text(fingerprint, encoding="utf-8")
    if invitation is not None:
        (workspace.keys / "ca.crt").write_text(invitation.ca_pem, encoding="ascii")
        workspace.invitation.write_text(json.dumps(to_plain(invitation), indent=1) + "\n", encoding="utf-8")
    if profile_text:
        workspace.profile_json.write_text(profile_text, encoding="utf-8")
    if settings.clinical is None:
        (workspace.root / "clinical.example.csv").write_bytes((source / "clinical.csv").read_bytes())
    workspace.policy_yaml.write_text(policy, encoding="utf-8")
    # Last: a folder with site.yaml is a complete one.
    workspace.site_yaml.write_text(config, encoding="utf-8")
    return fingerprint


def code_entries(installed: tuple[Installed, ...]) -> str:
    """The lines for `allowed_code` that allow exactly what is installed."""
    lines = [f'  - {{package: {c.package}, version: "{c.version}", sha256: "{c.sha256}"}}' for c in installed]
    return "\n".join(lines)


def _policy_text(text: str, settings: SiteSettings, invitation: Invitation | None) -> str:
    role = invitation.role if invitation is not None else settings.role
    text = _set(text, "site", settings.site)
    if role:
        text = _set(text, "role", role)
        if role == "external":
            text = _without_training(text)
    if invitation is not None:
        text = re.sub(r'ca_sha256: ""', f'ca_sha256: "{_hex(invitation.ca_fingerprint)}"', text)
    # What is installed now is what a person looked at now; any later change of the code needs a new look.
    text = re.sub(
        r"^allowed_code: \[\].*$",
        lambda _: (
            "allowed_code:                    # what was installed at `init`; see `fourdvq-client policy check`\n"
            + code_entries(installed_code())
        ),
        text,
        flags=re.MULTILINE,
    )
    try:
        parse_policy(text)
    except Refused as error:
        raise ConfigError("E_VALUE", where=error.where, found=error.found, wanted=error.wanted) from None
    return text


def _without_training(text: str) -> str:
    return text.replace("query.codebook_init, train.vqgan, ", "").replace("train.ode, ", "")


def _site_text(text: str, settings: SiteSettings, invitation: Invitation | None) -> str:
    text = _set(text, "site", settings.site)
    if invitation is not None:
        text = _set(text, "coordinator", json.dumps(invitation.address))
    for name in ("scans", "clinical"):
        path = getattr(settings, name)
        if path is not None:
            text = _set(text, name, json.dumps(str(path.resolve())))
    if settings.scans_csv is not None:
        line = f"scans_csv: {json.dumps(str(settings.scans_csv.resolve()))}"
        text = re.sub(r"^# scans_csv:.*$", lambda _: line, text, flags=re.MULTILINE)
    for name in ("device", "worker"):
        if getattr(settings, name):
            text = _set(text, name, getattr(settings, name))
    return text


def _set(text: str, key: str, value: str) -> str:
    """Replace the value of a top-level key on its line; a comment behind it stays."""
    pattern = rf"^{key}:[ ]*(?:\"[^\"]*\"|[^#\n]*?)([ ]*#.*)?$"
    return re.sub(pattern, lambda m: f"{key}: {value}{m.group(1) or ''}", text, count=1, flags=re.MULTILINE)


def _profile_text(plain: Mapping[str, Any]) -> str:
    """The profile, typed once and written out in full, so that its file shows every value."""
    if not plain:
        return ""
    from fourdvq.preprocessing.profile import profile_from, profile_to_plain

    return json.dumps(profile_to_plain(profile_from(plain)), indent=1, sort_keys=True) + "\n"


def _hex(fingerprint: str) -> str:
    return re.sub(r"[^0-9a-f]", "", fingerprint.lower().removeprefix("sha256"))


def _templates() -> Path:
    spec = find_spec("fourdvq_site_templates")
    if spec is None or spec.origin is None:
        raise ConfigError("E_FOLDER", where="fourdvq_site_templates", found="not installed")
    return Path(spec.origin).parent
