"""The two judges: D2 sees one axial slice, D3 the whole volume. Source: paper section 2.1, layout from its code.

PatchGAN: width w, 2w, 4w, 8w, 1; kernel 4, strides 2 2 2 1 1, LeakyReLU 0.2; GroupNorm for the code's BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

MAX_GROUPS = 32


def build_discriminator(spatial_dims: Literal[2, 3], *, width: int = 64, layers: int = 3) -> nn.Module:
    """A discriminator from (B, 1, ...) to its list of feature maps, of which the last holds the logits.

    Weights come from torch's global generator. MONAI costs seconds to import and is needed nowhere else in training.
    """
    from monai.networks.nets import PatchDiscriminator

    net: nn.Module = PatchDiscriminator(
        spatial_dims=spatial_dims,
        channels=width,
        in_channels=1,
        num_layers_d=layers,
        norm=("GROUP", {"num_groups": min(MAX_GROUPS, width)}),
        padding=2,
    )
    return net


def axial_slices(volumes: Tensor, rows: Tensor) -> Tensor:
    """Slice `rows[b]` along D of each volume: (B, 1, D, H, W), (B,) int64 -> (B, 1, H, W)."""
    return volumes[torch.arange(len(volumes), device=volumes.device), :, rows.to(volumes.device)]


def features_and_logits(outputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Split what a discriminator returns, in float32."""
    return [o.float() for o in outputs[:-1]], outputs[-1].float()
