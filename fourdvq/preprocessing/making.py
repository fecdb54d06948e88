"""What is made of a scan: its lung mask and numbers, and its voxels on the patient's target grid.

Every follow-up goes from its own voxels to the target grid in one resample and carries the baseline's tissue outside
the baseline lung mask (paper section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from fourdvq import __version__
from fourdvq.config import to_plain
from fourdvq.data.limits import ReaderLimits
from fourdvq.data.technical import TechnicalTags
from fourdvq.data.volume import Volume
from fourdvq.errors import RegistrationError, VolumeError
from fourdvq.preprocessing.grades import grade_of, pair_codes, pair_grade, scan_codes
from fourdvq.preprocessing.inputs import ScanInput, load_input
from fourdvq.preprocessing.pictures import pair_picture, scan_picture
from fourdvq.preprocessing.profile import Profile, RegistrationSpec, SegmentationSpec, require_supported
from fourdvq.preprocessing.quality import ScanFacts, coverage_mm, pair_numbers, scan_facts
from fourdvq.preprocessing.registration import Registration, backend_named, register
from fourdvq.preprocessing.segmentation import Segmenter, left_out, segmenter
from fourdvq.preprocessing.stored_masks import keep_mask, load_mask
from fourdvq.preprocessing.target import Target, follow_up_on_grid, on_target_grid


@dataclass(frozen=True)
class CheckedScan:
    """A scan with its lung mask and what the limits say about it."""

    volume: Volume
    mask: np.ndarray
    facts: ScanFacts
    codes: tuple[str, ...]
    technical: TechnicalTags

    @property
    def refused(self) -> bool:
        """Whether a limit blocks the scan."""
        return any(code.startswith("E_") for code in self.codes)

    def plain_facts(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {**to_plain(self.facts), "technical": to_plain(self.technical)}


@dataclass(frozen=True)
class Made:
    """A scan on the target grid, HU int16 and the baseline's mask (D, H, W), with its pictures and numbers."""

    hu: np.ndarray
    mask: np.ndarray
    pictures: tuple[bytes, bytes]
    qc: dict[str, Any]
    described: dict[str, Any]  # spacing, grid and transform, for the record


