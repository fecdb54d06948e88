"""torch.compile, memory layout and fused Adam: faster on some machines, with the same meaning on all."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fourdvq.models.vqgan import VQGAN3d, VQOutput
from fourdvq.plan import VqganTraining
from fourdvq.training.hardware import Hardware
from fourdvq.training.memory import is_out_of_memory

_log = logging.getLogger(__name__)

Forward = Callable[[Tensor], VQOutput]


def wants_compiled(hardware: Hardware, device: torch.device) -> bool:
    """Whether the generator is to be compiled: where the site says so, or by itself on a GPU."""
    return hardware.compile == "always" or (hardware.compile == "auto" and device.type == "cuda")


def memory_format(hardware: Hardware, device: torch.device) -> torch.memory_format:
    """The layout of volumes and filters in the generator."""
    by_itself = device.type == "cuda" and wants_compiled(hardware, device)
    channels_last = hardware.layout == "channels_last" or (hardware.layout == "auto" and by_itself)
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def in_layout(model: VQGAN3d, layout: torch.memory_format) -> VQGAN3d:
    """The model with its filters in `layout`."""
    for parameter in model.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model


def forward_of(model: VQGAN3d, hardware: Hardware, device: torch.device) -> Forward:
    """The generator's forward pass, compiled where wanted; what cannot be compiled here runs as it is."""
    return _Compiled(model) if wants_compiled(hardware, device) else model


def adam(network: nn.Module, training: VqganTraining, device: torch.device) -> torch.optim.Adam:
    """The plan's Adam, all parameters in one kernel where the device has one."""
    fused = device.type in ("cuda", "cpu")
    return torch.optim.Adam(network.parameters(), lr=training.lr, betas=training.betas, fused=fused)


class _Compiled:
    def __init__(self, model: VQGAN3d) -> None:
        self._model = model
        self._compiled: Forward | None = torch.compile(model, dynamic=False)

    def __call__(self, x: Tensor) -> VQOutput:
        if self._compiled is None:
            return self._model(x)
        try:
            return self._compiled(x)
        except Exception as error:  # no compiler, no Triton, an operation that cannot be traced
            if is_out_of_memory(error):
                raise
            _log.warning("torch.compile failed (%s): training goes on without it", type(error).__name__)
            self._compiled = None
            return self._model(x)
