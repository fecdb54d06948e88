"""When memory runs out: the same arithmetic in smaller pieces, once, and then a code.

Two ways to need less: fewer scans in one forward pass, whose gradients are added up all the same, and residual blocks
that are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import nn

from fourdvq.models.blocks import ResBlock3d

# How torch's CPU allocator says it; CUDA has a class of its own.
_CPU_ALLOCATOR = "can't allocate memory"
# glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD: trim late, grow by 64 MiB, and use the heap up to 32 MiB.
_KEEPING = ((-1, 2**31 - 1), (-2, 2**26), (-3, 2**25))


@dataclass(frozen=True)
class Fit:
    """How a step is cut: scans in one forward pass, and whether blocks are computed again."""

    at_once: int
    recompute: bool

    def smaller(self) -> Fit | None:
        """The smallest cut, or None where this is it: there is one retry, not a ladder of them."""
        smallest = Fit(1, True)
        return None if self == smallest else smallest


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, so that the next step need not ask the kernel for the same pages again.

    For a process that does nothing but train or generate: on a CPU page faults are 3 to 8 % of a training step
    (measured at 16x64x64). Only glibc has the setting; returns whether it was made.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _KEEPING)


def set_recompute(network: nn.Module, recompute: bool) -> None:
    """Let the residual blocks of `network` keep their input alone (True) or all they need for the gradient (False)."""
    for module in network.modules():
        if isinstance(module, ResBlock3d):
            module.recompute = recompute


def free_device_memory(device: torch.device) -> None:
    """Give cached blocks back, so that the smaller pieces do not meet the fragments of the larger ones."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
