"""Future scans of one patient from a released model: whom, which times, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fourdvq.data.datasets import PreparedCohort, PreparedPatient, load_lung, load_x01, open_prepared
from fourdvq.errors import CohortError, ConfigError, DataError
from fourdvq.generation import check_horizon, generate, times_every
from fourdvq.plan import GIVEN_FOR_EXTRAPOLATION
from fourdvq_client.generated_files import Generated, How, write_generated
from fourdvq_client.preparation import pseudonym_of
from fourdvq_client.released import open_release, world_model
from fourdvq_client.workspace import SiteConfig, Workspace


@dataclass(frozen=True)
class Asked:
    """Which times: an interval up to so many years, or the times themselves; years since the first scan."""

    interval: float | None = None
    years: float | None = None
    times: tuple[float, ...] | None = None

    def resolve(self, last_given: float) -> tuple[float, ...]:
        """The times. Raises ConfigError E_USAGE unless exactly one way of asking is used, DataError E_TIMES."""
        if self.times is not None:
            if not self.times:
                raise DataError("E_TIMES", where="--times", found="no time")
            return self.times
        if self.interval is None or self.years is None:
            raise ConfigError("E_USAGE", where="generate", wanted="--interval with --years, or --times")
        return times_every(self.interval, self.years, last_given=last_given)


def parse_times(text: str) -> tuple[float, ...]:
    """`0.5:3:0.5` (first, last, step) or `0.5,1,2`. Raises DataError E_TIMES."""
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            if step <= 0 or last < first or (last - first) / step > 1000:
                raise ValueError
            return tuple(round(first + k * step, 9) for k in range(int((last - first) / step + 1e-6) + 1))
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError("E_TIMES", where="--times", found=text, wanted="first:last:step or a list") from None


def generate_for(
    workspace: Workspace,
    config: SiteConfig,
    *,
    patient: str = "",
    asked: Asked,
    version: str = "",
    how: How | None = None,
) -> Generated:
    """Generate and write. `patient` is a pseudonym or a real id, empty for the first with two scans.

    What is wrong is found before anything is written, and a former trajectory stays until the new one is complete.
    Raises DataError, ModelError E_RELEASE, CohortError E_PATIENT or E_PROFILE.
    """
    how = how or How()
    release = open_release(workspace, version)
    cohort = open_prepared(workspace.prep)
    if cohort.profile_sha256 != release.plan.profile_sha256:
        raise CohortError("E_PROFILE", where="prep/", found=cohort.profile_sha256[:12], wanted="the model's profile")
    found = _patient(workspace, cohort, patient)
    used = found.scans[: how.given or None]
    years = [scan.years for scan in used]
    if len(used) < GIVEN_FOR_EXTRAPOLATION:
        raise DataError("E_GIVEN", where=f"patient {found.pseudonym}", found=f"{len(used)} approved scan")
    times = asked.resolve(years[-1])
    check_horizon(times, release.plan.temporal, allow=how.beyond_horizon)
    world = replace(world_model(release, config.device), precision=how.precision)
    lung = load_lung(found.scans[0])
    made = generate(
        world,
        torch.stack([load_x01(scan, release.plan.window_hu) for scan in used]),
        years,
        times,
        lung=lung,
        samples=how.samples,
        generator=torch.Generator().manual_seed(how.seed),
        detail=how.detail,
        beyond_horizon=how.beyond_horizon,
    )
    return write_generated(workspace, release, found, used, made, lung, how)


def showcase(workspace: Workspace, config: SiteConfig, *, years_beyond: int = 2) -> Generated:
    """One trajectory to look at: a held-out patient with the most scans, the first two given, the later ones predicted,
    then yearly scans beyond the last real one. Residual detail. Raises DataError E_GIVEN without such a patient."""
    cohort = open_prepared(workspace.prep)
    longest = max(cohort.patients, key=lambda p: (len(p.scans) > 2, p.split == "test", len(p.scans)))
    years = [scan.years for scan in longest.scans]
    later = tuple(math.floor(years[-1]) + k for k in range(1, years_beyond + 1))
    asked = Asked(times=(*years, *(float(t) for t in later)))
    return generate_for(workspace, config, patient=longest.pseudonym, asked=asked, how=How(detail="residual", given=2))


def _patient(workspace: Workspace, cohort: PreparedCohort, named: str) -> PreparedPatient:
    if named:
        pseudonym = pseudonym_of(workspace, named)
        for patient in cohort.patients:
            if patient.pseudonym == pseudonym:
                return patient
        raise CohortError("E_PATIENT", where="prep/", found=f"no approved scan of {pseudonym}")
    for patient in cohort.patients:
        if len(patient.scans) > 1:
            return patient
    raise DataError("E_GIVEN", where="prep/", found="no patient with two approved scans")
