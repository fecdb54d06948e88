"""Which patients train, validate and test. A keyed hash orders them: nobody chooses, and nobody outside can tell.

Per site, and by patient: all scans of a patient are in one split. The key stays in the site's private folder. Once
assigned, a patient never moves; new patients go where the shares lag most.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fourdvq.errors import CohortError
from fourdvq.plan import SplitSpec

SPLITS = ("train", "validation", "test")
MANY_SCANS = 3  # two are given and one is the target: only these patients test the trajectory model


@dataclass(frozen=True)
class SplitPatient:
    """What the assignment looks at."""

    pseudonym: str
    n_scans: int
    event: bool


def assign_splits(
    patients: Sequence[SplitPatient], *, key: bytes, shares: SplitSpec, existing: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Pseudonym to split for `patients` and for all of `existing`, whose split is kept.

    Patients are taken in the order of HMAC-SHA256(key, pseudonym) within strata (three scans or more; event), and each
    goes to the split that is furthest behind its share. The order of `patients` does not matter. Raises CohortError
    E_TABLE for an unknown split in `existing` and E_DUPLICATE for a pseudonym that comes twice.
    """
    result = dict(existing or {})
    for pseudonym, split in result.items():
        if split not in SPLITS:
            raise CohortError("E_TABLE", where=f"splits.csv, {pseudonym}", found=repr(split), wanted=", ".join(SPLITS))
    _require_unique(p.pseudonym for p in patients)
    counts = {split: sum(1 for s in result.values() if s == split) for split in SPLITS}
    wanted = {split: getattr(shares, split) for split in SPLITS}
    for patient in sorted(patients, key=lambda p: (_stratum(p), _rank(key, p.pseudonym), p.pseudonym)):
        if patient.pseudonym in result:
            continue
        total = sum(counts.values()) + 1
        # The largest lag first; of equal lags the larger share, so that the first patient trains.
        split = max(SPLITS, key=lambda s: (wanted[s] > 0, round(wanted[s] * total - counts[s], 9), wanted[s]))
        result[patient.pseudonym] = split
        counts[split] += 1
    return result


def _stratum(patient: SplitPatient) -> tuple[bool, bool]:
    return patient.n_scans >= MANY_SCANS, patient.event


def _rank(key: bytes, pseudonym: str) -> bytes:
    return hmac.new(key, pseudonym.encode(), hashlib.sha256).digest()


def _require_unique(pseudonyms: Iterable[str]) -> None:
    seen: set[str] = set()
    for pseudonym in pseudonyms:
        if pseudonym in seen:
            raise CohortError("E_DUPLICATE", where="the patients to split", found=pseudonym)
        seen.add(pseudonym)
