"""The numbers of quality control: what is measured on one scan with its mask, and on a registered pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from fourdvq.data.volume import HU_MIN, Volume
from fourdvq.preprocessing.registration import Registration
from fourdvq.preprocessing.segmentation import field_cuts, filled_body, lung_sides
from fourdvq.preprocessing.segmentation.provided import STRAY_ML

AIR_SPREAD_HU = 25.0  # median absolute deviation: 10 in a whole-body field of view, 33 to 45 in crops
NOISE_SLICES = 16  # enough voxels for a median, in a tenth of a second
SOFT_TISSUE_HU, SOFT_TISSUE_WIDTH_HU = 40.0, 150.0  # fat to muscle with contrast; no lung, no bone
_COARSE_MM = 2.0  # enough to judge a mask's holes and leaks


@dataclass(frozen=True)
class ScanFacts:
    """Measured on one scan and its mask; None where it cannot be seen."""

    lung_ml: float
    right_ml: float
    left_ml: float
    two_lungs: bool
    left_right: float
    components: int  # parts of the mask that have STRAY_ML or more
    touches_edge: bool
    cut_at: tuple[str, ...]  # sides of the image at which the field of view cuts the lung
    hole_percent: float  # of the lung: enclosed by it in 3-D and not in the mask
    leak_percent: float | None  # of the lung: outside the body; not seen where the mask touches the image's edge
    lung_median_hu: float | None
    lung_p5_hu: float | None
    outside_air_hu: float | None
    noise_hu: float | None
    coverage_mm: float
    thickness_mm: float
    filled_slices: int
    voxel_mm: tuple[float, float, float]


def scan_facts(scan: Volume, mask: np.ndarray, *, thickness_mm: float, filled_slices: int = 0) -> ScanFacts:
    """Measure a scan (LPS) and its lung mask, bool (D, H, W)."""
    sides = lung_sides(mask, scan.spacing)
    inside = scan.hu[mask]
    hu, body = filled_body(scan)
    cut_at = field_cuts(scan, mask)
    holes, leak = _mask_faults(mask, body, scan)
    median, p5 = (float(v) for v in np.percentile(inside, (50, 5))) if inside.size else (None, None)
    return ScanFacts(
        lung_ml=float(mask.sum()) * scan.voxel_ml,
        right_ml=sides.right_ml,
        left_ml=sides.left_ml,
        two_lungs=sides.two,
        left_right=sides.ratio,
        components=_parts(mask, scan.voxel_ml),
        touches_edge=bool(cut_at),
        cut_at=cut_at,
        hole_percent=holes,
        leak_percent=None if _touches_edge(mask) else leak,
        lung_median_hu=median,
        lung_p5_hu=p5,
        outside_air_hu=_air(hu, body),
        noise_hu=_noise(scan),
        coverage_mm=coverage_mm(scan),
        thickness_mm=thickness_mm,
        filled_slices=filled_slices,
        voxel_mm=scan.spacing,
    )


def pair_numbers(found: Registration) -> dict[str, float | int | str | None]:
    """What is known about a registration, flat and by name; None where the backend does not measure it."""
    undone, keypoints = found.consistency, found.keypoints
    return {
        "gave_up": found.gave_up,
        "dice_unaligned": found.unaligned.dice,
        "dice_before": found.before.dice,
        "dice": found.after.dice,
        "ncc_unaligned": found.unaligned.ncc,
        "ncc_before": found.before.ncc,
        "ncc": found.after.ncc,
        "surface_p95_mm": found.surface_p95_mm,
        "mind_before": found.mind_before,
        "mind_after": found.mind_after,
        "displacement_mean_mm": found.facts.mean_mm,
        "displacement_p95_mm": found.facts.p95_mm,
        "fold_percent": found.facts.fold_percent,
        "sd_log_j": found.facts.sd_log_j,
        "inverse_mean_mm": undone.mean_mm if undone else None,
        "inverse_p95_mm": undone.p95_mm if undone else None,
        "keypoints": keypoints.count if keypoints else None,
        "keypoint_residual_p95_mm": keypoints.residual_p95_mm if keypoints else None,
    }


def coverage_mm(scan: Volume) -> float:
    """Extent of the scan along z."""
    return float(scan.hu.shape[0] * scan.spacing[0])


def _air(hu: np.ndarray, body: np.ndarray) -> float | None:
    """Median HU of the air around the body, or None if no such air is in view.

    In view means that what lies outside the body is even: in a crop through the lung, and on coarse voxels, it is not,
    and would else be taken for a scan with a wrong intercept. Padding at the lowest value is not air.
    """
    around = ndimage.binary_erosion(~body, np.ones((1, 3, 3), dtype=bool), border_value=1)
    values = hu[around & (hu > HU_MIN)]
    if values.size < 0.01 * hu.size:
        return None
    median = float(np.median(values))
    return median if float(np.median(np.abs(values - median))) <= AIR_SPREAD_HU else None


def _parts(mask: np.ndarray, voxel_ml: float) -> int:
    labels, _ = ndimage.label(mask)
    return int((np.bincount(labels[mask]) * voxel_ml >= STRAY_ML).sum())


def _mask_faults(mask: np.ndarray, body: np.ndarray, scan: Volume) -> tuple[float, float]:
    """Percent of the lung that is holes, and that lies outside the body (given at its own, coarser grid)."""
    if not mask.any():
        return 0.0, 0.0
    step = [max(1, round(_COARSE_MM / s)) for s in scan.spacing]
    coarse = mask[:: step[0], :: step[1], :: step[2]]
    lung = int(coarse.sum())
    if not lung:
        return 0.0, 0.0
    holes = int((ndimage.binary_fill_holes(coarse) & ~coarse).sum())
    at = [np.minimum((np.arange(n) * b) // n, b - 1) for n, b in zip(mask.shape, body.shape, strict=True)]
    here = body[np.ix_(*[a[::s] for a, s in zip(at, step, strict=True)])]
    # The body's outline is known to one of its own voxels: a lung that touches the skin there has not leaked.
    leaked = int((coarse & ~ndimage.binary_dilation(here, iterations=2)).sum())
    return 100.0 * holes / lung, 100.0 * leaked / lung


def _touches_edge(mask: np.ndarray) -> bool:
    return any(bool(np.take(mask, end, axis=axis).any()) for axis in range(3) for end in (0, -1))


def _noise(scan: Volume) -> float | None:
    """SD of one soft-tissue voxel in HU, robustly, from the differences of neighbours along x; None without tissue.

    Tissue is chosen on means over 3 x 3 voxels of a slice, which hold both neighbours of a pair: the choice says
    nothing about their difference and cannot cut it off. Neighbours share the noise of a real reconstruction, so a soft
    kernel gives less than the SD of a homogeneous region, and a sharp one, which sets neighbours against each other,
    more. Anatomy adds to it: ct-64, sampled twice as finely, shows 25, 44 and 103 HU for 20, 40 and 100 of white noise.
    """
    some = scan.hu[:: max(1, scan.hu.shape[0] // NOISE_SLICES)]
    soft = np.abs(ndimage.uniform_filter(some.astype(np.float32), (1, 3, 3)) - SOFT_TISSUE_HU) < SOFT_TISSUE_WIDTH_HU
    pairs = soft[:, :, :-1] & soft[:, :, 1:]
    if int(pairs.sum()) < 100:
        return None
    left, right = (side[pairs].astype(np.float32) for side in (some[:, :, :-1], some[:, :, 1:]))
    difference = left - right
    return float(1.4826 * np.median(np.abs(difference - np.median(difference))) / np.sqrt(2))
