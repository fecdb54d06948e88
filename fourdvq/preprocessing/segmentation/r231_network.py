"""The U-Net of lungmask R231: one axial slice of 256 x 256 in, a class per pixel out.

Five levels of 64 to 1024 channels; on each, two 3 x 3 convolutions, each followed by ReLU and then batch normalisation;
mean pooling on the way down, bilinear doubling and a 1 x 1 convolution on the way up, beside the level's own features.
Written anew from these facts; names of modules are those of the published weights, so that the file fits.
Source: Hofmanninger et al. 2020, doi 10.1186/s41747-020-00173-2, and the package lungmask 0.2.22 (Apache-2.0).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fourdvq.errors import ModelError

CLASSES = 3  # background, right lung, left lung
LEVELS = 5
_UNUSED = ("residual_input_conv", "residual_batchnorm")  # in the published file, without part in the result
_FIRST = "down_path.0.block.0.weight"


class SliceUNet(nn.Module):
    """(B, 1, H, W) to logarithms of class probabilities (B, 3, H, W); H and W are multiples of 16."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS)]
        self.down_path = nn.ModuleList(
            _Level(before, after) for before, after in zip([1, *widths], widths, strict=False)
        )
        self.up_path = nn.ModuleList(_Up(below, above) for above, below in list(itertools.pairwise(widths))[::-1])
        self.last = nn.Conv2d(width, CLASSES, kernel_size=1)

    def forward(self, slices: Tensor) -> Tensor:
        """One result per slice: none depends on the others of the batch once the module is in evaluation mode."""
        x, beside = slices, []
        for level in self.down_path[:-1]:
            x = level(x)
            beside.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        x = self.down_path[-1](x)
        for up, features in zip(self.up_path, reversed(beside), strict=True):
            x = up(x, features)
        return nn.functional.log_softmax(self.last(x), dim=1)


class _Level(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(before, after, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(after),
            nn.Conv2d(after, after, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(after),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x)
        return result


class _Up(nn.Module):
    def __init__(self, below: int, above: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(below, above, kernel_size=1))
        self.conv_block = _Level(2 * above, above)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        result: Tensor = self.conv_block(torch.cat([self.up(x), features], dim=1))
        return result


def network_from(tensors: Mapping[str, Tensor]) -> SliceUNet:
    """The network with these weights, in evaluation mode; its width is that of the weights.

    Raises ModelError E_WEIGHTS for other names or shapes, E_NONFINITE for values that are not numbers.
    """
    needed = {name: t for name, t in tensors.items() if not any(part in _UNUSED for part in name.split("."))}
    first = needed.get(_FIRST)
    if first is None or first.ndim != 4:
        raise ModelError("E_WEIGHTS", where="the weights of R231", found=f"no usable {_FIRST}")
    broken = [name for name, t in needed.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if broken:
        raise ModelError("E_NONFINITE", where="the weights of R231", found=broken[0])
    network = SliceUNet(int(first.shape[0]))
    try:
        network.load_state_dict(needed)
    except RuntimeError as error:
        found = " ".join(str(error).split())[:200]
        raise ModelError("E_WEIGHTS", where="the weights of R231", found=found) from None
    return network.eval()
