"""MIND-SSC: what a place looks like compared with itself, whatever the scanner's grey values. In torch, on any device.

The descriptor has 12 numbers a voxel: how alike are two of its six neighbours, for every pair that is not opposite.
Source: Heinrich et al., "Towards realtime multimodal fusion for image-guided interventions using
self-similarities", MICCAI 2013.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fourdvq.errors import RegistrationError

CHANNELS = 12
_LEAST_CONTRAST = 1e-4  # HU squared: rounding in a warped constant image is below it, any real scan far above
_NEIGHBOURS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))


def gaussian_taps(sigma: float) -> list[float]:
    """Weights of a Gaussian cut at 1.5 sigma (2 ceil(1.5 sigma) + 1 taps), with sum 1."""
    half = math.ceil(1.5 * sigma)
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-half, half + 1)]
    return [t / sum(taps) for t in taps]


def filtered(values: Tensor, taps: Sequence[float]) -> Tensor:
    """Correlation with the same odd taps along each of the last three axes; the border is repeated."""
    half = len(taps) // 2
    for axis in (-3, -2, -1):
        padded = padded_by_border(values, half, axis)
        size = values.shape[axis]
        total = padded.narrow(axis, half, size) * taps[half]
        for offset, tap in enumerate(taps):
            if offset != half and tap != 0.0:
                total.add_(padded.narrow(axis, offset, size), alpha=tap)
        values = total
    return values


def padded_by_border(values: Tensor, width: int, axis: int) -> Tensor:
    """`values` with its first and last layer along an axis repeated `width` times."""
    size = values.shape[axis]
    shape = list(values.shape)
    shape[axis] = width
    first, last = values.narrow(axis, 0, 1).expand(shape), values.narrow(axis, size - 1, 1).expand(shape)
    return torch.cat([first, values, last], dim=axis)


def mind_ssc(image: Tensor, *, delta: int = 1, sigma: float = 1.0) -> Tensor:
    """Features in (0, 1], float32 (12, D, H, W), of an image (D, H, W); lengths in voxels.

    Neighbours are `delta` voxels away; their squared differences are averaged with a Gaussian of `sigma`.
    Raises RegistrationError E_REG for an image of one grey value, or not finite: it has nothing to describe.
    """
    image = image.to(torch.float32)
    taps = gaussian_taps(sigma)
    margin = 2 * delta + len(taps) // 2  # what a neighbour's average reaches
    around = F.pad(image[None, None], [margin] * 6, mode="replicate")[0, 0]
    smoothed = {step: _self_difference(around, step, taps) for step in _steps(delta)}
    features = torch.empty((CHANNELS, *image.shape), dtype=torch.float32, device=image.device)
    for channel, (first, second) in enumerate(_pairs(delta)):
        step = tuple(b - a for a, b in zip(first, second, strict=True))
        if step not in smoothed:  # the same difference, seen from its other end
            first, step = second, tuple(-s for s in step)
        features[channel] = _shifted(smoothed[step], first, image.shape, margin)
    features -= features.amin(dim=0)
    variance = features.mean(dim=0)
    level = float(variance.double().mean())
    if not level > _LEAST_CONTRAST:
        raise RegistrationError("E_REG", where="the image features", found="an image without contrast")
    variance.clamp_(0.001 * level, 1000.0 * level)
    return features.div_(variance).neg_().exp_()


def mind_distance(fixed: np.ndarray, moved: np.ndarray, mask: np.ndarray, device: str = "cpu") -> float:
    """Mean squared difference of the features of two images (D, H, W) inside a mask: 0 if alike, at most 1."""
    inside = torch.from_numpy(mask).to(device)
    with one_thread():
        a, b = (mind_ssc(torch.from_numpy(np.ascontiguousarray(image)).to(device)) for image in (fixed, moved))
        return feature_distance(a, b, inside)


def feature_distance(fixed: Tensor, moved: Tensor, mask: Tensor) -> float:
    """Mean squared difference of features (12, D, H, W) inside a mask (D, H, W); 0 if alike, at most 1."""
    return float((fixed - moved).square_().mean(dim=0)[mask].double().mean())


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: sums over threads differ in the last bit, and a result must not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pairs(delta: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The 12 pairs of neighbours that are not opposite: the edges of an octahedron."""
    places = [tuple(delta * o for o in offset) for offset in _NEIGHBOURS]
    return [(a, b) for a, b in itertools.combinations(places, 2) if any(p != -q for p, q in zip(a, b, strict=True))]


def _steps(delta: int) -> list[tuple[int, ...]]:
    """The six directions of those edges, each in one sense."""
    steps: list[tuple[int, ...]] = []
    for first, second in _pairs(delta):
        step = tuple(b - a for a, b in zip(first, second, strict=True))
        if step not in steps and tuple(-s for s in step) not in steps:
            steps.append(step)
    return steps


def _self_difference(image: Tensor, step: tuple[int, ...], taps: Sequence[float]) -> Tensor:
    """Averaged squared difference of the image and itself one step on; rolled, since the rim is cut off later."""
    return filtered((image - image.roll([-s for s in step], dims=(0, 1, 2))).square_(), taps)


def _shifted(values: Tensor, offset: tuple[int, ...], shape: Sequence[int], margin: int) -> Tensor:
    """The part of a padded array that lies at `offset` from every voxel of the unpadded one."""
    for axis, (o, size) in enumerate(zip(offset, shape, strict=True)):
        values = values.narrow(axis, margin + o, size)
    return values
