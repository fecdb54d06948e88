"""In how many patients each centroid was seen: what the policy's `codebook_min_patients` is held against at the start.

Training counts its own. K codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fourdvq.federation.codebook import CodebookStats
from fourdvq.models.codebook import nearest_codes
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.training.sampling import ScanSource


class SomeScans:
    """The scans at the given positions of another source."""

    def __init__(self, scans: ScanSource, positions: Sequence[int]) -> None:
        self._scans = scans
        self._positions = list(positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Tensor:
        return self._scans[self._positions[index]]

    def patient_of(self, index: int) -> str:
        return self._scans.patient_of(self._positions[index])


class Census:
    """Patients per code, filled with `add`."""

    def __init__(self, n_codes: int) -> None:
        self._n_codes = n_codes
        self._seen: dict[str, Tensor] = {}

    @property
    def patients_per_code(self) -> np.ndarray:
        """(K,) int64."""
        if not self._seen:
            return np.zeros(self._n_codes, dtype=np.int64)
        return torch.stack(list(self._seen.values())).sum(dim=0).numpy()

    def add(self, patient: str, indices: Tensor) -> None:
        """Note the codes (any shape, integers) of one scan."""
        seen = self._seen.setdefault(patient, torch.zeros(self._n_codes, dtype=torch.bool))
        seen[torch.unique(indices.detach().cpu()).long()] = True


@torch.no_grad()
def census_of_centroids(model: VQGAN3d, scans: ScanSource, stats: CodebookStats) -> np.ndarray:
    """(K,) patients with at least one encoder vector nearest to each centroid; unused rows have none."""
    used = (stats.counts > 0).nonzero()[:, 0]
    census = Census(len(stats.counts))
    if not len(used):
        return census.patients_per_code
    device = next(model.parameters()).device
    centres = (stats.sums[used] / stats.counts[used, None]).float().to(device)
    for i in range(len(scans)):
        z = model.encode(scans[i].to(device)[None] - 0.5).float()
        nearest = nearest_codes(z.movedim(1, -1).reshape(-1, z.shape[1]), centres)
        census.add(scans.patient_of(i), used[torch.unique(nearest).cpu()])
    return census.patients_per_code