class Maker:
    """Makes one patient's scans. Raises ConfigError E_UNSUPPORTED or E_WEIGHTS for a profile that cannot be run here.

    `say` is called with the name of each step before it begins; `folder` is the patient's.
    """

    def __init__(
        self,
        profile: Profile,
        folder: Path,
        *,
        device: str = "cpu",
        weights: Path | None = None,
        readers: ReaderLimits | None = None,
    ) -> None:
        require_supported(profile)
        self.say: Callable[[str], None] = lambda _step: None
        self.versions = {
            "fourdvq": __version__,
            "SimpleITK": sitk.Version_VersionString(),
            "numpy": np.__version__,
        }
        self._profile = profile
        self._folder = folder
        self._device = device
        self._readers = readers
        self._segment = _segmenter(profile.segmentation, weights, device)
        self._baseline: tuple[str, CheckedScan, Target] | None = None

    def read_and_check(self, scan: ScanInput, mask_key: str) -> CheckedScan:
        """Read, segment and measure a scan; its mask is kept under `mask_key`.

        Raises VolumeError for what cannot be read or is too short to hold a lung.
        """
        limits, method = self._profile.limits, self._profile.segmentation.method
        self.say("read")
        loaded = load_input(scan, limits, with_mask=method == "provided", readers=self._readers)
        warnings = list(loaded.warnings)
        covered = coverage_mm(loaded.volume)
        if covered < limits.min_coverage_mm:
            if limits.cut_field == "refuse":
                found, wanted = f"{covered:.0f} mm along z", f"at least {limits.min_coverage_mm:g} mm"
                raise VolumeError("E_FOV", where=str(scan.path), found=found, wanted=wanted)
            warnings.append("W_MASK_FOV")
        self.say("segment")
        mask = self._mask(scan, loaded.volume, loaded.mask, mask_key)
        if left_out(loaded.mask, mask):
            warnings.append("W_MASK_STRAY")
        filled = warnings.count("W_FILLED")
        facts = scan_facts(loaded.volume, mask, thickness_mm=loaded.thickness_mm, filled_slices=filled)
        codes = scan_codes(facts, limits, method=method)
        return CheckedScan(loaded.volume, mask, facts, tuple(dict.fromkeys([*codes, *warnings])), loaded.technical)

    def baseline_output(self, scan: ScanInput, checked: CheckedScan) -> Made:
        """The baseline on the grid that it defines; remembered for the follow-ups of this run."""
        self.say("resample")
        target = on_target_grid(checked.volume, checked.mask, self._profile)
        self._baseline = (scan.source_sha256, checked, target)
        self.say("pictures")
        codes = list(checked.codes)
        qc = {"scan": checked.plain_facts(), "pair": None, "codes": codes, "grade": grade_of(codes)}
        title, facts = f"scan {scan.index}, baseline", _scan_lines(checked)
        pictures = scan_picture(target.hu, target.mask, target.grid.spacing, title=title, facts=facts)
        return Made(target.hu, target.mask, pictures, qc, _described(target, None))

    def follow_up_output(self, scan: ScanInput, checked: CheckedScan, base: ScanInput, base_mask_key: str) -> Made:
        """A follow-up on the grid of its baseline, which is read again only if this run has not seen it."""
        profile = self._profile
        if self._baseline is None or self._baseline[0] != base.source_sha256:
            again = self.read_and_check(base, base_mask_key)
            self._baseline = (base.source_sha256, again, on_target_grid(again.volume, again.mask, profile))
        _, based, target = self._baseline
        self.say("register")
        found = self._registered(based, checked)
        self.say("resample")
        view = follow_up_on_grid(checked.volume, found, target, profile)
        self.say("pictures")
        qc = self._pair_qc(checked, based, found, scan.days - base.days)
        title = f"scan {scan.index} on baseline scan {base.index}"
        facts = _pair_lines(qc, based)
        pictures = pair_picture(target.hu, view, target.mask, target.grid.spacing, title=title, facts=facts)
        backend = profile.registration.backend
        transform = {"matrix": list(found.matrix), "affine_kept": found.affine_kept, "backend": backend}
        return Made(view.final, target.mask, pictures, qc, _described(target, transform))

    def _registered(self, base: CheckedScan, checked: CheckedScan) -> Registration:
        """As the profile says; where that gives up, the centroid shift alone: a person then has something to look at.

        Raises RegistrationError E_REG for a constant scan only.
        """

        def by(spec: RegistrationSpec) -> Registration:
            return register(base.volume, base.mask, checked.volume, checked.mask, spec, device=self._device)

        wanted = self._profile.registration
        try:
            return by(wanted)
        except RegistrationError as error:
            return replace(by(replace(wanted, backend="none")), gave_up=error.found or error.code)

    def _mask(self, scan: ScanInput, volume: Volume, given: Volume | None, key: str) -> np.ndarray:
        if self._profile.segmentation.method == "provided":
            return self._segment(volume, given)
        folder = self._folder / str(scan.index)
        kept = load_mask(folder, key, volume.hu.shape)
        if kept is not None:
            return kept
        mask = self._segment(volume, given)
        keep_mask(folder, key, mask)
        return mask

    def _pair_qc(self, checked: CheckedScan, base: CheckedScan, found: Registration, days: int) -> dict[str, Any]:
        profile = self._profile
        grade = pair_grade(found, profile.limits)
        change = 100 * (checked.facts.lung_ml / base.facts.lung_ml - 1)
        asks_affine = backend_named(profile.registration.backend).affine
        codes = [*checked.codes, *pair_codes(found, grade, asks_affine=asks_affine, volume_change_percent=change)]
        pair = {"grade": grade, **pair_numbers(found), "volume_change_percent": change, "days_between": days}
        return {"scan": checked.plain_facts(), "pair": pair, "codes": codes, "grade": grade_of(codes, grade)}


@lru_cache(maxsize=1)
def _segmenter(spec: SegmentationSpec, weights: Path | None, device: str) -> Segmenter:
    """Once per process: a network is loaded once for all patients that a worker prepares."""
    return segmenter(spec, weights=weights, device=device)


def _scan_lines(checked: CheckedScan) -> list[str]:
    """What stands beside the picture of a baseline."""
    facts = checked.facts
    shown = [(facts.lung_median_hu, "median {:.0f} HU"), (facts.noise_hu, "noise {:.0f} HU")]
    return [
        f"lung {facts.lung_ml:.0f} ml, left/right {facts.left_right:.2f}",
        ", ".join(text.format(value) for value, text in shown if value is not None),
        f"holes {facts.hole_percent:.1f} % of the mask",
        " ".join(checked.codes),
    ]


def _pair_lines(qc: dict[str, Any], base: CheckedScan) -> list[str]:
    """What stands beside the picture of a pair. Days are left out: they may be corrected without making it again."""
    pair, lung = qc["pair"], qc["scan"]["lung_ml"]
    lines = [
        f"registration {pair['grade']}",
        *([f"gave up: {pair['gave_up']}"] if pair["gave_up"] else []),
        f"overlap (Dice) {pair['dice_before']:.2f} to {pair['dice']:.3f}",
        f"correlation {pair['ncc_before']:.2f} to {pair['ncc']:.2f}",
        f"lung {base.facts.lung_ml:.0f} to {lung:.0f} ml ({pair['volume_change_percent']:+.0f} %)",
    ]
    if pair["inverse_p95_mm"] is not None:
        lines.append(f"movement mean {pair['displacement_mean_mm']:.1f}, 95 % {pair['displacement_p95_mm']:.1f} mm")
        lines.append(f"inverse 95 % {pair['inverse_p95_mm']:.1f} mm, folding {pair['fold_percent']:.2f} %")
    return [*lines, " ".join(qc["codes"])]


def _described(target: Target, transform: dict[str, Any] | None) -> dict[str, Any]:
    return {"spacing_mm": list(target.grid.spacing), "grid": to_plain(target.grid), "transform": transform}
