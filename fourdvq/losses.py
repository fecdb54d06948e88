"""Losses of stage 1 besides the quantiser's own: L1, the adversarial pairs, feature matching, the adaptive weight.

Sources: paper equations 2, 3 and 5; hinge form, feature matching and adaptive weight from the released code and its
ancestors. Every function returns a scalar and computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ADAPTIVE_MAX = 1e4
ADAPTIVE_EPS = 1e-4


def l1_loss(recon: Tensor, scan: Tensor) -> Tensor:
    """Mean absolute difference of two (B, 1, D, H, W)."""
    return F.l1_loss(recon.float(), scan.float())


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2 on plain logits of any shape."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean of the logits."""
    return -fake.float().mean()


def log_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-(log D(x) + log(1 - D(x'))) with D = sigmoid(logit): what the discriminator minimises of equation 3."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def log_generator(fake: Tensor) -> Tensor:
    """log(1 - D(x')), which the generator minimises; as printed in equation 3, not the non-saturating form."""
    return -F.softplus(fake.float()).mean()


@dataclass(frozen=True)
class GanLoss:
    """A pair: discriminator(real logits, fake logits) and generator(fake logits)."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


GAN_LOSSES = {
    "hinge": GanLoss(hinge_discriminator, hinge_generator),
    "log": GanLoss(log_discriminator, log_generator),
}


def feature_matching(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean absolute difference; `real` gets no gradient. Source: code, equal layer weights."""
    if len(real) != len(fake) or not real:
        raise ValueError(f"{len(real)} and {len(fake)} feature maps cannot be matched")
    return torch.stack([F.l1_loss(f.float(), r.detach().float()) for r, f in zip(real, fake, strict=True)]).sum()


def adaptive_weight(reconstruction: Tensor, recon: Tensor, pull: Tensor, last_layer: Tensor) -> Tensor:
    """|grad reconstruction| / |grad adversarial| at the decoder's last weights: balances the two losses. No gradient.

    `pull` is the gradient of the adversarial loss with respect to `recon`. Source: Esser et al. 2021, taming
    transformers, equation 7. Both `reconstruction` and `recon` must still hold their graph.
    """
    wanted = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0]
    got = torch.autograd.grad(recon, last_layer, pull, retain_graph=True)[0]
    ratio: Tensor = torch.linalg.vector_norm(wanted) / (torch.linalg.vector_norm(got) + ADAPTIVE_EPS)
    return ratio.clamp(0.0, ADAPTIVE_MAX).detach()
