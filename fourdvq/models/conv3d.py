"""3D convolutions as fast as a CPU has them, with torch's own arithmetic. Axes: B batch, C channels, D H W voxels.

Torch leaves two things to its caller (measured on one core with AVX-512, torch 2.13). A small float32 volume that is
alone in its batch is convolved without oneDNN, two to five times slower, so `Conv3d` hands it over as two halves. And
oneDNN is up to 1.6 times faster with channels last, forward and towards the input's gradient: `channels_last_on_cpu`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOW_PATH_SIZE = 20_480  # torch, `use_mkldnn` in Convolution.cpp: B C D H up to which a convolution leaves oneDNN


class Conv3d(nn.Conv3d):
    """nn.Conv3d without the slow path of small volumes; without gradients it goes on from one channel channels last."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, inputs, D, H, W) -> (B, outputs, ...), as nn.Conv3d."""
        alone = self.in_channels == 1 and input.device.type == "cpu" and not torch.is_grad_enabled()
        if _takes_slow_path(input):
            out = _conv_in_halves(input, self) if self._keeps_size else super().forward(input)
        elif alone:
            out = _conv_of_one_channel(input, self)
        else:
            out = super().forward(input)
        return fastest_forward(out) if alone else out

    @property
    def _keeps_size(self) -> bool:
        return self.kernel_size == (3, 3, 3) and self.padding == (1, 1, 1) and self.stride == (1, 1, 1)


def channels_last_on_cpu(x: Tensor) -> Tensor:
    """(B, C, D, H, W) with channels last where that is the faster layout, else as it is."""
    return x.contiguous(memory_format=torch.channels_last_3d) if x.device.type == "cpu" else x


def fastest_forward(x: Tensor) -> Tensor:
    """`channels_last_on_cpu` where no gradient is wanted; with gradients x stays as its trainer laid it out."""
    return x if torch.is_grad_enabled() else channels_last_on_cpu(x)


def _conv_of_one_channel(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """conv(x) of (B, 1, D, H, W) with channels last.

    A volume of one channel has the same bytes in either layout; torch takes it as contiguous and so makes its output. A
    second channel of zeros settles it, and costs less than to lay out the many channels anew (0.5 against 1.3 s at
    96x256x256).
    """
    two = channels_last_on_cpu(F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)))
    filters = channels_last_on_cpu(F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, 1)))
    return F.conv3d(two, filters, conv.bias, conv.stride, conv.padding)


def _takes_slow_path(x: Tensor) -> bool:
    """Whether torch would run a 3^3 convolution of this input without oneDNN: one small float32 volume on a CPU."""
    small = x.shape[0] == 1 and x.shape[1:4].numel() <= SLOW_PATH_SIZE
    autocast = torch.is_autocast_enabled("cpu")
    return small and x.shape[2] % 2 == 0 and x.device.type == "cpu" and x.dtype is torch.float32 and not autocast


def _conv_in_halves(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """The same convolution as a batch of two halves along D that overlap by the kernel, which oneDNN accepts."""
    half = x.shape[2] // 2
    padded = F.pad(x, (0, 0, 0, 0, 1, 1))
    halves = torch.cat([padded[:, :, : half + 2], padded[:, :, half:]])
    out = F.conv3d(halves, conv.weight, conv.bias, padding=(0, 1, 1))
    return torch.cat([out[:1], out[1:]], dim=2)
