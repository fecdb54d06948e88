"""Encoder and decoder of the 3D-VQ-GAN. Source: paper section 2.1; widths and layers from its released code.

h base width, r compression per axis, L = log2 r levels. The published decoder is not the encoder's mirror: its first
upsampling keeps the width. Axes: B batch, D H W voxels, d h w = D/r H/r W/r.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fourdvq.models.blocks import (
    Conv3dSame,
    ConvTranspose3dSame,
    Norm,
    NormSiLU,
    Padding,
    ResBlock3d,
    levels_of,
    voxel_shuffle,
)

Variant = Literal["tats", "thin", "half"]

SHUFFLE = 2  # the half decoder stops at 1/2 of the size


class Encoder3d(nn.Sequential):
    """(B, 1, D, H, W) -> (B, h 2^L, d, h, w): conv3, then per level a strided conv4 and one residual block."""

    def __init__(self, base_width: int, compression: int, *, norm: Norm, padding: Padding):
        levels = levels_of(compression)
        layers: list[nn.Module] = [Conv3dSame(1, base_width, padding=padding)]
        for level in range(levels):
            width = base_width * 2**level
            layers.append(Conv3dSame(width, 2 * width, 4, stride=2, padding=padding))
            layers.append(ResBlock3d(2 * width, norm=norm, padding=padding))
        layers.append(NormSiLU(base_width * 2**levels, norm=norm))
        super().__init__(*layers)
        self.width = base_width * 2**levels


class Decoder3d(nn.Module):
    """(B, h 2^L, d, h, w) -> (B, 1, D, H, W) without an output activation.

    Per level a transposed conv4 and two residual blocks. `tats` is the published layout (for r = 4 and h = 32: 128
    channels at 1/2 size, 64 at full size); `thin` has h channels at full size; `half` has no layer at full size:
    eight channels at 1/2 size become the voxels (three times less arithmetic).
    """

    def __init__(self, base_width: int, compression: int, *, variant: Variant, norm: Norm, padding: Padding):
        super().__init__()
        width = base_width * 2 ** levels_of(compression)
        layers: list[nn.Module] = [NormSiLU(width, norm=norm)]
        for following in decoder_widths(base_width, compression, variant):
            layers.append(ConvTranspose3dSame(width, following, padding=padding))
            layers += [ResBlock3d(following, norm=norm, padding=padding) for _ in range(2)]
            width = following
        self.shuffled = variant == "half"
        self.body = nn.Sequential(*layers)
        self.last = Conv3dSame(width, SHUFFLE**3 if self.shuffled else 1, padding=padding)
        if self.shuffled:
            _start_as_nearest(self.last)

    def forward(self, z: Tensor) -> Tensor:
        """(B, h 2^L, d, h, w) -> (B, 1, D, H, W)."""
        x = self.last(self.body(z))
        return voxel_shuffle(x, SHUFFLE) if self.shuffled else x


def _start_as_nearest(last: Conv3dSame) -> None:
    """Give all eight sub-voxels one filter to begin with, so that the untrained shuffle repeats a voxel.

    Independent filters draw a checkerboard that training has to undo. Source: Aitken et al. 2017, arXiv:1707.02937.
    """
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))


def decoder_widths(base_width: int, compression: int, variant: Variant) -> list[int]:
    """Channels after each upsampling. For h = 32, r = 4: tats 128 64, thin 128 32, half 128."""
    levels = levels_of(compression)
    widths = [base_width * 2**levels] + [base_width * 2 ** (levels - i) for i in range(1, levels)]
    if variant == "half":
        return widths[:-1]
    if variant == "thin":
        widths[-1] = base_width
    return widths
