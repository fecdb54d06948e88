"""The gradients of one optimiser step of stage 1, and what each scan of it says about codes and losses.

One generator forward pass per group of scans; the discriminators judge its output once, for both sides. How many scans
go through together is the machine's choice: every loss is a mean over scans and every layer works scan by scan, so the
sum of the groups' gradients is the same. Source: paper equations 2 to 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourdvq.errors import CohortError, ModelError
from fourdvq.losses import adaptive_weight, l1_loss
from fourdvq.models.codebook import assignment_sums
from fourdvq.models.discriminators import axial_slices
from fourdvq.models.vqgan import VQGAN3d, VQOutput
from fourdvq.plan import Plan
from fourdvq.training.acceleration import Forward
from fourdvq.training.adversary import Adversary
from fourdvq.training.precision import autocast
from fourdvq.training.sampling import ScanSource


@dataclass(frozen=True)
class Draw:
    """One scan of a step: which, where its crop begins (D H W), and the axial slice for D2 and the perceptual loss."""

    index: int
    corner: tuple[int, int, int]
    row: int


@dataclass(frozen=True)
class Part:
    """What one scan adds to a step: its codes' counts (K,) and vector sums (K, c), float64, and its group's losses."""

    counts: Tensor
    sums: Tensor
    losses: dict[str, float]

    def row(self) -> Tensor:
        """All of it as one float64 row on the CPU, losses last, in the order of their names."""
        values = torch.tensor([self.losses[name] for name in sorted(self.losses)], dtype=torch.float64)
        return torch.cat([self.counts.cpu(), self.sums.cpu().flatten(), values])


def part_of(row: Tensor, n_codes: int, code_dim: int, names: Sequence[str]) -> Part:
    """The inverse of `Part.row`."""
    counts, sums, values = row.cpu().split([n_codes, n_codes * code_dim, len(names)])
    return Part(counts, sums.view(n_codes, code_dim), dict(zip(sorted(names), values.tolist(), strict=True)))


@dataclass(frozen=True)
class StepGradients:
    """Adds a step's gradients to the generator's and the discriminators' parameters."""

    plan: Plan
    model: VQGAN3d
    forward: Forward  # of the model, perhaps compiled
    perceptual: nn.Module | None
    device: torch.device
    layout: torch.memory_format

    def accumulate(
        self,
        scans: ScanSource,
        draws: Sequence[Draw],
        adversary: Adversary | None,
        *,
        at_once: int,
        on_group: Callable[[Sequence[Part]], None],
    ) -> list[Part]:
        """Gradients of the mean loss over `accumulate` scans, of which `draws` are those of this process.

        `on_group` sees the parts of a group before the next one runs. Raises ModelError E_NONFINITE for a loss that
        is not finite.
        """
        parts: list[Part] = []
        for group in _groups(draws, at_once):
            found = self._group(scans, group, adversary)
            on_group(found)
            parts += found
        return parts

    def volumes(self, scans: ScanSource, draws: Sequence[Draw]) -> Tensor:
        """The (cropped) scans as network input, (B, 1, D, H, W) = x01 - 0.5 on the device."""
        batch = torch.stack([_cropped(self._scan(scans, d.index), d.corner, self.plan.vqgan.crop) for d in draws])
        return batch.to(self.device).sub_(0.5).contiguous(memory_format=self.layout)

    def _scan(self, scans: ScanSource, index: int) -> Tensor:
        scan = scans[index]
        if tuple(scan.shape) != (1, *self.plan.model.size):
            wanted = f"{(1, *self.plan.model.size)}, the plan's model.size"
            fix = "prepare the scans with the federation's profile"
            raise CohortError("E_PROFILE", where="training scan", found=str(tuple(scan.shape)), wanted=wanted, fix=fix)
        return scan

    def _group(self, scans: ScanSource, draws: Sequence[Draw], adversary: Adversary | None) -> list[Part]:
        training = self.plan.vqgan
        scan, rows = self.volumes(scans, draws), torch.tensor([d.row for d in draws])
        with autocast(self.device, training.precision):
            out = self.forward(scan)
        losses = {"loss_rec": l1_loss(out.recon, scan), "loss_commit": out.commitment}
        total = training.l1_weight * losses["loss_rec"] + training.commitment * out.commitment + out.codebook_loss
        if self.plan.model.quantiser == "loss":
            losses["loss_codebook"] = out.codebook_loss
        if self.perceptual is not None:
            with autocast(self.device, training.precision):
                losses["loss_perceptual"] = self.perceptual(axial_slices(out.recon, rows), axial_slices(scan, rows))
            total = total + training.perceptual_weight * losses["loss_perceptual"]
        weight = len(draws) / training.accumulate
        if adversary is None:
            values = _finite_values({**losses, "loss_total": total})
            torch.autograd.backward(total * weight)
        else:
            values = self._with_adversary(adversary, scan, out.recon, rows, total, losses, weight)
        return [Part(*sums, values) for sums in self._code_sums(out)]

    def _with_adversary(
        self,
        adversary: Adversary,
        scan: Tensor,
        recon: Tensor,
        rows: Tensor,
        total: Tensor,
        losses: Mapping[str, Tensor],
        weight: float,
    ) -> dict[str, float]:
        """Both sides' gradients from one look at scan and reconstruction; returns all losses as numbers."""
        gan = self.plan.gan
        with autocast(self.device, self.plan.vqgan.precision):
            judgement = adversary.judge(scan, recon, rows)
        balance: Tensor | float = 1.0
        if gan.adaptive_weight:
            pull = judgement.gradient(judgement.adversarial)
            balance = adaptive_weight(total, recon, pull, self.model.decoder.last.conv.weight)
        against = gan.weight * balance * judgement.adversarial + gan.feature_matching * judgement.matching
        values = _finite_values(
            {
                **losses,
                "loss_adversarial": judgement.adversarial,
                "loss_matching": judgement.matching,
                "loss_total": total + against,
                "loss_discriminator": judgement.own,
            }
        )
        torch.autograd.backward([total * weight, recon], [None, judgement.gradient(against) * weight])
        torch.autograd.backward(judgement.own * weight)
        return values

    def _code_sums(self, out: VQOutput) -> Iterator[tuple[Tensor, Tensor]]:
        """Counts and sums of each scan of a group."""
        spec = self.plan.model
        for z, indices in zip(out.z.detach().float(), out.indices, strict=True):
            vectors = z.movedim(0, -1).reshape(-1, spec.code_dim)
            yield assignment_sums(vectors, indices.flatten(), spec.n_codes)


def loss_names(plan: Plan, *, judged: bool) -> list[str]:
    """The losses that every part of a step reports, sorted."""
    names = ["loss_rec", "loss_commit", "loss_total"]
    names += ["loss_codebook"] if plan.model.quantiser == "loss" else []
    names += ["loss_perceptual"] if plan.vqgan.perceptual != "none" else []
    names += ["loss_adversarial", "loss_matching", "loss_discriminator"] if judged else []
    return sorted(names)


def _groups(draws: Sequence[Draw], at_once: int) -> list[Sequence[Draw]]:
    return [draws[i : i + at_once] for i in range(0, len(draws), at_once)]


def _cropped(x01: Tensor, corner: tuple[int, int, int], crop: tuple[int, int, int] | None) -> Tensor:
    if crop is None:
        return x01
    (z, y, x), (d, h, w) = corner, crop
    return x01[:, z : z + d, y : y + h, x : x + w]


def _finite_values(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """The losses as floats, moved off the device at once; ModelError E_NONFINITE for the first that is not finite."""
    numbers = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
    values = dict(zip(losses, numbers, strict=True))
    for name, value in values.items():
        if not math.isfinite(value):
            raise ModelError("E_NONFINITE", where=name, found=str(value), wanted="a finite loss")
    return values
