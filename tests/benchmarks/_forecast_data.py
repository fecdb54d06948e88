"""Phantom patients for the forecast study: scans as a well-registered site would have them, with their truth.

A scan is rendered in the breath and position of the patient's first CT, with the scanner's noise: what a perfect
registration would leave. So whatever differs between two scans of a patient is disease or noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fourdvq.data.datasets import latent_mask
from fourdvq.data.phantom import PhantomPatient, draw_patients
from fourdvq.data.phantom.patients import extent_at
from fourdvq.data.phantom.rendering import grid_of, lung_mask, render, severity
from fourdvq.data.phantom.sites import site_style

WINDOW_HU = (-1000.0, 400.0)
AHEAD_YEARS = 1.0  # how long after the last given scan the true severity is asked for
GIVEN = 2
_REFERENCE_VOXEL_MM3 = 1.33 * 1.33 * 3.0  # at this voxel size a scanner's noise has its stated SD


@dataclass(frozen=True)
class Future:
    """What nobody observed, `AHEAD_YEARS` after the last given scan; volumes (D, H, W)."""

    severity_given: Tensor  # in [0, 1], at the last given scan
    severity: Tensor
    scan: Tensor  # x01, without noise


@dataclass(frozen=True)
class Patient:
    """x01 scans (T, D, H, W) at years (T,), lung (D, H, W), and the truth.

    `ill` (T,) is the true extent of disease at the scans, `ill_ahead` that `AHEAD_YEARS` after the last given one.
    """

    name: str
    years: tuple[float, ...]
    scans: Tensor
    lung: Tensor
    ill: np.ndarray
    ill_ahead: float
    future: Future | None  # of patients whose images are scored

    @property
    def asked(self) -> float:
        return self.years[GIVEN - 1] + AHEAD_YEARS


def cohort(
    folder: Path, site: str, counts: Sequence[int], *, seed: int, size: tuple[int, int, int]
) -> list[list[Patient]]:
    """Groups of different patients of one site, as many in each as `counts` says; kept in `folder` once rendered.

    Patients of the first two groups (training, test) have 3 or 4 scans, those of the others the first two of them; the
    images of the second group's future are kept as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_patients(sum(counts), seed, size=size, scans_per_patient=(3, 4), site=site)
    groups, at = [], 0
    for number, count in enumerate(counts):
        scans = None if number < 2 else GIVEN
        groups.append([_patient(folder, p, scans, number == 1) for p in drawn[at : at + count]])
        at += count
    return groups


def cells(volume: Tensor, lung: Tensor, compression: int) -> tuple[Tensor, Tensor]:
    """Mean of `volume` over the lung voxels of each latent cell, and the latent lung, both (d, h, w)."""
    weight = lung.float()
    pool = torch.nn.functional.avg_pool3d
    total = pool((volume * weight)[None, None], compression)[0, 0]
    share = pool(weight[None, None], compression)[0, 0]
    return torch.where(share > 0, total / share.clamp(min=1e-6), 0.0), latent_mask(lung, compression)


def _patient(folder: Path, patient: PhantomPatient, scans: int | None, with_future: bool) -> Patient:
    visits = patient.visits[:scans]
    years = tuple(v.years for v in visits)
    name = f"{patient.site}-{patient.cohort_seed}-{patient.number}-{len(visits)}{'f' * with_future}"
    path = folder / f"{name}-{'x'.join(map(str, patient.size))}.npz"
    ahead = years[GIVEN - 1] + AHEAD_YEARS
    if not path.is_file():
        arrays = {
            "hu": np.stack([_noisy(patient, i) for i in range(len(visits))]),
            "lung": np.packbits(lung_mask(patient)),
        }
        if with_future:
            arrays["hu_ahead"] = render(patient, ahead).hu
            arrays["severity_given"] = severity(patient, years[GIVEN - 1]).astype(np.float16)
            arrays["severity"] = severity(patient, ahead).astype(np.float16)
        temporary = path.with_suffix(".part.npz")
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    with np.load(path, allow_pickle=False) as kept:
        lung = np.unpackbits(kept["lung"], count=int(np.prod(patient.size))).reshape(patient.size).astype(bool)
        scans_x01 = _x01(kept["hu"])
        future = None
        if with_future:
            given, then = (torch.from_numpy(kept[n].astype(np.float32)) for n in ("severity_given", "severity"))
            future = Future(given, then, _x01(kept["hu_ahead"]))
    return Patient(
        name=f"{patient.site}-{patient.number}",
        years=years,
        scans=scans_x01,
        lung=torch.from_numpy(lung),
        ill=np.array([extent_at(patient, y) for y in years]),
        ill_ahead=extent_at(patient, ahead),
        future=future,
    )


def _noisy(patient: PhantomPatient, index: int) -> np.ndarray:
    visit = patient.visits[index]
    voxel = float(np.prod(grid_of(patient).spacing))
    sd = site_style(patient.site).noise_hu * (_REFERENCE_VOXEL_MM3 / voxel) ** 0.25
    rng = np.random.default_rng([patient.cohort_seed, patient.number, index])
    hu = render(patient, visit.years).hu + sd * rng.standard_normal(patient.size)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)


def _x01(hu: np.ndarray) -> Tensor:
    low, high = WINDOW_HU
    return ((torch.from_numpy(hu.astype(np.float32)) - low) / (high - low)).clamp(0.0, 1.0)
