"""Perceptual distance: VGG16 features with learned channel weights, from a local file that all sites share.

Source: paper equation 4 (LPIPS, Zhang et al. 2018). Nothing is downloaded. The file is safetensors with the names of
`PerceptualLoss.state_dict()`: `features.<n>.weight/bias` as in torchvision's VGG16 and `heads.<k>` of shape (C,).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from fourdvq.errors import ModelError
from fourdvq.tensors import form_difference

# Channels of VGG16's convolutions; "pool" halves the image. The five blocks end where LPIPS reads features.
VGG16_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# LPIPS, for inputs in [-1, 1] with three channels
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
UNIT_EPS = 1e-10


class PerceptualLoss(nn.Module):
    """Distance of two batches of single-channel slices. Its weights never train."""

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Conv2d] = {}
        self.blocks: list[list[str]] = []
        channels, position = 3, 0
        for block in VGG16_BLOCKS:
            names = []
            for width in block:
                layers[str(position)] = nn.Conv2d(channels, width, 3, padding=1)
                names.append(str(position))
                channels, position = width, position + 2  # torchvision counts each ReLU as a layer
            self.blocks.append(names)
            position += 1  # and each pooling
        self.features = nn.ModuleDict(layers)
        self.heads = nn.ParameterList([nn.Parameter(torch.ones(block[-1])) for block in VGG16_BLOCKS])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, recon: Tensor, scan: Tensor) -> Tensor:
        """Mean distance of slices (B, 1, H, W) in [-0.5, 0.5], each axis at least 16; the gradient reaches `recon`."""
        with torch.no_grad():
            wanted = self._unit_features(scan)
        distances = [
            ((one - other).square() * head.view(1, -1, 1, 1)).sum(dim=1).mean()
            for one, other, head in zip(self._unit_features(recon), wanted, self.heads, strict=True)
        ]
        return torch.stack(distances).sum()

    def _unit_features(self, image: Tensor) -> list[Tensor]:
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        x = (2.0 * image.expand(-1, 3, -1, -1) - shift) / scale  # [-0.5, 0.5] to LPIPS' [-1, 1]
        found = []
        for number, names in enumerate(self.blocks):
            x = F.max_pool2d(x, 2) if number else x
            for name in names:
                x = F.relu(self.features[name](x))
            wide = x.float()
            found.append(wide / (wide.square().sum(dim=1, keepdim=True).sqrt() + UNIT_EPS))
        return found


def load_perceptual(path: Path | None, sha256: str) -> PerceptualLoss:
    """The loss with the weights of a safetensors file whose sha256 is the plan's.

    Raises ModelError E_WEIGHTS if there is no file, its hash is another, or a tensor is missing, extra or misshapen.
    """
    where = str(path) if path else "the perceptual weights"
    if path is None or not path.is_file():
        raise ModelError(
            "E_WEIGHTS",
            where=where,
            found="no file",
            wanted=f"a safetensors file with sha256 {sha256}",
            fix="name the file in site.yaml, or set vqgan.perceptual=none in the plan",
        )
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ModelError("E_WEIGHTS", where=where, found=f"sha256 {found}", wanted=f"sha256 {sha256}")
    try:
        weights = load_tensors(data)
    except SafetensorError as error:
        raise ModelError("E_WEIGHTS", where=where, found=str(error), wanted="a safetensors file") from None
    loss = PerceptualLoss()
    difference = form_difference(weights, loss.state_dict())
    if difference:
        name, has, wants = difference
        raise ModelError("E_WEIGHTS", where=f"{where}: {name}", found=has, wanted=wants)
    loss.load_state_dict(weights)
    return loss


def perceptual_tensors(vgg: dict[str, Tensor], heads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the file above from torchvision's VGG16 state and LPIPS' linear heads (`lin<k>.model.1.weight`).

    Other tensors, such as VGG's classifier, are left out. Raises ModelError E_WEIGHTS if one is missing.
    """
    names = PerceptualLoss().state_dict()
    chosen = {name: vgg[name].float() for name in names if name in vgg}
    for k in range(len(VGG16_BLOCKS)):
        if f"lin{k}.model.1.weight" in heads:
            chosen[f"heads.{k}"] = heads[f"lin{k}.model.1.weight"].float().flatten()
    difference = form_difference(chosen, names)
    if difference:
        name, has, wants = difference
        raise ModelError("E_WEIGHTS", where=name, found=has, wanted=wants)
    return chosen
