"""From code histograms and the clinical table to the survival table of one site.

One row per patient: the first CT's histogram, age, sex and smoking in a fixed coding, time and event. Patients without
complete rows are left out and counted. Source: paper section 3 (141 of 175 patients had complete rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fourdvq.errors import SurvivalError
from fourdvq.survival.table import CoxSite

COVARIATES = ("age", "sex", "smoking")
AGE_CENTRE, AGE_UNIT = 70.0, 10.0  # public constants: squared raw ages leave the range of masked sums


class Clinical(Protocol):
    """A patient's clinical row: years, sex 1 = male, smoking 1 = ever, days since the first CT, event 1 = died."""

    @property
    def pseudonym(self) -> str: ...
    @property
    def age(self) -> float | None: ...
    @property
    def sex(self) -> int | None: ...
    @property
    def smoking(self) -> int | None: ...
    @property
    def time_days(self) -> int | None: ...
    @property
    def event(self) -> int | None: ...


@dataclass(frozen=True, eq=False)
class BiomarkerTable:
    """The survival table, and how many patients were left out for each reason (for people at the site)."""

    site: CoxSite
    without_histogram: int
    incomplete: int


def biomarker_table(
    histograms: Mapping[str, npt.NDArray[np.float64]], clinical: Sequence[Clinical], *, name: str
) -> BiomarkerTable:
    """Join histograms (K,) of code shares and clinical rows by pseudonym, in the order of the clinical rows.

    Raises SurvivalError for a pseudonym that appears twice and for histograms of different lengths.
    """
    seen: set[str] = set()
    rows, shares, incomplete, without = [], [], 0, 0
    for row in clinical:
        if row.pseudonym in seen:
            raise SurvivalError("E_SURVIVAL_INPUT", where="column pseudonym", found="a repeat", wanted="one row each")
        seen.add(row.pseudonym)
        values = (row.age, row.sex, row.smoking, row.time_days, row.event)
        if any(value is None or not np.isfinite(value) for value in values):
            incomplete += 1
        elif row.pseudonym not in histograms:
            without += 1
        else:
            rows.append(row)
            shares.append(np.asarray(histograms[row.pseudonym], dtype=np.float64))
    if len({share.shape for share in shares}) > 1:
        raise SurvivalError("E_SURVIVAL_INPUT", where="histograms", found="several lengths", wanted="one codebook")
    n_codes = shares[0].size if shares else next((len(h) for h in histograms.values()), 0)
    covariates = [(scaled_age(float(r.age or 0.0)), float(r.sex or 0), float(r.smoking or 0)) for r in rows]
    site = CoxSite(
        X=np.array(shares, dtype=np.float64).reshape(len(rows), n_codes),
        C=np.array(covariates, dtype=np.float64).reshape(len(rows), len(COVARIATES)),
        t=np.array([r.time_days for r in rows], dtype=np.float64),
        e=np.array([r.event for r in rows], dtype=np.int64),
        ids=tuple(r.pseudonym for r in rows),
        name=name,
        names=COVARIATES,
    )
    return BiomarkerTable(site, without_histogram=without, incomplete=incomplete)


def scaled_age(years: float) -> float:
    """Age in decades from 70 years."""
    return (years - AGE_CENTRE) / AGE_UNIT
