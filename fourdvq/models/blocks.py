"""Convolutions, normalisation and the residual block that encoder and decoder share.

Layout of the published network: size-preserving convolutions, pre-activation residual blocks, SiLU. Source: paper
section 2.1; layer details from its released code. Axes: B batch, C channels, D H W voxels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fourdvq.models.conv3d import Conv3d
from fourdvq.models.norm_silu import group_norm_silu

Norm = Literal["group", "batch"]
Padding = Literal["zeros", "replicate"]

MAX_GROUPS = 32  # code
GROUP_EPS = 1e-6  # code


def norm3d(kind: Norm, channels: int) -> nn.Module:
    """GroupNorm with min(32, channels / 2) groups (the nearest divisor of `channels` below), or BatchNorm3d."""
    if kind == "batch":
        return nn.BatchNorm3d(channels)
    groups = max(1, min(MAX_GROUPS, channels // 2))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=GROUP_EPS)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU(norm(x)) of (B, C, D, H, W), without leaving a 16-bit dtype for GroupNorm.

    Autocast runs `group_norm` in float32 and so doubles what is kept for the backward pass; the kernel below it, which
    autocast leaves alone, reads and writes 16 bits and takes its statistics in float32, which is all that is needed.
    """
    if not isinstance(norm, nn.GroupNorm):
        return F.silu(norm(x))
    return group_norm_silu(x, norm.weight, norm.bias, groups=norm.num_groups, eps=norm.eps)


class Conv3dSame(nn.Module):
    """Conv3d whose output has size input / stride. `kernel - stride` must be even, so that both sides get the same."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, padding: Padding = "zeros"):
        super().__init__()
        side = _same_side(kernel, stride)
        # Padding stands outside the convolution only where it must: it costs a copy of the volume.
        self.outside = side if padding == "replicate" else 0
        self.conv = Conv3d(inputs, outputs, kernel, stride, padding=0 if self.outside else side)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, D, H, W) -> (B, outputs, D/stride, H/stride, W/stride)."""
        if self.outside:
            x = F.pad(x, (self.outside,) * 6, mode="replicate")
        out: Tensor = self.conv(x)
        return out


class ConvTranspose3dSame(nn.Module):
    """ConvTranspose3d with kernel 4 and stride 2 whose output has twice the input's size."""

    def __init__(self, inputs: int, outputs: int, *, padding: Padding = "zeros"):
        super().__init__()
        kernel, stride = 4, 2
        side = _same_side(kernel, stride)
        self.outside = side if padding == "replicate" else 0
        # One replicated voxel a side is cut off again by the larger padding, which crops the output.
        inside = kernel - 1 if self.outside else side
        self.conv = nn.ConvTranspose3d(inputs, outputs, kernel, stride, padding=inside)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, D, H, W) -> (B, outputs, 2D, 2H, 2W)."""
        if self.outside:
            x = F.pad(x, (self.outside,) * 6, mode="replicate")
        out: Tensor = self.conv(x)
        return out


class ResBlock3d(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), all of one width. Source: code."""

    def __init__(self, channels: int, *, norm: Norm, padding: Padding):
        super().__init__()
        self.norm1 = norm3d(norm, channels)
        self.conv1 = Conv3dSame(channels, channels, padding=padding)
        self.norm2 = norm3d(norm, channels)
        self.conv2 = Conv3dSame(channels, channels, padding=padding)
        self.recompute = False  # keep the input alone and compute the rest again for the gradient

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) -> the same shape."""
        if self.recompute and torch.is_grad_enabled():
            # No layer here draws random numbers, so there is no state of a generator to put back.
            again: Tensor = checkpoint(self._block, x, use_reentrant=False, preserve_rng_state=False)
            return again
        return self._block(x)

    def _block(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        change: Tensor = self.conv2(norm_silu(self.norm2, h))
        return change.add_(x)  # no gradient needs the convolution's own output


class NormSiLU(nn.Module):
    """SiLU(norm(x))."""

    def __init__(self, channels: int, *, norm: Norm):
        super().__init__()
        self.norm = norm3d(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) -> the same shape."""
        return norm_silu(self.norm, x)


def voxel_shuffle(x: Tensor, factor: int = 2) -> Tensor:
    """(B, C * factor^3, D, H, W) -> (B, C, factor D, factor H, factor W): channels become voxels of a cube."""
    b, c, d, h, w = x.shape
    f = factor
    x = x.view(b, c // f**3, f, f, f, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // f**3, d * f, h * f, w * f)


def levels_of(compression: int) -> int:
    """Number of halvings for a compression per axis; ValueError if it is not a power of two above 1."""
    levels = round(math.log2(compression)) if compression > 1 else 0
    if levels < 1 or 2**levels != compression:
        raise ValueError(f"compression {compression} is not a power of two above 1")
    return levels


def _same_side(kernel: int, stride: int) -> int:
    if (kernel - stride) % 2:
        raise ValueError(f"kernel {kernel} with stride {stride} cannot be padded evenly")
    return (kernel - stride) // 2
