"""The preprocessing profile: everything that changes voxel values, equal at every site, with an identity (its sha256).

The coordinator issues one profile for a federation; a site with another hash is refused, and training refuses arrays
that were made under another hash. Paths, threads and devices are the site's own and are not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fourdvq.config import build, sha256_of, to_plain
from fourdvq.errors import ConfigError

Answer = Literal["refuse", "warn"]
WITHOUT_FIELD = ("affine", "none")  # backends that move all of a scan alike


@dataclass(frozen=True)
class ProfileName:
    """What people call the profile."""

    name: str
    version: int = 1


@dataclass(frozen=True)
class GridSpec:
    """Voxels of the prepared volume."""

    depth: int = 96  # paper appendix A.3: 96 x 256 x 256
    height: int = 256
    width: int = 256

    def __post_init__(self) -> None:
        _require((min(self.size) >= 8, f"grid {self.size} has an axis below 8 voxels"))

    @property
    def size(self) -> tuple[int, int, int]:
        """Shape (D, H, W)."""
        return self.depth, self.height, self.width


@dataclass(frozen=True)
class FovSpec:
    """What the grid covers: the baseline lungs with a margin, or the whole baseline image."""

    mode: Literal["lung_bbox", "full"] = "lung_bbox"
    margin_mm: float = 10.0

    def __post_init__(self) -> None:
        _require((self.margin_mm >= 0, f"margin_mm {self.margin_mm:g} is below 0"))


@dataclass(frozen=True)
class ResampleSpec:
    """How a scan reaches the grid; nearest is the paper's released code."""

    interpolation: Literal["linear", "nearest"] = "linear"
    antialias: bool = True


@dataclass(frozen=True)
class OutsideSpec:
    """What stands outside the baseline lung mask in a follow-up. Source: paper section 2 (the baseline's tissue)."""

    source: Literal["baseline", "own"] = "baseline"
    feather_voxels: int = 0

    def __post_init__(self) -> None:
        _require((self.feather_voxels >= 0, f"feather_voxels {self.feather_voxels} is below 0"))


@dataclass(frozen=True)
class SegmentationSpec:
    """How the lung mask is found; one method for a whole federation."""

    method: Literal["threshold", "provided", "lungmask_r231"] = "threshold"
    air_hu: float = -400.0  # threshold: half way between aerated lung (-850) and soft tissue (40)
    weights_sha256: str = ""  # lungmask_r231: of the weights file as its authors published it
    step_mm: float | None = None  # lungmask_r231: look at a slice every so many mm and interpolate; null: every slice

    def __post_init__(self) -> None:
        sha256 = self.weights_sha256
        named = bool(sha256) or self.method != "lungmask_r231"
        _require(
            (-900.0 <= self.air_hu <= -100.0, f"air_hu {self.air_hu:g} is not between lung and tissue (-900 to -100)"),
            (self.step_mm is None or self.step_mm > 0, f"step_mm {self.step_mm} is not above 0"),
            (not sha256 or _is_sha256(sha256), f"weights_sha256 {sha256!r} is not 64 hexadecimal digits in lower case"),
            (named, "method lungmask_r231 needs weights_sha256: the coordinator enters the file's full sha256"),
        )


@dataclass(frozen=True)
class RegistrationSpec:
    """Alignment of a follow-up with the patient's baseline, on an isotropic grid around the baseline lungs."""

    backend: str = "corrfield"  # the paper's method, section 2
    preset: Literal["default", "fast"] = "default"  # of corrfield: `fast` searches at fewer keypoints
    spacing_mm: float = 1.75
    margin_mm: float = 15.0
    clamp_hu: tuple[float, float] = (-1000.0, 500.0)
    affine_iterations: int = 100
    affine_sample_share: float = 0.2  # 5 % raised the 95th percentile of the error on the shared pair
    shrink: tuple[int, ...] = (4, 2, 1)  # demons levels
    iterations: tuple[int, ...] = (60, 40, 15)
    field_sigma: float = 1.5  # voxels of the level

    def __post_init__(self) -> None:
        levels = len(self.shrink) == len(self.iterations) > 0
        share = self.affine_sample_share
        _require(
            (self.spacing_mm > 0, f"spacing_mm {self.spacing_mm:g} is not above 0"),
            (self.margin_mm >= 0, f"margin_mm {self.margin_mm:g} is below 0"),
            (self.clamp_hu[0] < self.clamp_hu[1], f"clamp_hu {self.clamp_hu} is not increasing"),
            (self.affine_iterations >= 1, f"affine_iterations {self.affine_iterations} is below 1"),
            (0 < share <= 1, f"affine_sample_share {share:g} is no share above 0"),
            (levels, "shrink and iterations need one number per level"),
            (min(self.shrink, default=0) >= 1, f"shrink {self.shrink} has a factor below 1"),
            (min(self.iterations, default=0) >= 1, f"iterations {self.iterations} has a number below 1"),
            (self.field_sigma > 0, f"field_sigma {self.field_sigma:g} is not above 0"),
        )


