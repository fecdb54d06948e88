"""Numbers and grades: what is measured on a scan and on a pair, and when a person must look.

Codes: E_ refuses the scan, V_ sends it to review, W_ only tells. The first code of a list is the reason that is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from fourdvq.data.volume import HU_MIN, Volume
from fourdvq.preprocessing.profile import LimitsSpec
from fourdvq.preprocessing.registration import Registration
from fourdvq.preprocessing.segmentation import filled_body, lung_sides

Grade = Literal["PASS", "REVIEW", "FAIL"]
RATIO_RANGE = (0.5, 1.6)  # left over right
LUNG_MEDIAN_HU = (-970.0, -550.0)
AIR_HU_TOLERANCE = 50.0
AIR_SPREAD_HU = 25.0  # median absolute deviation: 10 in a whole-body field of view, 33 to 45 in crops
MAX_NOISE_HU = 100.0
NOISE_SLICES = 32  # enough voxels for a median, at a tenth of the memory
EXPIRATORY_SHARE = 0.85
MAX_FOLD_PERCENT = (0.1, 1.0)  # pass below the first, fail above the second
NCC_ALIGNED = 0.98  # a pair that starts this well need not gain


@dataclass(frozen=True)
class ScanFacts:
    """Measured on one scan and its mask; None where it cannot be seen."""

    lung_ml: float
    right_ml: float
    left_ml: float
    two_lungs: bool
    left_right: float
    components: int
    touches_edge: bool
    lung_median_hu: float | None
    lung_p5_hu: float | None
    outside_air_hu: float | None
    noise_hu: float | None
    coverage_mm: float
    thickness_mm: float
    voxel_mm: tuple[float, float, float]


def scan_facts(scan: Volume, mask: np.ndarray, *, thickness_mm: float) -> ScanFacts:
    """Measure a scan (LPS) and its lung mask, bool (D, H, W)."""
    sides = lung_sides(mask, scan.spacing)
    inside = scan.hu[mask]
    return ScanFacts(
        lung_ml=float(mask.sum()) * scan.voxel_ml,
        right_ml=sides.right_ml,
        left_ml=sides.left_ml,
        two_lungs=sides.two,
        left_right=sides.ratio,
        components=int(ndimage.label(mask)[1]),
        touches_edge=_touches_edge(mask),
        lung_median_hu=float(np.median(inside)) if inside.size else None,
        lung_p5_hu=float(np.percentile(inside, 5)) if inside.size else None,
        outside_air_hu=outside_air(scan),
        noise_hu=_noise(scan),
        coverage_mm=coverage_mm(scan),
        thickness_mm=thickness_mm,
        voxel_mm=scan.spacing,
    )


def coverage_mm(scan: Volume) -> float:
    """Extent of the scan along z."""
    return float(scan.hu.shape[0] * scan.spacing[0])


def outside_air(scan: Volume) -> float | None:
    """Median HU of the air around the body, or None if no such air is in view.

    In view means that what lies outside the body is even: in a crop through the lung, and on coarse voxels, it is not,
    and would else be taken for a scan with a wrong intercept. Padding at the lowest value is not air.
    """
    hu, body = filled_body(scan)
    around = ndimage.binary_erosion(~body, np.ones((1, 3, 3), dtype=bool), border_value=1)
    values = hu[around & (hu > HU_MIN)]
    if values.size < 0.01 * hu.size:
        return None
    median = float(np.median(values))
    return median if float(np.median(np.abs(values - median))) <= AIR_SPREAD_HU else None


def scan_codes(facts: ScanFacts, limits: LimitsSpec, *, method: str) -> list[str]:
    """What the limits say about a scan, the gravest first."""
    refuse: list[str] = []
    review: list[str] = []
    warn: list[str] = []
    if facts.outside_air_hu is not None and abs(facts.outside_air_hu + 1000.0) > AIR_HU_TOLERANCE:
        refuse.append("E_HU")
    if facts.lung_ml < limits.min_lung_ml:
        too_small = method == "threshold" or facts.lung_ml == 0
        (refuse if too_small else review).append("E_NOLUNG" if too_small else "V_VOLUME")
    elif facts.lung_ml > limits.max_lung_ml:
        review.append("V_VOLUME")
    if facts.touches_edge:
        _by(limits.cut_field, "E_FOV", "W_MASK_FOV", refuse, warn)
    if not facts.two_lungs:
        _by(limits.one_lung, "E_ONELUNG", "W_MASK_ONELUNG", refuse, warn)
    elif not RATIO_RANGE[0] <= facts.left_right <= RATIO_RANGE[1]:
        review.append("V_ONELUNG")
    if facts.thickness_mm > limits.max_thickness_mm * (1 + 1e-6):
        _by(limits.thick, "E_THICK", "W_THICK", refuse, warn)
    if method == "threshold" or not _within(facts.lung_median_hu, LUNG_MEDIAN_HU):
        review.append("V_MASK")
    if facts.noise_hu is not None and facts.noise_hu > MAX_NOISE_HU:
        review.append("V_NOISE")
    return refuse + review + warn


def pair_grade(found: Registration, limits: LimitsSpec) -> Grade:
    """PASS, REVIEW or FAIL of a registration, from overlap, folding and the gain over the centroid shift."""
    after, gain, fold = found.after, found.after.ncc - found.before.ncc, found.facts.fold_percent
    aligned = after.ncc >= NCC_ALIGNED
    if after.dice < limits.fail_dice or fold > MAX_FOLD_PERCENT[1] or (gain < 0 and not aligned):
        return "FAIL"
    if after.dice >= limits.pass_dice and fold < MAX_FOLD_PERCENT[0] and (gain > 0 or aligned):
        return "PASS"
    return "REVIEW"


def expiratory(lung_ml: dict[int, float]) -> set[int]:
    """Indices of scans with over 15 % less lung than every other scan of the patient."""
    result = set()
    for index, volume in lung_ml.items():
        others = [v for i, v in lung_ml.items() if i != index]
        if others and volume < EXPIRATORY_SHARE * min(others):
            result.add(index)
    return result


def grade_of(codes: list[str], pair: Grade = "PASS") -> Grade:
    """The grade of a scan that is not refused: the pair's, or REVIEW if any code asks for a look."""
    if pair == "PASS" and any(code.startswith("V_") for code in codes):
        return "REVIEW"
    return pair


def _by(answer: str, refusal: str, warning: str, refuse: list[str], warn: list[str]) -> None:
    if answer == "refuse":
        refuse.append(refusal)
    else:
        warn.append(warning)


def _within(value: float | None, allowed: tuple[float, float]) -> bool:
    return value is not None and allowed[0] <= value <= allowed[1]


def _touches_edge(mask: np.ndarray) -> bool:
    return any(bool(np.take(mask, end, axis=axis).any()) for axis in range(3) for end in (0, -1))


def _noise(scan: Volume) -> float | None:
    """Spread of the difference of neighbouring soft-tissue voxels, robustly, as the SD of one voxel."""
    some = scan.hu[:: max(1, scan.hu.shape[0] // NOISE_SLICES)].astype(np.int32)
    a, b = some[:, :, :-1], some[:, :, 1:]
    soft = (np.abs(a - 40) < 150) & (np.abs(b - 40) < 150)
    if int(soft.sum()) < 100:
        return None
    difference = (a - b)[soft]
    return float(1.4826 * np.median(np.abs(difference - np.median(difference))) / np.sqrt(2))
