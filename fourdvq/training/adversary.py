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
    """What the discriminators say of one micro-batch, real and reconstructed seen once each.

    All losses hang on one graph that begins at `seen`, a copy of the reconstruction without its history: the
    generator takes the gradient with respect to it, the discriminators that of `own`.
    """

    adversarial: Tensor  # scalar: what the generator wants small, D2 and D3 together
    matching: Tensor  # scalar: feature distance between real and reconstructed
    own: Tensor  # scalar: what the discriminators want small
    seen: Tensor  # as the reconstruction

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d reconstruction of a loss made of `adversarial` and `matching`; no parameter gets a gradient."""
        return torch.autograd.grad(loss, self.seen, retain_graph=True)[0]


class Adversary(nn.Module):
    """D2 and D3. Their gradients come from `Judgement.own` and are applied by the trainer's optimiser."""

    def __init__(self, spec: GanSpec, *, seed: int):
        super().__init__()
        self.loss = GAN_LOSSES[spec.loss]
        with seeded(seed, "discriminators"):
            self.flat = build_discriminator(2, width=spec.width, layers=spec.layers)
            self.solid = build_discriminator(3, width=spec.width, layers=spec.layers)

    def judge(self, scan: Tensor, recon: Tensor, rows: Tensor) -> Judgement:
        """Both sides' losses for scan and recon (B, 1, D, H, W); `rows` (B,) are the axial slices for D2."""
        seen = recon.detach().requires_grad_()
        adversarial, matching, own = [], [], []
        for net, real, fake in self._views(scan, seen, rows):
            real_features, real_logit = features_and_logits(net(real))
            fake_features, fake_logit = features_and_logits(net(fake))
            adversarial.append(self.loss.generator(fake_logit))
            matching.append(feature_matching(real_features, fake_features))
            own.append(self.loss.discriminator(real_logit, fake_logit))
        sums = [torch.stack(losses).sum() for losses in (adversarial, matching, own)]
        return Judgement(adversarial=sums[0], matching=sums[1], own=sums[2], seen=seen)

    def _views(self, scan: Tensor, recon: Tensor, rows: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
        return [
            (self.flat, axial_slices(scan, rows), axial_slices(recon, rows)),
            (self.solid, scan, recon),
        ]