@dataclass(frozen=True)
class LimitsSpec:
    """What a scan must satisfy; `refuse` blocks it, `warn` writes a W_ code and goes on."""

    max_thickness_mm: float = 2.5
    thick: Answer = "refuse"
    min_coverage_mm: float = 180.0
    cut_field: Answer = "refuse"  # too little coverage, or lung at the edge of the image
    one_lung: Answer = "refuse"  # no lung on one side
    min_lung_ml: float = 1000.0
    max_lung_ml: float = 8000.0
    fill_single_gap: bool = True
    tilt: Literal["shear", "refuse"] = "shear"
    pass_dice: float = 0.95
    fail_dice: float = 0.90

    def __post_init__(self) -> None:
        fail, passed, low, high = self.fail_dice, self.pass_dice, self.min_lung_ml, self.max_lung_ml
        _require(
            (self.max_thickness_mm > 0, f"max_thickness_mm {self.max_thickness_mm:g} is not above 0"),
            (self.min_coverage_mm > 0, f"min_coverage_mm {self.min_coverage_mm:g} is not above 0"),
            (0 < low < high, f"min_lung_ml {low:g} is not between 0 and max_lung_ml {high:g}"),
            (0 < fail <= passed <= 1, f"fail_dice {fail:g} and pass_dice {passed:g} are no rising shares up to 1"),
        )


@dataclass(frozen=True)
class StepVersions:
    """A step's number rises when its result changes; old results are then made again."""

    intake: int = 1
    segment: int = 1
    register: int = 1
    resample: int = 1


@dataclass(frozen=True)
class Profile:
    """The federation's preprocessing. `sha256` is its identity."""

    profile: ProfileName
    grid: GridSpec = field(default_factory=GridSpec)
    fov: FovSpec = field(default_factory=FovSpec)
    window_hu: tuple[float, float] = (-1000.0, 400.0)  # applied at load: HU are stored
    resample: ResampleSpec = field(default_factory=ResampleSpec)
    outside_lung: OutsideSpec = field(default_factory=OutsideSpec)
    segmentation: SegmentationSpec = field(default_factory=SegmentationSpec)
    registration: RegistrationSpec = field(default_factory=RegistrationSpec)
    limits: LimitsSpec = field(default_factory=LimitsSpec)
    step_versions: StepVersions = field(default_factory=StepVersions)

    def __post_init__(self) -> None:
        _require(
            (self.window_hu[0] < self.window_hu[1], f"window_hu {self.window_hu} is not increasing"),
            (
                self.outside_lung.source == "baseline" or self._field_covers_the_grid(),
                "outside_lung: own where a field ends inside the grid would leave a seam: use fov: lung_bbox with a"
                " margin_mm of at most the registration's",
            ),
        )

    def _field_covers_the_grid(self) -> bool:
        """Whether every voxel of the grid moves smoothly: a field ends at the registration's margin."""
        if self.registration.backend in WITHOUT_FIELD:
            return True
        return self.fov.mode == "lung_bbox" and self.fov.margin_mm <= self.registration.margin_mm

    @property
    def sha256(self) -> str:
        """Hex sha256 of the canonical JSON."""
        return sha256_of(self)

    @property
    def name(self) -> str:
        """Name and version, for people."""
        return f"{self.profile.name} v{self.profile.version}"


def profile_from(data: Mapping[str, Any]) -> Profile:
    """The profile from plain data; raises ConfigError with the dotted key."""
    return build(Profile, data, where="profile")


def profile_to_plain(profile: Profile) -> dict[str, Any]:
    """The inverse of `profile_from`, ready for JSON."""
    plain: dict[str, Any] = to_plain(profile)
    return plain


def load_profile(path: Path) -> Profile:
    """Read a profile from a YAML or JSON file. Raises ConfigError E_FILE, E_TYPE, or what `profile_from` raises."""
    import yaml

    if not path.is_file():
        raise ConfigError("E_FILE", where=str(path))
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("E_TYPE", where=str(path), found=str(error).splitlines()[0], wanted="YAML or JSON") from None
    return profile_from(data)


def require_supported(profile: Profile) -> None:
    """Raise ConfigError E_UNSUPPORTED, before any work, for a method or backend that is not there."""
    from fourdvq.preprocessing.registration.backends import backend_named
    from fourdvq.preprocessing.segmentation import SEGMENTERS

    if profile.segmentation.method not in SEGMENTERS:
        raise ConfigError(
            "E_UNSUPPORTED",
            where="profile.segmentation.method",
            found=profile.segmentation.method,
            wanted="one of " + ", ".join(sorted(SEGMENTERS)),
            fix="use a profile with one of these methods; all sites of a federation use the same one",
        )
    backend_named(profile.registration.backend)


def _require(*rules: tuple[bool, str]) -> None:
    """Raise ValueError with the words of the first rule that does not hold."""
    for holds, words in rules:
        if not holds:
            raise ValueError(words)


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
