"""The training step that public 3D-VQ-GAN code takes, stated again to measure against: layers, losses, two passes.

Replicate padding as a copy before an unpadded convolution, norm and SiLU as separate layers, an N x K one-hot matrix in
the codebook, and a loop over two optimisers: the generator runs once for its own losses and once more for the
discriminators', and the codebook moves both times. Discriminators always run. GroupNorm stands where the published
code has BatchNorm, so that a comparison with ours is of the step and not of the norm. Facts: docs/reference/model.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourdvq.models.blocks import norm3d
from fourdvq.models.discriminators import build_discriminator

DECAY, EPS = 0.99, 1e-7


class PaddedConv(nn.Module):
    """Replicate padding, larger half first, then a convolution without padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        total = kernel - stride
        self.pad = (total - total // 2, total // 2) * 3
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, self.pad, mode="replicate"))
        return out


class PaddedUpConv(nn.Module):
    """Replicate padding and a transposed convolution that doubles the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(inputs, outputs, 4, 2, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (1,) * 6, mode="replicate"))
        return out


class Residual(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [[norm3d("group", channels), nn.SiLU(), PaddedConv(channels, channels)] for _ in range(2)]
        self.body = nn.Sequential(*layers[0], *layers[1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class UsualCodebook(nn.Module):
    """Distances and assignments as whole matrices; codes follow running averages in every training forward."""

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, n_codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(n_codes, dim))
        self.register_buffer("counts", torch.ones(n_codes))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        flat = z.movedim(1, -1).flatten(0, -2)
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ self.codes.t() + self.codes.square().sum(1)
        chosen = distances.argmin(1)
        one_hot = F.one_hot(chosen, len(self.codes)).to(flat.dtype)
        quantised = F.embedding(chosen, self.codes).view(z.movedim(1, -1).shape).movedim(-1, 1)
        commitment = 0.25 * F.mse_loss(z, quantised.detach())
        with torch.no_grad():
            self.counts.mul_(DECAY).add_(one_hot.sum(0), alpha=1 - DECAY)
            self.sums.mul_(DECAY).add_(one_hot.t() @ flat, alpha=1 - DECAY)
            total = self.counts.sum()
            self.codes.copy_(self.sums / ((self.counts + EPS) / (total + len(self.codes) * EPS) * total)[:, None])
        return z + (quantised - z).detach(), commitment


class UsualGenerator(nn.Module):
    """Compression 4: encoder h, 2h, 4h; decoder 4h at half size and 2h at full size, two residual blocks each."""

    def __init__(self, width: int, n_codes: int, dim: int) -> None:
        super().__init__()
        deep = 4 * width
        self.encoder = nn.Sequential(
            PaddedConv(1, width),
            PaddedConv(width, 2 * width, 4, 2),
            Residual(2 * width),
            PaddedConv(2 * width, deep, 4, 2),
            Residual(deep),
            norm3d("group", deep),
            nn.SiLU(),
            nn.Conv3d(deep, dim, 1),
        )
        self.codebook = UsualCodebook(n_codes, dim)
        self.decoder = nn.Sequential(
            nn.Conv3d(dim, deep, 1),
            norm3d("group", deep),
            nn.SiLU(),
            PaddedUpConv(deep, deep),
            Residual(deep),
            Residual(deep),
            PaddedUpConv(deep, 2 * width),
            Residual(2 * width),
            Residual(2 * width),
            PaddedConv(2 * width, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, commitment = self.codebook(self.encoder(x))
        return self.decoder(z), commitment


class UsualStep:
    """One micro-batch of the two-optimiser loop: gradients for the generator, then for the discriminators."""

    def __init__(self, width: int, *, n_codes: int, dim: int, judges: int) -> None:
        self.generator = UsualGenerator(width, n_codes, dim)
        self.judges = [build_discriminator(d, width=judges) for d in (2, 3)]

    def __call__(self, scan: Tensor, row: int) -> None:
        """`scan` (1, 1, D, H, W); `row` is the axial slice that D2 sees."""
        self._train(self.generator)
        recon, commitment = self.generator(scan)
        loss = 4 * F.l1_loss(recon, scan) + commitment
        for judge, real, fake in self._views(scan, recon, row):
            told, wanted = judge(fake), judge(real)
            loss = loss - told[-1].mean()
            loss = loss + 4 * sum(F.l1_loss(a, b.detach()) for a, b in zip(told[:-1], wanted[:-1], strict=True))
        torch.autograd.backward(loss)
        self._train(*self.judges)
        recon, _ = self.generator(scan)
        losses = [
            0.5 * (F.relu(1 - judge(real)[-1]).mean() + F.relu(1 + judge(fake)[-1]).mean())
            for judge, real, fake in self._views(scan, recon.detach(), row)
        ]
        torch.autograd.backward(torch.stack(losses).sum())

    def _train(self, *chosen: nn.Module) -> None:
        """Only `chosen` get gradients in this half of the loop."""
        for net in (self.generator, *self.judges):
            net.requires_grad_(net in chosen)

    def _views(self, scan: Tensor, recon: Tensor, row: int) -> list[tuple[nn.Module, Tensor, Tensor]]:
        return [(self.judges[0], scan[:, :, row], recon[:, :, row]), (self.judges[1], scan, recon)]
