"""Phantom scans in memory for the training experiments, drawn once and kept as HU arrays in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fourdvq.data.phantom import PhantomPatient, draw_patients, scan

WINDOW_HU = (-1000.0, 400.0)


class MemoryScans:
    """A scan source of volumes in memory, x01 (1, D, H, W) each, one patient per scan."""

    def __init__(self, volumes: Sequence[Tensor]) -> None:
        self.volumes = list(volumes)

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> Tensor:
        return self.volumes[index]

    def patient_of(self, index: int) -> str:
        return str(index)


def phantom_scans(
    folder: Path, site: str, count: int, *, seed: int, size: tuple[int, int, int], extent: str = "all"
) -> list[Tensor]:
    """First scans of `count` phantom patients of a site, x01 (1, D, H, W).

    `extent`: all patients as they are drawn, or of twice as many the half with the smaller or the larger extent
    ("mild", "severe"), in the order drawn. Rendered volumes are kept in `folder`, HU int16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{site}-{extent}-{count}-{seed}-{'x'.join(map(str, size))}.npy"
    path = folder / name
    if not path.is_file():
        patients = _chosen(draw_patients(count * (1 if extent == "all" else 2), seed, size=size, site=site), extent)
        volumes = np.stack([scan(p, p.visits[0]).volume.hu for p in patients])
        np.save(path.with_suffix(".part.npy"), volumes)
        path.with_suffix(".part.npy").replace(path)
    low, high = WINDOW_HU
    hu = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    return list(((hu - low) / (high - low)).clamp(0.0, 1.0)[:, None])


def _chosen(patients: Sequence[PhantomPatient], extent: str) -> list[PhantomPatient]:
    if extent == "all":
        return list(patients)
    ordered = sorted(patients, key=lambda p: p.extent_at_start, reverse=extent == "severe")
    kept = {p.number for p in ordered[: len(patients) // 2]}
    return [p for p in patients if p.number in kept]
