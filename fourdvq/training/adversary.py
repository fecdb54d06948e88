"""The discriminators' side of stage 1: their networks, their optimiser, and both halves of the adversarial losses.

They exist from `gan.start_step` on. D2 sees one axial slice per volume, drawn by the trainer, D3 the whole volume.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourdvq.losses import GAN_LOSSES, feature_matching
from fourdvq.models.discriminators import axial_slices, build_discriminator, features_and_logits
from fourdvq.plan import GanSpec
from fourdvq.training.seeds import seeded


@dataclass(frozen=True)
class Judgement:
    """What the discriminators say of one micro-batch."""

    adversarial: Tensor  # scalar: what the generator wants small, D2 and D3 together
    matching: Tensor  # scalar: feature distance between real and reconstructed
    real_logits: tuple[Tensor, Tensor]  # of D2 and D3, with the graph for the discriminators' own step
    rows: Tensor  # (B,) the axial slices that D2 saw


class Adversary(nn.Module):
    """D2 and D3. Their gradients are accumulated by `learn` and applied by the trainer's optimiser."""

    def __init__(self, spec: GanSpec, *, seed: int):
        super().__init__()
        self.loss = GAN_LOSSES[spec.loss]
        with seeded(seed, "discriminators"):
            self.flat = build_discriminator(2, width=spec.width, layers=spec.layers)
            self.solid = build_discriminator(3, width=spec.width, layers=spec.layers)

    def judge(self, scan: Tensor, recon: Tensor, rows: Tensor) -> Judgement:
        """Losses of the generator for scan and recon (B, 1, D, H, W); their gradient reaches `recon` only."""
        adversarial, matching, real_logits = [], [], []
        for net, real, fake in self._views(scan, recon, rows):
            real_features, real_logit = features_and_logits(net(real))
            net.requires_grad_(False)
            fake_features, fake_logit = features_and_logits(net(fake))
            net.requires_grad_(True)
            adversarial.append(self.loss.generator(fake_logit))
            matching.append(feature_matching(real_features, fake_features))
            real_logits.append(real_logit)
        return Judgement(
            torch.stack(adversarial).sum(), torch.stack(matching).sum(), (real_logits[0], real_logits[1]), rows
        )

    def own_loss(self, scan: Tensor, recon: Tensor, judgement: Judgement) -> Tensor:
        """What the discriminators minimise, for the same micro-batch; `recon` is detached here."""
        views = self._views(scan, recon.detach(), judgement.rows)
        losses = [
            self.loss.discriminator(real, features_and_logits(net(fake))[1])
            for (net, _, fake), real in zip(views, judgement.real_logits, strict=True)
        ]
        return torch.stack(losses).sum()

    def _views(self, scan: Tensor, recon: Tensor, rows: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
        return [
            (self.flat, axial_slices(scan, rows), axial_slices(recon, rows)),
            (self.solid, scan, recon),
        ]
