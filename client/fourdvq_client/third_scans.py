"""Test patients with a third scan or a scan a year after the second, and the file of what the world model expected.

runs/<run>/future_codes.json    by pseudonym: shares (K,) of the third scan, and of the change over the year after the
                                second one; with the names of tokenizer and ODE that made them
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fourdvq.data.datasets import PreparedPatient
from fourdvq.errors import ModelError
from fourdvq.plan import GIVEN_FOR_EXTRAPOLATION
from fourdvq.survival.longitudinal import one_year_follow_up
from fourdvq_client.workspace import Workspace, write_private

THIRD = GIVEN_FOR_EXTRAPOLATION  # index of the first scan that the model is not given
SECOND = THIRD - 1  # the last one it is given
FILE = "future_codes.json"
Shares = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class FutureCodes:
    """Generated shares (K,) by pseudonym: of the third scan, and follow-up minus second scan."""

    third: Shares
    change: Shares


def with_third_scan(patients: Sequence[PreparedPatient]) -> list[PreparedPatient]:
    """The patients with a scan after the two that the model is given."""
    return [patient for patient in patients if len(patient.scans) > THIRD]


def follow_up_of(patient: PreparedPatient, window_days: int) -> int | None:
    """The scan about a year after the second one, None without one inside the window."""
    if len(patient.scans) <= THIRD:
        return None
    return one_year_follow_up([scan.days for scan in patient.scans], SECOND, window_days=window_days)


def keep_future_codes(workspace: Workspace, run: str, made: FutureCodes, *, tokenizer: str, ode: str) -> None:
    """Write what was generated, for this account alone."""
    parts = {"third": made.third, "change": made.change}
    plain = {part: {name: values.tolist() for name, values in shares.items()} for part, shares in parts.items()}
    record = {"tokenizer": tokenizer, "ode": ode, **plain}
    write_private(workspace.runs / run / FILE, json.dumps(record).encode())


def read_future_codes(workspace: Workspace, run: str, tokenizer: str) -> FutureCodes:
    """What was kept for the run. Raises ModelError E_TOKENIZER if there is nothing of this tokenizer."""
    path = workspace.runs / run / FILE
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if record.get("tokenizer") != tokenizer:
        raise ModelError("E_TOKENIZER", where=path.name, found="no generated scans", wanted=tokenizer[:12])

    def part(key: str) -> Shares:
        return {name: np.array(shares, dtype=np.float64) for name, shares in record[key].items()}

    return FutureCodes(third=part("third"), change=part("change"))
