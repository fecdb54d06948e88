"""The scalars of a phantom patient: who it is, how the disease grows, when it is scanned and how long it lives.

Nothing is rendered here, so thousands of patients take a second. The hazard follows the true extent over time:
h(t) = exp(b0 + b1 E(t) + effects of age, sex and smoking) per year, and the time of death is drawn from it.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fourdvq.config import build
from fourdvq.data.phantom.sites import site_style
from fourdvq.errors import ConfigError

DAYS_PER_YEAR = 365.25

# Baseline hazard and effects, chosen for somewhat more than half of the patients to die under observation, and for the
# extent at the first CT to be worth a hazard ratio of about two per SD: a signal that a small cohort can show.
LOG_HAZARD = -7.9
PER_EXTENT = 18.0
PER_YEAR_OF_AGE = 0.02
OF_MEN = 0.2
OF_SMOKERS = 0.2

_HORIZON_YEARS = 12.0
_SHORTEST_DAYS = 150
_TRANSPLANT_SHARE = 0.04


@dataclass(frozen=True)
class PhantomVisit:
    """One scan: its day (from the first CT), how the patient lay and breathed, and how the scanner worked.

    `breath_mm` lifts the diaphragm (negative: deeper breath), `shift_mm` (x, y, z) and `turn_deg` place the patient on
    the table. `extent` and `hazard` (per year) are the truth on that day.
    """

    scan_id: str
    days: int
    extent: float
    hazard: float
    breath_mm: float
    shift_mm: tuple[float, float, float]
    turn_deg: float
    kernel: Literal["soft", "standard", "sharp"]
    thickness_mm: float
    noise_hu: float

    @property
    def years(self) -> float:
        """Years since the first CT."""
        return self.days / DAYS_PER_YEAR


@dataclass(frozen=True)
class PhantomPatient:
    """One patient; with `cohort_seed`, `site` and `number` everything about it can be drawn again."""

    patient_id: str
    site: str
    number: int
    cohort_seed: int
    size: tuple[int, int, int]
    age: float
    sex: Literal["M", "F"]
    smoking: Literal["ever", "never"]
    subtype: Literal["slow", "fast"]
    extent_at_start: float
    rate_per_year: float
    time_days: int
    event: Literal["death", "censored", "transplant"]
    first_date: str
    birth_date: str
    visits: tuple[PhantomVisit, ...]

    def stream(self, *parts: int) -> tuple[int, ...]:
        """Seed of one of the patient's own random streams."""
        return (self.cohort_seed, site_key(self.site), self.number, *parts)


def site_key(site: str) -> int:
    """A number that belongs to a site's name, so that two sites with one seed have different patients."""
    return int.from_bytes(hashlib.sha256(site.encode()).digest()[:4], "big")


def extent_at(patient: PhantomPatient, years: float) -> float:
    """True diseased share of the lung at `years` since the first CT; rises all the time, ever more slowly, below 1."""
    return _extent(patient.extent_at_start, patient.rate_per_year, years)


def hazard_at(patient: PhantomPatient, years: float) -> float:
    """True hazard of death per year at `years` since the first CT."""
    return float(np.exp(_log_risk(patient.age, patient.sex, patient.smoking) + PER_EXTENT * extent_at(patient, years)))


def draw_patients(
    patients: int,
    seed: int,
    *,
    size: tuple[int, int, int] = (96, 256, 256),
    scans_per_patient: tuple[int, int] = (2, 4),
    site: str = "leuven",
    longitudinal_share: float = 1.0,
) -> tuple[PhantomPatient, ...]:
    """Draw the patients of a cohort, without rendering anything; the same arguments give the same patients.

    Patient i does not depend on how many patients there are. Raises ConfigError E_VALUE for impossible numbers.
    """
    _check(patients, seed, size, scans_per_patient, site, longitudinal_share)
    return tuple(_draw(number, seed, size, scans_per_patient, site, longitudinal_share) for number in range(patients))


def patient_from(data: object) -> PhantomPatient:
    """A patient from the plain data of truth/patients.json. Raises ConfigError if a key or type is wrong."""
    return build(PhantomPatient, data, where="patient")  # type: ignore[arg-type]


def _check(
    patients: int, seed: int, size: tuple[int, int, int], scans: tuple[int, int], site: str, share: float
) -> None:
    rules = (
        ("patients", patients, patients >= 1, "1 or more"),
        ("seed", seed, seed >= 0, "0 or more"),
        ("size", size, len(size) == 3 and min(size) >= 16, "three numbers (D, H, W), each 16 or more"),
        ("scans_per_patient", scans, 1 <= scans[0] <= scans[1], "fewest and most scans, 1 <= fewest <= most"),
        ("longitudinal_share", share, 0.0 <= share <= 1.0, "between 0 and 1"),
        ("site", site, bool(site.strip()) and "/" not in site, "a site's name"),
    )
    for name, value, holds, wanted in rules:
        if not holds:
            raise ConfigError("E_VALUE", where=f"phantom: {name}", found=repr(value), wanted=wanted)


