"""The key of pseudonyms and splits, and the table that says who is who: both stay in private/."""

from __future__ import annotations

import csv
import secrets

from fourdvq.errors import CohortError
from fourdvq_client.workspace import Workspace, write_private

SECRET_BYTES = 32


def site_secret(workspace: Workspace) -> bytes:
    """The key of pseudonyms and splits; made once, never changed: another one would rename every patient."""
    if not workspace.secret.is_file():
        if workspace.patients.is_file():
            raise CohortError(
                "E_FILE", where=str(workspace.secret), fix="restore private/secret from a backup: it names the patients"
            )
        write_private(workspace.secret, secrets.token_bytes(SECRET_BYTES))
    return workspace.secret.read_bytes()


def real_ids(workspace: Workspace) -> dict[str, str]:
    """Pseudonym to real id, from private/; empty before the first preparation."""
    if not workspace.patients.is_file():
        return {}
    with workspace.patients.open(encoding="utf-8", newline="") as stream:
        return {row["pseudonym"]: row["patient_id"] for row in csv.DictReader(stream)}
