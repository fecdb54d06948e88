"""What a person decided to send: one JSON text, checked for identifiers, with a line in the log."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fourdvq.errors import ConfigError, Refused
from fourdvq_client.audit import AuditLog, Entry
from fourdvq_client.egress import find_identifier
from fourdvq_client.policy import load_policy
from fourdvq_client.runtime import Facts, site_fingerprint
from fourdvq_client.site_report import latest_share
from fourdvq_client.tasks import OUTBOX_FILE
from fourdvq_client.workspace import Workspace, write_private


def text_to_submit(workspace: Workspace, file: Path | None) -> tuple[Path, str]:
    """The file and its text. ConfigError E_FILE if there is none, E_TYPE if it is no share edition."""
    path = file or latest_share(workspace)
    if path is None or not path.is_file():
        raise ConfigError("E_FILE", where=str(path or workspace.reports), fix="fourdvq-client report writes it")
    text = path.read_text(encoding="utf-8")
    try:
        edition = json.loads(text).get("edition")
    except (ValueError, AttributeError):
        edition = None
    if edition != "share":
        raise ConfigError("E_TYPE", where=str(path), found=f"edition {edition}", wanted="the share edition's JSON")
    return path, text


def put_in_outbox(workspace: Workspace, text: str, *, by: str) -> str:
    """Check and keep the text; returns its sha256. Refused E_IDENTIFIER if it holds an id, a path or a date."""
    found = find_identifier(text, Facts(workspace).identifiers())
    if found:
        raise Refused("E_IDENTIFIER", where="report", found=found)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    audit = AuditLog(workspace.audit_file, site_fingerprint(workspace))
    policy = load_policy(workspace.policy_yaml).sha256
    audit.append(
        Entry("approve", kind="query.report", decision=f"submitted by {by}", payload_sha256=sha256, policy=policy)
    )
    write_private(workspace.outbox / OUTBOX_FILE, text.encode())
    return sha256
