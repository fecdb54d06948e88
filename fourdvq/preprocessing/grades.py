"""The rules: which numbers refuse a scan, which send it to a person, and how a pair is graded.

Codes: E_ refuses the scan, V_ sends it to review, W_ only tells. The first code of a list is the reason that is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fourdvq.preprocessing.profile import LimitsSpec
    from fourdvq.preprocessing.quality import ScanFacts
    from fourdvq.preprocessing.registration import Registration

Grade = Literal["PASS", "REVIEW", "FAIL"]
RATIO_RANGE = (0.5, 1.6)  # left over right
LUNG_MEDIAN_HU = (-970.0, -550.0)
AIR_HU_TOLERANCE = 50.0
MAX_NOISE_HU = 100.0
MAX_HOLE_PERCENT = 3.0  # given masks of sound lungs: 0; vessels cut out of a threshold mask: up to 2
MAX_LEAK_PERCENT = 1.0
MAX_PARTS = 2  # of a mask: two lungs
EXPIRATORY_SHARE = 0.85
MAX_FOLD_PERCENT = (0.1, 1.0)  # pass below the first, fail above the second
NCC_ALIGNED = 0.98  # a pair that starts this well need not gain
MAX_INVERSE_P95_MM = 4.0
MAX_VOLUME_CHANGE_PERCENT = 35.0
MAX_SURFACE_VOXELS = 2.0  # of the working grid, 95th percentile
DICE_LOSS = 0.005  # an overlap that only rounding took away


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
    if method == "threshold" or _mask_in_doubt(facts):
        review.append("V_MASK")
    if facts.noise_hu is not None and facts.noise_hu > MAX_NOISE_HU:
        review.append("V_NOISE")
    return refuse + review + warn


_REFUSALS: dict[str, Callable[[Mapping[str, Any], LimitsSpec], str]] = {
    "E_HU": lambda facts, _: f"air around the patient is {facts['outside_air_hu']:.0f} HU, -1000 expected",
    "E_NOLUNG": lambda facts, limits: f"{facts['lung_ml']:.0f} ml of lung, at least {limits.min_lung_ml:g} ml expected",
    "E_FOV": lambda facts, _: f"the lung is cut at: {', '.join(facts['cut_at'])}",
    "E_ONELUNG": lambda facts, _: f"right {facts['right_ml']:.0f} ml, left {facts['left_ml']:.0f} ml",
    "E_THICK": lambda facts, limits: f"{facts['thickness_mm']:.3g} mm, at most {limits.max_thickness_mm:g} mm expected",
}


def refusal_words(code: str, facts: Mapping[str, Any], limits: LimitsSpec) -> str:
    """What was found and what was expected, for a scan that `scan_codes` refuses; empty for any other code.

    `facts`: the fields of `ScanFacts`, as they are stored.
    """
    words = _REFUSALS.get(code)
    return words(facts, limits) if words and facts else ""


def pair_grade(found: Registration, limits: LimitsSpec) -> Grade:
    """PASS, REVIEW or FAIL of a registration.

    By overlap, the distance of the outlines, folding, the gain over the centroid shift, and its own inverse.
    """
    if found.gave_up:
        return "FAIL"
    after, gain, fold = found.after, found.after.ncc - found.before.ncc, found.facts.fold_percent
    aligned = after.ncc >= NCC_ALIGNED
    if after.dice < limits.fail_dice or fold > MAX_FOLD_PERCENT[1] or (gain < 0 and not aligned):
        return "FAIL"
    outline = found.surface_p95_mm is not None and found.surface_p95_mm < MAX_SURFACE_VOXELS * found.spacing_mm
    kept = outline and after.dice >= found.before.dice - DICE_LOSS
    undone = found.consistency is None or found.consistency.p95_mm < MAX_INVERSE_P95_MM
    if after.dice >= limits.pass_dice and fold < MAX_FOLD_PERCENT[0] and (gain > 0 or aligned) and undone and kept:
        return "PASS"
    return "REVIEW"


def pair_codes(found: Registration, grade: Grade, *, asks_affine: bool, volume_change_percent: float) -> list[str]:
    """Codes of a pair; `asks_affine`: the backend has an affine step."""
    codes = ["V_REG"] if grade != "PASS" else []
    codes += ["W_AFFINE"] if asks_affine and not found.affine_kept else []
    codes += ["W_VOLUME"] if abs(volume_change_percent) > MAX_VOLUME_CHANGE_PERCENT else []
    return codes


def expiratory(lung_ml: dict[int, float]) -> set[int]:
    """Indices of scans with over 15 % less lung than every other scan of the patient."""
    result = set()
    for index, volume in lung_ml.items():
        others = [v for i, v in lung_ml.items() if i != index]
        if others and volume < EXPIRATORY_SHARE * min(others):
            result.add(index)
    return result


def grade_of(codes: Sequence[str], pair: Grade = "PASS") -> Grade:
    """The grade of a scan that is not refused: the pair's, or REVIEW if any code asks for a look."""
    if pair == "PASS" and any(code.startswith("V_") for code in codes):
        return "REVIEW"
    return pair


def _mask_in_doubt(facts: ScanFacts) -> bool:
    if facts.hole_percent > MAX_HOLE_PERCENT or (facts.leak_percent or 0.0) > MAX_LEAK_PERCENT:
        return True
    if facts.components > MAX_PARTS:
        return True
    median = facts.lung_median_hu
    return median is None or not LUNG_MEDIAN_HU[0] <= median <= LUNG_MEDIAN_HU[1]


def _by(answer: str, refusal: str, warning: str, refuse: list[str], warn: list[str]) -> None:
    if answer == "refuse":
        refuse.append(refusal)
    else:
        warn.append(warning)
