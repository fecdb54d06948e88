"""Code shares of phantom scans and their survival: a codebook of lung patches by k-means, in place of a trained model.

The codebook is no 3D-VQ-GAN: 32 centres of (mean HU, spread of HU) over patches of the lung. It is enough to ask if a
selection over sites finds the codes that follow the fibrosis whose true extent drives the deaths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.vq import kmeans2

from fourdvq.data import phantom
from fourdvq.survival import CoxSite
from fourdvq.survival.biomarkers import scaled_age

SIZE = (24, 64, 64)  # voxels of a scan
PATCH = (2, 4, 4)  # voxels of a token
CODES = 32
SITES = ("leuven", "southampton", "oslo", "ghent")


@dataclass(frozen=True)
class PhantomCodes:
    """The sites' tables; `extent`: true diseased share of the lung at the first CT by pseudonym; `severity` (K,): mean
    true severity where the code lies."""

    sites: list[CoxSite]
    extent: dict[str, float]
    severity: np.ndarray

    def follow(self) -> np.ndarray:
        """(K,) correlation over patients between the share of each code and the true extent; 0 for a constant share."""
        X = np.concatenate([site.X for site in self.sites])
        extent = np.array([self.extent[name] for site in self.sites for name in site.ids or ()])
        z = (X - X.mean(axis=0)) / np.where(X.std(axis=0) > 0, X.std(axis=0), 1.0)
        return np.asarray((z * ((extent - extent.mean()) / extent.std())[:, None]).mean(axis=0))


def phantom_codes(sizes: Sequence[int], *, seed: int = 1) -> PhantomCodes:
    """First scans of so many phantom patients a site, as tables of code shares."""
    people = [
        patient
        for site, n in zip(SITES, sizes, strict=False)
        for patient in phantom.draw_patients(n, seed, size=SIZE, scans_per_patient=(1, 1), site=site)
    ]
    tokens = [_tokens(patient) for patient in people]
    rng = np.random.default_rng(seed)
    pool = np.concatenate([features for features, _ in tokens])
    scale = pool.std(axis=0)
    centres, _ = kmeans2(pool[rng.permutation(len(pool))[:20_000]] / scale, CODES, minit="++", seed=rng)
    codes = [_nearest(features / scale, centres) for features, _ in tokens]
    together, ill = np.concatenate(codes), np.concatenate([severity for _, severity in tokens])
    counts = np.bincount(together, minlength=CODES)
    tables = []
    for site in SITES[: len(sizes)]:
        own = [k for k, patient in enumerate(people) if patient.site == site]
        tables.append(_table(site, [people[k] for k in own], [codes[k] for k in own]))
    extent = {patient.patient_id: patient.extent_at_start for patient in people}
    return PhantomCodes(tables, extent, np.bincount(together, ill, CODES) / np.maximum(counts, 1))


def _tokens(patient: phantom.PhantomPatient) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, 2) mean and spread of HU, and (tokens,) mean true severity, of the patches that lie in the lung."""
    made = phantom.scan(patient, patient.visits[0])
    hu, lung, severity = (_patches(a) for a in (np.asarray(made.volume.hu), made.lung, made.severity))
    inside = lung.mean(axis=1) > 0.9
    return np.column_stack([hu[inside].mean(axis=1), hu[inside].std(axis=1)]), severity[inside].mean(axis=1)


def _patches(volume: np.ndarray) -> np.ndarray:
    """(tokens, voxels of a patch) float64."""
    d, h, w = (n // p for n, p in zip(volume.shape, PATCH, strict=True))
    cut = volume.reshape(d, PATCH[0], h, PATCH[1], w, PATCH[2]).transpose(0, 2, 4, 1, 3, 5)
    return cut.reshape(d * h * w, -1).astype(np.float64)


def _nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.asarray(((features[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1))


def _table(site: str, people: Sequence[phantom.PhantomPatient], codes: Sequence[np.ndarray]) -> CoxSite:
    shares = np.stack([np.bincount(found, minlength=CODES) / len(found) for found in codes])
    covariates = [(scaled_age(p.age), float(p.sex == "M"), float(p.smoking == "ever")) for p in people]
    return CoxSite(
        X=shares,
        C=np.array(covariates),
        t=np.array([p.time_days for p in people], dtype=np.float64),
        e=np.array([p.event == "death" for p in people]),
        ids=tuple(p.patient_id for p in people),
        name=site,
        names=("age", "sex", "smoking"),
    )
