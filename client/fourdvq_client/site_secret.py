"""The key of pseudonyms and splits, and the table that says who is who: both stay in private/."""

from __future__ import annotations

import secrets

from fourdvq.data.prepared import read_table
from fourdvq.errors import CohortError
from fourdvq_client.workspace import Workspace, write_private

SECRET_BYTES = 32
NAME_COLUMNS = ("patient_id", "pseudonym")


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
    """Pseudonym to real id, from private/; empty before the first preparation. Raises as `read_table`."""
    if not workspace.patients.is_file():
        return {}
    return {row["pseudonym"]: row["patient_id"] for row in read_table(workspace.patients, NAME_COLUMNS)}
