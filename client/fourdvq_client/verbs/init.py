"""init: a new site folder, with its key made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result


def init(
    invitation: Annotated[Path | None, typer.Argument(help="The coordinator's invitation file.")] = None,
    site: Annotated[str, typer.Option(help="Name of this site; the invitation names it otherwise.")] = "",
    template: Annotated[str, typer.Option(help="leuven, southampton, external or demo.")] = "",
    scans: Annotated[Path | None, typer.Option(help="Folder of scans.")] = None,
    clinical: Annotated[Path | None, typer.Option(help="Table of patients.")] = None,
    scans_csv: Annotated[Path | None, typer.Option(help="Table of scans; needed where they are not DICOM.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Preprocessing profile, where there is no invitation.")] = None,
    role: Annotated[str, typer.Option(help="train or external, where there is no invitation.")] = "",
) -> Result:
    """Make the site folder from a template, create the key pair there, and write the request to send back."""
    from fourdvq.errors import ConfigError
    from fourdvq.preprocessing.profile import load_profile, profile_to_plain
    from fourdvq.wire.invitation import dump, load_invitation
    from fourdvq_client.keys import load_site_key, make_request
    from fourdvq_client.site_folder import SiteSettings, create_site, template_names

    root = console.options().workdir.resolve()
    if invitation is not None and not invitation.is_file():
        raise ConfigError("E_FILE", where=str(invitation))
    invited = load_invitation(invitation.read_text(encoding="utf-8"), invitation.name) if invitation else None
    name = site or (invited.site if invited is not None else template)
    chosen = template or (name if name in template_names() else "external" if _is_external(invited, role) else "leuven")
    plain = profile_to_plain(load_profile(profile)) if profile is not None else None
    settings = SiteSettings(site=name, role=role, scans=scans, clinical=clinical, scans_csv=scans_csv)
    fingerprint = create_site(root, settings, template=chosen, invitation=invited, profile=plain)
    facts = {"site": name, "folder": str(root), "template": chosen, "fingerprint": fingerprint}
    lines = [f"site {name} in {root}, from template {chosen}", f"key    {fingerprint}"]
    if invited is not None:
        request = root / f"{name}.request.json"
        key = load_site_key(root / "keys" / "site.key")
        request.write_text(dump(make_request(key, federation=invited.federation, site=name)), encoding="utf-8")
        facts["request"] = str(request)
        lines += [f"send   {request} to the coordinator, and compare the key's fingerprint by telephone"]
    lines += ["next   edit site.yaml, read policy.yaml, then: fourdvq-client check"]
    return Result(facts, tuple(lines))


def _is_external(invited: object, role: str) -> bool:
    return role == "external" or getattr(invited, "role", "") == "external"
