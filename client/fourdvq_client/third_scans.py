"""Test patients with a third scan, and the file of what the world model expected that scan to be.

runs/<run>/future_codes.json    pseudonym to shares (K,), with the names of tokenizer and ODE that made them
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from fourdvq.data.datasets import PreparedPatient
from fourdvq.errors import ModelError
from fourdvq.plan import GIVEN_FOR_EXTRAPOLATION
from fourdvq_client.workspace import Workspace, write_private

THIRD = GIVEN_FOR_EXTRAPOLATION  # index of the first scan that the model is not given
FILE = "future_codes.json"


def with_third_scan(patients: Sequence[PreparedPatient]) -> list[PreparedPatient]:
    """The patients with a scan after the two that the model is given."""
    return [patient for patient in patients if len(patient.scans) > THIRD]


def keep_future_codes(
    workspace: Workspace, run: str, shares: Mapping[str, np.ndarray], *, tokenizer: str, ode: str
) -> None:
    """Write the shares (K,) of generated third scans by pseudonym, for this account alone."""
    plain = {name: values.tolist() for name, values in shares.items()}
    record = {"tokenizer": tokenizer, "ode": ode, "shares": plain}
    write_private(workspace.runs / run / FILE, json.dumps(record).encode())


def read_future_codes(workspace: Workspace, run: str, tokenizer: str) -> dict[str, np.ndarray]:
    """What was kept for the run. Raises ModelError E_TOKENIZER if there is nothing of this tokenizer."""
    path = workspace.runs / run / FILE
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if record.get("tokenizer") != tokenizer:
        raise ModelError("E_TOKENIZER", where=path.name, found="no generated scans", wanted=tokenizer[:12])
    return {name: np.array(shares, dtype=np.float64) for name, shares in record["shares"].items()}
