"""CorrField: keypoints in the lung, a dense search at each, agreement along a tree, and a smooth field through them.

Source of the method: Heinrich, Handels and Simpson, "Estimating large lung motion in COPD patients by symmetric
regularised correspondence fields", MICCAI 2015; Hansen and Heinrich, "GraphRegNet", IEEE TMI 2021. Written for this
project: any device, bounded memory, levels truly composed, the spline in mm, a refusal instead of an endless loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from fourdvq.errors import RegistrationError
from fourdvq.preprocessing.grid import empty_image
from fourdvq.preprocessing.profile import RegistrationSpec
from fourdvq.preprocessing.registration.backends import AlignedPair, FoundField, KeypointFacts
from fourdvq.preprocessing.registration.cost import Search, displacement_cost, with_energy
from fourdvq.preprocessing.registration.keypoints import keypoints, require_enough
from fourdvq.preprocessing.registration.mind import feature_distance, filtered, mind_ssc, one_thread
from fourdvq.preprocessing.registration.refine import Refinement, correction
from fourdvq.preprocessing.registration.spline import Spline, fit_spline
from fourdvq.preprocessing.registration.tree import marginals, spanning_tree
from fourdvq.preprocessing.registration.warp import composed, interpolation_matrix, looked_up, separably, warped_image

_OUTSIDE_HU, _DENSEST_HU = 500.0, -300.0
_SPLINE_STRIDE = 4  # voxels between the places where the spline is evaluated


@dataclass(frozen=True)
class Level:
    """One search: its cube and patch, how dense keypoints are, and the ridge of the spline in mm^2 of its kernel."""

    search: Search
    window: int  # half-width in voxels of the cube in which a keypoint is the most distinct
    most: int
    ridge: float


@dataclass(frozen=True)
class Preset:
    """What a named preset does; lengths in voxels of the working grid. Numbers named as in the publication."""

    levels: tuple[Level, ...]
    refinements: int  # rounds, each with the features of the image as it is warped by then
    refinement: Refinement = field(default_factory=Refinement)
    alpha: float = 1.5  # 2.5 in the publication
    beta: float = 150.0  # HU
    gamma: float = 5.0
    sigma: float = 1.4  # of the structure tensor
    apart: float = 3.0  # a keypoint whose way there and way back differ by more steps of its search is left out


PRESETS = {
    "default": Preset(
        levels=(Level(Search(12, 2, 3), 2, 4000, 5000.0), Level(Search(6, 1, 3), 1, 6000, 5000.0)), refinements=2
    ),
    "fast": Preset(
        levels=(Level(Search(12, 2, 3), 3, 2500, 5000.0), Level(Search(6, 1, 2), 2, 4000, 5000.0)), refinements=2
    ),
}


def corrfield_field(pair: AlignedPair, spec: RegistrationSpec, device: str = "cpu") -> FoundField:
    """The displacement between two aligned scans, by the profile's preset; the same each time on one machine.

    Raises RegistrationError E_REG for an image without contrast, and for fewer than 100 keypoints in the lung that are
    found in the other scan and back again.
    """
    preset, mm = PRESETS[spec.preset], spec.spacing_mm
    for hu, mask in ((pair.fixed, pair.fixed_mask), (pair.moving, pair.moving_mask)):
        if hu[mask].size == 0 or np.ptp(hu[mask]) == 0:
            raise RegistrationError("E_REG", where="the lung", found="the same value in all of it")
    with one_thread(), torch.no_grad():
        scans = ((pair.fixed, pair.fixed_share), (pair.moving, pair.moving_share))
        fixed, moving = (torch.from_numpy(bordered(*scan)).to(device) for scan in scans)
        lung = torch.from_numpy(pair.fixed_mask).to(device)
        features = mind_ssc(fixed)
        found = torch.zeros((3, *fixed.shape), dtype=torch.float32, device=device)
        for level in preset.levels:
            points, moves = _correspondences(fixed, features, lung, warped_image(moving, found), level, preset)
            wanted = moves + looked_up(found, (points + moves).T).T
            spline = fit_spline(points * mm, moves * mm, ridge=level.ridge)
            found = composed(dense_field(spline, pair.grid.size, mm) / mm, found)
        for _ in range(preset.refinements):
            step = correction(features, mind_ssc(warped_image(moving, found)), lung, preset.refinement)
            found = composed(step, found)
        after, before = (
            feature_distance(features, mind_ssc(image), lung) for image in (warped_image(moving, found), moving)
        )
        if after >= before:
            found.zero_()  # nothing moved: what was found is the noise of the search
        missed = (looked_up(found, points.T).T - wanted).norm(dim=1).cpu().numpy() * mm
    facts = KeypointFacts(count=len(points), residual_p95_mm=float(np.percentile(missed, 95)))
    return FoundField(_as_image(found.cpu().numpy() * mm, pair), facts)


def bordered(hu: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A scan (D, H, W) in which the masks say where the lung ends, float32: outside one value, far above all lung.

    New dense tissue under the pleura is as bright as the chest wall: by HU alone its inner edge looks like the pleura
    of before, and the field would squeeze the disease out of the lung, with a good overlap to show for it.
    """
    inside = np.minimum(hu, _DENSEST_HU)
    return (share * inside + (1 - share) * _OUTSIDE_HU).astype(np.float32)


