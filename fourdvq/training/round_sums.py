"""What a round of stage 1 adds up besides gradients: codebook sums, losses, which scans and patients it used.

Everything is added scan by scan in the order of the draws, whatever the machine did at once or on which device.
K codes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fourdvq.federation.codebook import CodebookStats, RunningStats
from fourdvq.plan import Plan
from fourdvq.training.sampling import ScanSource
from fourdvq.training.vqgan_step import Draw, Part


class RoundSums:
    """Filled step by step with `add` or `skip`; `result` ends it."""

    def __init__(self, plan: Plan, scans: ScanSource, *, decay_per_round: float, steps: int) -> None:
        spec = plan.model
        self._running = RunningStats(
            spec.n_codes,
            spec.code_dim,
            decay_per_round=decay_per_round,
            micro_batches=steps * plan.vqgan.accumulate,
        )
        self._scans = scans
        self._used: set[int] = set()
        self._codes_of: dict[str, Tensor] = {}
        self._losses: dict[str, float] = defaultdict(float)
        self._taken: dict[str, int] = defaultdict(int)
        self.skipped = 0
        self.skipped_in_a_row = 0

    @property
    def decay(self) -> float:
        """Of the codebook sums, per scan."""
        return self._running.decay

    def add(self, draws: Sequence[Draw], parts: Sequence[Part]) -> dict[str, float]:
        """A step that was taken; returns its mean losses."""
        self.skipped_in_a_row = 0
        for draw, part in zip(draws, parts, strict=True):
            self._running.add(part.counts, part.sums)
            self._used.add(draw.index)
            seen = part.counts.cpu() > 0
            patient = self._scans.patient_of(draw.index)
            self._codes_of[patient] = self._codes_of.get(patient, torch.zeros_like(seen)) | seen
        losses = {name: sum(p.losses[name] for p in parts) / len(parts) for name in parts[0].losses}
        for name, value in losses.items():
            self._losses[name] += value
            self._taken[name] += 1
        return losses

    def skip(self) -> None:
        """A step that was left out: nothing of its scans counts as used."""
        self.skipped += 1
        self.skipped_in_a_row += 1

    def result(self) -> tuple[CodebookStats, int, int, Tensor, dict[str, float]]:
        """Codebook sums, number of scans and of patients used, patients per code (K,), mean losses.

        A loss is the mean over the steps that had it: the discriminators' begin in the middle of a round.
        """
        patients = torch.stack(list(self._codes_of.values())).sum(dim=0)
        means = {name: value / self._taken[name] for name, value in self._losses.items()}
        return self._running.result(), len(self._used), len(self._codes_of), patients, means
