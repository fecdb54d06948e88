"""16-bit arithmetic only where asked for, and only where this machine gets it right.

Some cuDNN releases returned wrong bfloat16 Conv3d results without an error (pytorch issue 163539), so every device is
tried once, with the operations and widths that the generator uses, forward and backward, before it is trusted. A CPU
without bfloat16 instructions would emulate them, slower than float32 is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

_log = logging.getLogger(__name__)

TOLERANCE = 0.05  # relative; the rounding of bfloat16 gives about 0.005
WIDTH = 64  # channels of the generator's widest volumes
SIZE = (4, 16, 16)

# Called with a volume (1, C, D, H, W), filters and the device's dtype; the filters' shapes stand in _FILTERS.
Operation = Callable[[Tensor, Tensor], Tensor]
OPERATIONS: dict[str, Operation] = {
    "conv3d": lambda x, w: F.conv3d(x, w, padding=1),
    "strided conv3d": lambda x, w: F.conv3d(x, w, stride=2, padding=1),
    "transposed conv3d": lambda x, w: F.conv_transpose3d(x, w, stride=2, padding=1),
    "group norm": lambda x, w: F.group_norm(x, WIDTH // 2, w[0, :, 0, 0, 0]),
    "conv2d": lambda x, w: F.conv2d(x[:, :, 0], w[:, :, 0], stride=2, padding=2),
}
_FILTERS = {"strided conv3d": 4, "transposed conv3d": 4, "conv2d": 4}  # edge; 3 elsewhere


@dataclass(frozen=True)
class SelfCheck:
    """How bfloat16 did on a device. `worst` is the operation with the largest relative error, `error` that error."""

    sound: bool
    worst: str
    error: float
    versions: str

    def __str__(self) -> str:
        return f"bfloat16 {self.worst} differs from float32 by {self.error:.3f} ({self.versions})"


def check_bf16(device: str, operations: Mapping[str, Operation] = OPERATIONS) -> SelfCheck:
    """Compare every operation and its gradients in bfloat16 with float32, from the same rounded numbers."""
    versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    if not _has_instructions(device):
        return SelfCheck(False, "arithmetic has no instructions here and", float("inf"), versions)
    # Gradients are compared too, also where the caller wants none.
    with torch.inference_mode(False), torch.enable_grad():
        errors = {name: _error(operation, _FILTERS.get(name, 3), device) for name, operation in operations.items()}
    worst = max(errors, key=lambda name: errors[name])
    return SelfCheck(errors[worst] < TOLERANCE, worst, errors[worst], versions)


@functools.cache
def self_check(device: str) -> SelfCheck:
    """`check_bf16`, once a process and device; a failure is logged."""
    found = check_bf16(device)
    if not found.sound:
        _log.warning("%s: float32 it is", found)
    return found


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> torch.autocast:
    """The context in which networks run: bfloat16 autocast, or no autocast for fp32 or where bfloat16 is unsound."""
    enabled = precision == "bf16" and self_check(str(device)).sound
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _error(operation: Operation, edge: int, device: str) -> float:
    """Largest relative error (norm of the difference over norm) of the output and of both gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, WIDTH, *SIZE, generator=generator).bfloat16()
    filters = (torch.randn(WIDTH, WIDTH, edge, edge, edge, generator=generator) / 40.0).bfloat16()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.to(device, dtype).requires_grad_() for t in (x, filters)]
        out = operation(*inputs)
        towards = torch.linspace(-1.0, 1.0, out.numel(), device=device).view_as(out).to(dtype)
        found.append([t.detach().float() for t in (out, *torch.autograd.grad(out, inputs, towards))])
    errors = [float((rough - exact).norm() / exact.norm()) for exact, rough in zip(*found, strict=True)]
    # A comparison with NaN is false, so a NaN must not hide behind a smaller number.
    return max(error if error == error else float("inf") for error in errors)


def _has_instructions(device: str) -> bool:
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