def _correspondences(
    fixed: Tensor, features: Tensor, mask: Tensor, moved: Tensor, level: Level, preset: Preset
) -> tuple[Tensor, Tensor]:
    """Keypoints (N, 3) of a level and the displacements that were found for them, both in voxels, float32."""
    search, shape = level.search, (fixed.shape[0], fixed.shape[1], fixed.shape[2])
    points = keypoints(fixed, mask, sigma=preset.sigma, window=level.window, most=level.most)
    grey = filtered(fixed, [0.2] * 5)[tuple(points.T)]
    tree = spanning_tree(points.double().cpu().numpy(), grey.double().cpu().numpy(), preset.beta)
    rows, moved_rows = with_energy(features), with_energy(mind_ssc(moved))
    there = marginals(displacement_cost(rows, moved_rows, shape, points, search, preset.alpha), tree)
    first = expected(there, preset.gamma) * search.step
    ends = points + first.round().long()
    back = marginals(displacement_cost(moved_rows, rows, shape, ends, search, preset.alpha), tree)
    undone = expected(back, preset.gamma) * search.step
    both = there.add_(back.flip((1, 2, 3))).mul_(0.5)
    found = expected(both, preset.gamma) * search.step
    kept = (first + undone).norm(dim=1) <= preset.apart * search.step
    require_enough(int(kept.sum()), "keypoints that the way back confirms")
    return points[kept].float(), found[kept]


def expected(marginal: Tensor, gamma: float) -> Tensor:
    """Mean displacement (N, 3) in steps under the weights softmax(-gamma marginal), marginal (N, s, s, s)."""
    side = marginal.shape[-1]
    weights = torch.softmax(marginal.flatten(1) * -gamma, dim=1).view(marginal.shape)
    at = torch.arange(side, dtype=torch.float32, device=marginal.device) - (side - 1) / 2
    sums = [weights.sum(dim=[a for a in (1, 2, 3) if a != axis]) @ at for axis in (1, 2, 3)]
    return torch.stack(sums, dim=1)


def dense_field(spline: Spline, shape: tuple[int, int, int], mm: float) -> Tensor:
    """A spline of points in mm, evaluated on a coarse lattice and carried to all voxels linearly: (3, D, H, W)."""
    device = spline.points.device
    axes = [torch.arange(0, n - 1 + _SPLINE_STRIDE, _SPLINE_STRIDE, dtype=torch.float32, device=device) for n in shape]
    lattice = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    coarse = spline(lattice.view(-1, 3) * mm).T.reshape(3, *lattice.shape[:3])
    return separably(coarse, [interpolation_matrix(n, a) for n, a in zip(shape, axes, strict=True)])


def _as_image(field_zyx: np.ndarray, pair: AlignedPair) -> sitk.Image:
    """A field (3, D, H, W) in mm along the grid's axes as an image of LPS vectors."""
    along = np.moveaxis(field_zyx[::-1], 0, -1).astype(np.float64)
    image = sitk.GetImageFromArray(along @ np.array(pair.grid.direction).reshape(3, 3).T, isVector=True)
    image.CopyInformation(empty_image(pair.grid))
    return image
