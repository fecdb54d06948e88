"""16-bit arithmetic only where asked for, and only where this machine's 3D convolutions get it right.

Some cuDNN releases returned wrong bfloat16 Conv3d results without an error (pytorch issue 163539), so a CUDA device is
tried once before it is trusted.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch
from torch.nn import functional as F

_log = logging.getLogger(__name__)

BF16_TOLERANCE = 0.05  # relative; the rounding of bfloat16 gives about 0.004


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> torch.autocast:
    """The context in which networks run: bfloat16 autocast, or no autocast for fp32 or where bfloat16 is unsound."""
    enabled = precision == "bf16" and bf16_is_sound(str(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@functools.cache
def bf16_is_sound(device: str) -> bool:
    """Whether a 64-channel Conv3d in bfloat16 agrees with float32 on this device; logged with versions if not."""
    if torch.device(device).type != "cuda":
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 8, 16, 16, generator=generator).to(device)
    kernel = torch.randn(64, 64, 3, 3, 3, generator=generator).to(device) / 40.0
    exact = F.conv3d(x, kernel, padding=1)
    rough = F.conv3d(x.bfloat16(), kernel.bfloat16(), padding=1).float()
    error = float((exact - rough).norm() / exact.norm())
    sound = error < BF16_TOLERANCE
    if not sound:
        cudnn = torch.backends.cudnn.version()
        _log.warning(
            "bfloat16 Conv3d is off by %.3f (torch %s, cuDNN %s): float32 it is", error, torch.__version__, cudnn
        )
    return sound