def _draw(
    number: int, seed: int, size: tuple[int, int, int], scans: tuple[int, int], site: str, share: float
) -> PhantomPatient:
    rng = np.random.default_rng([seed, site_key(site), number, 1000])
    sex: Literal["M", "F"] = "M" if rng.random() < 0.7 else "F"
    smoking: Literal["ever", "never"] = "ever" if rng.random() < 0.65 else "never"
    age = round(float(np.clip(rng.normal(68.0, 8.0), 45.0, 89.0)), 1)
    fast = bool(rng.random() < 0.4)
    start = round(float(0.05 + 0.30 * rng.beta(1.2, 1.4)), 4)
    rate = round(float(rng.uniform(0.10, 0.20) if fast else rng.uniform(0.03, 0.06)), 4)
    risk = _log_risk(age, sex, smoking)
    time_days, event = _outcome(rng, risk, start, rate)
    repeated = rng.random() < share
    count = int(rng.integers(scans[0], scans[1] + 1)) if repeated else 1
    first = datetime.date(2012, 1, 2) + datetime.timedelta(days=int(rng.integers(0, 2600)))
    born = first - datetime.timedelta(days=round(age * DAYS_PER_YEAR))
    days = _visit_days(rng, count, time_days)
    visits = tuple(_visit(rng, k, day, site, start, rate, risk) for k, day in enumerate(days))
    return PhantomPatient(
        patient_id=_patient_id(site, seed, number),
        site=site,
        number=number,
        cohort_seed=seed,
        size=(int(size[0]), int(size[1]), int(size[2])),
        age=age,
        sex=sex,
        smoking=smoking,
        subtype="fast" if fast else "slow",
        extent_at_start=start,
        rate_per_year=rate,
        time_days=time_days,
        event=event,
        first_date=first.isoformat(),
        birth_date=born.isoformat(),
        visits=visits,
    )


def _patient_id(site: str, seed: int, number: int) -> str:
    """An id as hospitals write it: the site's prefix and six digits, different for every patient of the cohort."""
    # 389,171 has no factor in common with a million, so the numbers do not repeat.
    return f"{site_style(site).prefix}-{(seed * 7919 + site_key(site) + number * 389_171) % 1_000_000:06d}"


def _extent(start: float, rate: float, years: float) -> float:
    return 1.0 - (1.0 - start) * float(np.exp(-rate / (1.0 - start) * years))


def _log_risk(age: float, sex: str, smoking: str) -> float:
    """Log hazard per year of a patient without disease."""
    return LOG_HAZARD + PER_YEAR_OF_AGE * (age - 68.0) + OF_MEN * (sex == "M") + OF_SMOKERS * (smoking == "ever")


def _outcome(
    rng: np.random.Generator, risk: float, start: float, rate: float
) -> tuple[int, Literal["death", "censored", "transplant"]]:
    """Days from the first CT, and what ended them: death by the hazard, the end of the study, or a transplant."""
    t = np.linspace(0.0, _HORIZON_YEARS, 2401)
    extent = 1.0 - (1.0 - start) * np.exp(-rate / (1.0 - start) * t)
    hazard = np.exp(risk + PER_EXTENT * extent)
    cumulative = np.concatenate([[0.0], np.cumsum((hazard[1:] + hazard[:-1]) / 2 * np.diff(t))])
    death = float(np.interp(rng.exponential(), cumulative, t, right=np.inf))
    end = float(rng.uniform(1.5, 7.0))
    transplant = float(rng.uniform(0.7, 5.0)) if rng.random() < _TRANSPLANT_SHARE else np.inf
    time = min(death, end, transplant)
    event: Literal["death", "censored", "transplant"] = "censored"
    if time < end:
        event = "death" if time == death else "transplant"
    return max(_SHORTEST_DAYS, round(time * DAYS_PER_YEAR)), event


def _visit_days(rng: np.random.Generator, count: int, time_days: int) -> list[int]:
    """Irregular days, the first 0; drawn closer together if the patient's time is short, so all lie before its end."""
    days = np.concatenate([[0.0], np.cumsum(rng.uniform(150.0, 480.0, count - 1))])
    last = days[-1]
    if last > 0.97 * time_days:
        days *= 0.97 * time_days / last
    return [int(day) for day in days]


def _visit(
    rng: np.random.Generator, k: int, day: int, site: str, start: float, rate: float, risk: float
) -> PhantomVisit:
    style = site_style(site)
    extent = _extent(start, rate, day / DAYS_PER_YEAR)
    kernels: tuple[Literal["soft", "standard", "sharp"], ...] = ("soft", "standard", "sharp")
    return PhantomVisit(
        scan_id=f"CT{k + 1}",
        days=day,
        extent=round(extent, 5),
        hazard=round(float(np.exp(risk + PER_EXTENT * extent)), 5),
        breath_mm=round(float(np.clip(rng.normal(0.0, 6.0), -13.0, 13.0)), 2),
        shift_mm=tuple(round(float(v), 2) for v in rng.uniform(-1.0, 1.0, 3) * (7.0, 5.0, 6.0)),  # type: ignore[arg-type]
        turn_deg=round(float(rng.normal(0.0, 1.2)), 2),
        kernel=kernels[int(rng.choice(3, p=style.kernel_shares))],
        thickness_mm=float(rng.choice([1.0, 1.25, 3.0, 5.0], p=[0.4, 0.3, 0.2, 0.1])),
        noise_hu=round(float(style.noise_hu * rng.uniform(0.8, 1.3)), 2),
    )
