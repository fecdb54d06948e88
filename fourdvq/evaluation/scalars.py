"""Numbers that a reader takes from a generated scan, how wrong they were on held-out patients, and their bands.

    density       mean of x01 over the lung
    dense_share   share of the lung above -600 HU, where fibrosis lies; residual detail, as the density
    code_share    largest error over all codes of their shares in the lung: one band that holds for every code at once

Each calibration patient gives one error per number: of the first target after the two given scans. Sites send counts of
these errors over the plan's bins (`fourdvq.evaluation.conformal`), and the coordinator reads the bands off their sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fourdvq.evaluation.conformal import SCALARS, horizon_counts, merged_quantile, public_bins
from fourdvq.evaluation.rows import Case
from fourdvq.evaluation.trajectory import LongitudinalPatient, case_of, horizon_label
from fourdvq.generation import (
    WorldModel,
    check_world,
    code_histogram,
    decode_codes,
    encode_given,
    evaluating,
    predict_codes,
    residual_volumes,
)
from fourdvq.models.latent_ode import snap_times
from fourdvq.plan import EvaluationSpec, Plan

DENSE_ABOVE_HU = -600.0  # high attenuation area begins here


@dataclass(frozen=True)
class ScalarErrors:
    """One calibration patient: years from the last given scan to the target, and the absolute error of each number."""

    ahead: float
    errors: tuple[float, ...]  # in the order of SCALARS


@dataclass(frozen=True)
class Band:
    """A predicted number +- `half_width` holds at least `coverage` of true values; infinite with too few patients."""

    scalar: str
    horizon: str
    coverage: float
    half_width: float
    patients: int


@torch.inference_mode()
def scalar_errors(world: WorldModel, patients: Iterable[LongitudinalPatient], plan: Plan) -> list[ScalarErrors]:
    """Errors of patients with three scans or more, the others left out. ModelError E_TOKENIZER as `check_world`."""
    check_world(world)
    cases = (case_of(patient, plan, "extrapolation") for patient in patients)
    with evaluating(world):
        return [_of_case(world, case, plan.window_hu) for case in cases if case is not None]


def scalar_counts(errors: Sequence[ScalarErrors], spec: EvaluationSpec) -> np.ndarray:
    """Counts (scalars, horizons + 1, bins + 1) int64 over the plan's public bins: all that leaves a site."""
    edges = public_bins(spec.conformal_largest, spec.conformal_bins)
    ahead = [one.ahead for one in errors]
    columns = zip(*(one.errors for one in errors), strict=True) if errors else [()] * len(SCALARS)
    return np.stack([horizon_counts(list(c), ahead, edges, spec.horizon_bins_years) for c in columns])


def bands(counts: np.ndarray, spec: EvaluationSpec) -> list[Band]:
    """Bands for each number, horizon (and all horizons together) and asked coverage, from the sum of sites' counts."""
    edges = public_bins(spec.conformal_largest, spec.conformal_bins)
    middles = [(a + b) / 2 for a, b in zip((0.0, *spec.horizon_bins_years), spec.horizon_bins_years, strict=False)]
    labels = [horizon_label(m, spec.horizon_bins_years) for m in (*middles, float("inf"))]
    found = []
    for name, by_horizon in zip(SCALARS, counts, strict=True):
        for label, row in (("all", by_horizon.sum(axis=0)), *zip(labels, by_horizon, strict=True)):
            found += [
                Band(name, label, coverage, merged_quantile([row], edges, coverage), int(row.sum()))
                for coverage in spec.conformal_coverages
            ]
    return found


def _of_case(world: WorldModel, case: Case, window_hu: tuple[float, float]) -> ScalarErrors:
    """The first target of a patient, as predicted from the two given scans."""
    grid, n_codes = world.ode.spec.grid, world.vqgan.spec.n_codes
    year, target = snap_times(case.years[:1], grid), case.targets[0]
    given = encode_given(world, case.scans, snap_times(case.years_given, grid), case.lung)
    zhat = predict_codes(world, given, year)
    volume = residual_volumes(world, given, case.scans, year, zhat)[0]
    codes = decode_codes(world, given, zhat[0], requantise=True)[1]
    true_codes = encode_given(world, target[None, None], [0.0], case.lung).indices[0]
    shares = [code_histogram(c.cpu(), given.lung.cpu(), n_codes) for c in (codes, true_codes)]
    errors = _errors(volume, target, case.lung, window_hu, shares)
    return ScalarErrors(case.years[0] - case.years_given[-1], errors)


def _errors(
    volume: Tensor, target: Tensor, lung: Tensor, window_hu: tuple[float, float], shares: Sequence[Tensor]
) -> tuple[float, ...]:
    low, high = window_hu
    dense = (DENSE_ABOVE_HU - low) / (high - low)
    ours, true = volume[lung].double(), target[lung].double()
    return (
        abs(float(ours.mean() - true.mean())),
        abs(float((ours > dense).double().mean() - (true > dense).double().mean())),
        float((shares[0] - shares[1]).abs().max()),
    )
