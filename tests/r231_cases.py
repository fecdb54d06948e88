"""Small networks of R231's form with weights made by hand, the scan they can mask, and their weights as a .pth file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fourdvq.data.volume import Volume
from fourdvq.preprocessing.segmentation.r231_network import SliceUNet

LUNG_HU = {"right": -870, "left": -700}


def formula_tensors(width: int = 4) -> dict[str, Tensor]:
    """Weights that a formula gives, the same in any version of any library; all parts of the network matter."""
    tensors = {}
    for number, (name, like) in enumerate(SliceUNet(width).state_dict().items()):
        waves = torch.sin(torch.arange(like.numel(), dtype=torch.float64) * 0.7 + number).view(like.shape)
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(0)
        elif name.endswith("running_var"):
            tensors[name] = (1.0 + 0.5 * waves).float()
        else:
            tensors[name] = (waves / max(1, like[0].numel()) ** 0.5 + (like.ndim == 1)).float()
    return tensors


def two_bands(width: int = 4) -> dict[str, Tensor]:
    """A network that looks at single pixels: label 1 from -940 to about -790 HU, label 2 from there to about -620."""
    tensors = {name: torch.zeros_like(t) for name, t in SliceUNet(width).state_dict().items()}
    for name, t in tensors.items():
        if name.endswith("running_var") or (t.ndim == 1 and name.endswith(("block.2.weight", "block.5.weight"))):
            t.fill_(1.0)
    above = [(hu + 1024) / 1624 for hu in (-940, -790, -620)]
    for channel, least in enumerate(above):
        tensors["down_path.0.block.0.weight"][channel, 0, 1, 1] = 1.0
        tensors["down_path.0.block.0.bias"][channel] = -least
        tensors["down_path.0.block.3.weight"][channel, channel, 1, 1] = 1.0
        tensors["up_path.3.conv_block.block.0.weight"][channel, width + channel, 1, 1] = 1.0
        tensors["up_path.3.conv_block.block.3.weight"][channel, channel, 1, 1] = 1.0
    tensors["last.bias"][0] = 0.02
    tensors["last.weight"][1, :2, 0, 0] = torch.tensor([10.0, -60.0])
    tensors["last.weight"][2, 1:3, 0, 0] = torch.tensor([60.0, -200.0])
    return tensors


def weights_file(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a .pth as training scripts do; returns its sha256."""
    torch.save(tensors, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def two_lungs(size: tuple[int, int, int] = (24, 96, 96), *, noise: float = 0.0) -> tuple[Volume, np.ndarray]:
    """A scan and its lungs: each of its own HU, with a nodule in the right one and there a pocket like the left one."""
    spacing = (300 / size[0], 380 / size[1], 380 / size[2])
    z, y, x = np.meshgrid(
        *[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing, strict=True)], indexing="ij"
    )
    hu = np.full(size, -1000, dtype=np.int16)
    hu[(y / 115) ** 2 + (x / 165) ** 2 < 1] = 40
    lungs = np.zeros(size, dtype=bool)
    for name, side in (("right", -78), ("left", 78)):
        lung = (z / 110) ** 2 + (y / 75) ** 2 + ((x - side) / 55) ** 2 < 1
        hu[lung] = LUNG_HU[name]
        lungs |= lung
    hu[z**2 + (y - 20) ** 2 + (x + 78) ** 2 < 18**2] = 30
    hu[z**2 + (y + 30) ** 2 + (x + 78) ** 2 < 18**2] = LUNG_HU["left"]
    hu += np.rint(np.random.default_rng(0).normal(0.0, noise, size)).astype(np.int16)
    return Volume(hu, spacing, (-190.0, -190.0, -150.0)), lungs


def blobs(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Labels 0, 1 and 2 in ragged blobs, uint8, from whole numbers only, so the same everywhere; its edge is 0."""
    state, values = seed, []
    for _ in range(int(np.prod(shape))):
        state = (state * 1103515245 + 12345) % (1 << 31)
        values.append(state >> 16)
    noise = np.array(values, dtype=np.int64).reshape(shape)
    for axis in range(3):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)
    labels = np.digitize(noise, np.quantile(noise, [0.35, 0.7], method="lower")).astype(np.uint8)
    inner = np.zeros_like(labels)
    inner[1:-1, 1:-1, 1:-1] = labels[1:-1, 1:-1, 1:-1]
    return inner


def slice_of_ellipses(height: int = 120, width: int = 100) -> np.ndarray:
    """A slice of HU int16 with a body off the middle, two lungs and a table, by whole numbers only."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    hu = np.full((height, width), -1000, dtype=np.int16)
    hu[(y - 55) ** 2 * 1600 + (x - 48) ** 2 * 1225 < 1225 * 1600] = 40
    for middle in (32, 64):
        hu[(y - 55) ** 2 * 144 + (x - middle) ** 2 * 484 < 484 * 144] = -860
    hu[100:103, 10:90] = 200
    return hu
