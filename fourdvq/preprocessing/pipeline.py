"""One patient from files to prepared arrays: read, segment, check, register to the baseline, resample once, look.

The baseline is the earliest scan that is not refused. Every follow-up goes from its own voxels to the target grid in
one resample and carries the baseline's tissue outside the baseline lung mask (paper section 2). A scan whose inputs and
parameters did not change is not made again; a bad scan becomes a result with a code, and the others go on.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from fourdvq import __version__
from fourdvq.config import to_plain
from fourdvq.data.volume import Volume
from fourdvq.errors import FourdvqError, TemporaryStop, VolumeError
from fourdvq.preprocessing.grid import Grid
from fourdvq.preprocessing.inputs import LoadedScan, ScanInput, load_input, scan_inputs, source_key
from fourdvq.preprocessing.pictures import pair_picture, scan_picture
from fourdvq.preprocessing.profile import Profile, profile_to_plain, require_supported
from fourdvq.preprocessing.quality import (
    ScanFacts,
    coverage_mm,
    expiratory,
    grade_of,
    pair_grade,
    scan_codes,
    scan_facts,
)
from fourdvq.preprocessing.records import (
    FORMAT,
    PatientResult,
    ScanResult,
    is_intact,
    output_key,
    read_key,
    read_record,
    result_of,
    write_manifest,
    write_outputs,
    write_record,
)
from fourdvq.preprocessing.registration import Registration, register
from fourdvq.preprocessing.segmentation import METHODS
from fourdvq.preprocessing.target import Target, follow_up_on_grid, on_target_grid

__all__ = ["PatientResult", "ScanInput", "ScanResult", "prepare_patient", "scan_inputs", "write_manifest"]

_STOPS_THE_RUN = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class CheckedScan:
    """A scan with its lung mask and what the limits say about it."""

    volume: Volume
    mask: np.ndarray
    facts: ScanFacts
    codes: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """Whether a limit blocks the scan."""
        return any(code.startswith("E_") for code in self.codes)


def prepare_patient(
    scans: Sequence[ScanInput],
    profile: Profile,
    out: Path,
    *,
    pseudonym: str,
    excluded: Collection[int] = (),
    retry_failed: bool = False,
) -> PatientResult:
    """Prepare a patient's scans under `out`/`pseudonym` and say what became of each; resumable and deterministic.

    `excluded` are indices that a person rejected: they are left as they are and cannot be the baseline. Folders of
    indices that are no longer among `scans` are removed. Raises ConfigError E_UNSUPPORTED for a profile that cannot be
    run here and TemporaryStop DISK_FULL; nothing about a single scan raises.
    """
    require_supported(profile)
    patient = _Patient(profile, out / pseudonym, pseudonym, retry_failed)
    patient.remove_others({scan.index for scan in scans})
    results = []
    for scan in sorted(scans, key=lambda s: (s.days, s.index)):
        results.append(patient.left_out(scan) if scan.index in excluded else patient.prepare(scan))
    return PatientResult(pseudonym, tuple(patient.with_breath_check(results)))


class _Patient:
    """The state of one patient's preparation: the baseline, once there is one."""

    def __init__(self, profile: Profile, folder: Path, pseudonym: str, retry_failed: bool) -> None:
        self.profile = profile
        self.folder = folder
        self.pseudonym = pseudonym
        self.retry_failed = retry_failed
        self.baseline: _Baseline | None = None
        self.stopped = ""  # code of a failure of the baseline that may pass: without it nothing can be aligned

    def prepare(self, scan: ScanInput) -> ScanResult:
        """The scan's result, from its record if nothing changed."""
        if self.stopped:
            return ScanResult(scan.index, scan.days, "failed", self.stopped, "", detail="the baseline failed")
        folder = self.folder / str(scan.index)
        try:
            scan_key = read_key(source_key(scan), self.profile)
            key = output_key(scan_key, self.profile, self.baseline.key if self.baseline else None)
            result = self._reused(scan, folder, key) or self._made(scan, folder, key)
        except OSError as error:
            if error.errno in _STOPS_THE_RUN:
                raise TemporaryStop("DISK_FULL", where=str(self.folder)) from None
            result = ScanResult(scan.index, scan.days, "failed", "E_FILE", "", detail=str(error))
        except (RuntimeError, MemoryError, ValueError, ArithmeticError, IndexError) as error:
            # ITK and numpy in trouble with this one scan; no record is written, so the next run tries again.
            code = "OUT_OF_MEMORY" if isinstance(error, MemoryError) else "E_INTERNAL"
            result = ScanResult(scan.index, scan.days, "failed", code, "", detail=f"{type(error).__name__}: {error}")
        if self.baseline is None:
            if result.status == "failed":
                self.stopped = result.code
            elif result.status != "refused":
                self.baseline = _Baseline(scan, scan_key, self.profile)
        return result

    def left_out(self, scan: ScanInput) -> ScanResult:
        """What the record of a rejected scan says; the scan is not touched."""
        folder = self.folder / str(scan.index)
        record = read_record(folder)
        if record is None:
            return ScanResult(scan.index, scan.days, "refused", "", "", detail="rejected by a person")
        return result_of(folder, record, reused=True)

    def remove_others(self, indices: Collection[int]) -> None:
        """A scan that was taken out of the cohort must not stay in what training reads."""
        for folder in self.folder.glob("*") if self.folder.is_dir() else ():
            if folder.is_dir() and folder.name.isdigit() and int(folder.name) not in indices:
                shutil.rmtree(folder)

    def with_breath_check(self, results: list[ScanResult]) -> list[ScanResult]:
        """Send a scan to review that has much less lung than all others of the patient."""
        volumes = {r.index: float(r.qc["scan"]["lung_ml"]) for r in results if r.content_sha256 and r.qc.get("scan")}
        suspects = expiratory(volumes)
        return [self._breath(r, r.index in suspects) if r.index in volumes else r for r in results]

    def _breath(self, result: ScanResult, suspect: bool) -> ScanResult:
        if suspect == ("V_EXPIR" in result.codes):
            return result
        folder = self.folder / str(result.index)
        record = read_record(folder)
        if record is None:
            return result
        codes = [c for c in result.codes if c != "V_EXPIR"] + (["V_EXPIR"] if suspect else [])
        grade = grade_of(codes, result.qc["pair"]["grade"] if result.qc.get("pair") else "PASS")
        status = "ok" if grade == "PASS" else "review"
        record |= {"codes": codes, "code": _shown(codes), "grade": grade, "status": status}
        write_record(folder, record, result.qc | {"codes": codes, "grade": grade})
        return replace(result_of(folder, record, reused=result.reused))

    def _reused(self, scan: ScanInput, folder: Path, key: str) -> ScanResult | None:
        record = read_record(folder)
        if record is None or record["key"] != key or not is_intact(folder, record):
            return None
        if record["status"] == "refused" and self.retry_failed:
            return None
        now = {"days": scan.days, "profile_sha256": self.profile.sha256, "profile": profile_to_plain(self.profile)}
        if any(record[name] != value for name, value in now.items()):  # what does not change a voxel
            record |= now
            write_record(folder, record, result_of(folder, record, reused=True).qc)
        return result_of(folder, record, reused=True)

    def _made(self, scan: ScanInput, folder: Path, key: str) -> ScanResult:
        record: dict[str, Any] = {
            "format": FORMAT,
            "key": key,
            "pseudonym": self.pseudonym,
            "index": scan.index,
            "days": scan.days,
            "baseline": self.baseline.scan.index if self.baseline else scan.index,
            "profile_sha256": self.profile.sha256,
            "profile": profile_to_plain(self.profile),
            "versions": {"fourdvq": __version__, "SimpleITK": sitk.Version_VersionString(), "numpy": np.__version__},
        }
        try:
            checked = read_and_check(scan, self.profile)
            if checked.refused:
                return _refused(folder, record, list(checked.codes), {"scan": to_plain(checked.facts)})
            made, qc = self._baseline_output(checked) if self.baseline is None else self._follow_up_output(checked)
        except FourdvqError as error:
            result = _refused(folder, record, [error.code], {})
            return replace(result, detail=f"{error.where}: {error.found}")
        record |= write_outputs(folder, made.hu, made.mask, made.picture)
        record |= {"spacing_mm": list(made.grid.spacing), "grid": to_plain(made.grid), "transform": made.transform}
        record |= {"codes": qc["codes"], "code": _shown(qc["codes"]), "grade": qc["grade"]}
        record["status"] = "ok" if qc["grade"] == "PASS" else "review"
        write_record(folder, record, qc)
        return result_of(folder, record, reused=False)

    def _baseline_output(self, checked: CheckedScan) -> tuple[_Output, dict[str, Any]]:
        target = on_target_grid(checked.volume, checked.mask, self.profile)
        codes = list(checked.codes)
        qc = {"scan": to_plain(checked.facts), "pair": None, "codes": codes, "grade": grade_of(codes)}
        picture = scan_picture(target.hu, target.mask, target.grid.spacing)
        return _Output(target.grid, target.hu, target.mask, picture, None), qc

    def _follow_up_output(self, checked: CheckedScan) -> tuple[_Output, dict[str, Any]]:
        if self.baseline is None:
            raise ValueError("a follow-up needs a baseline")
        base, profile = self.baseline, self.profile
        found = register(base.checked.volume, base.checked.mask, checked.volume, checked.mask, profile.registration)
        target = base.target
        view = follow_up_on_grid(checked.volume, found, target, profile)
        grade = pair_grade(found, profile.limits)
        codes = list(checked.codes)
        codes += ["V_REG"] if grade != "PASS" else []
        codes += ["W_AFFINE"] if profile.registration.backend != "none" and not found.affine_kept else []
        change = 100 * (checked.facts.lung_ml / base.checked.facts.lung_ml - 1)
        pair = {"grade": grade, **_pair_numbers(found), "volume_change_percent": change}
        qc = {"scan": to_plain(checked.facts), "pair": pair, "codes": codes, "grade": grade_of(codes, grade)}
        backend = profile.registration.backend
        transform = {"matrix": list(found.matrix), "affine_kept": found.affine_kept, "backend": backend}
        picture = pair_picture(target.hu, view, target.mask, target.grid.spacing)
        return _Output(target.grid, view.final, target.mask, picture, transform), qc


@dataclass(frozen=True)
class _Output:
    grid: Grid
    hu: np.ndarray
    mask: np.ndarray
    picture: bytes
    transform: dict[str, Any] | None


class _Baseline:
    """The patient's baseline; read again only when a follow-up has to be made."""

    def __init__(self, scan: ScanInput, key: str, profile: Profile) -> None:
        self.scan = scan
        self.key = key
        self._profile = profile

    @cached_property
    def checked(self) -> CheckedScan:
        """The scan with its mask."""
        return read_and_check(self.scan, self._profile)

    @cached_property
    def target(self) -> Target:
        """The target grid, and the baseline's HU int16 and lung mask on it, (D, H, W)."""
        return on_target_grid(self.checked.volume, self.checked.mask, self._profile)


def read_and_check(scan: ScanInput, profile: Profile) -> CheckedScan:
    """Read, segment and measure one scan. Raises VolumeError for what cannot be read or is too short to hold a lung."""
    limits, method = profile.limits, profile.segmentation.method
    loaded: LoadedScan = load_input(scan, limits, with_mask=method == "provided")
    warnings = list(loaded.warnings)
    covered = coverage_mm(loaded.volume)
    if covered < limits.min_coverage_mm:
        if limits.cut_field == "refuse":
            found, wanted = f"{covered:.0f} mm along z", f"at least {limits.min_coverage_mm:g} mm"
            raise VolumeError("E_FOV", where=str(scan.path), found=found, wanted=wanted)
        warnings.append("W_MASK_FOV")
    mask = METHODS[method](loaded.volume, loaded.mask)
    facts = scan_facts(loaded.volume, mask, thickness_mm=loaded.thickness_mm)
    codes = scan_codes(facts, limits, method=method)
    return CheckedScan(loaded.volume, mask, facts, tuple(dict.fromkeys([*codes, *warnings])))


def _pair_numbers(found: Registration) -> dict[str, float]:
    return {
        "dice_unaligned": found.unaligned.dice,
        "dice_before": found.before.dice,
        "dice": found.after.dice,
        "ncc_unaligned": found.unaligned.ncc,
        "ncc_before": found.before.ncc,
        "ncc": found.after.ncc,
        "displacement_mean_mm": found.facts.mean_mm,
        "displacement_p95_mm": found.facts.p95_mm,
        "fold_percent": found.facts.fold_percent,
        "sd_log_j": found.facts.sd_log_j,
    }


def _refused(folder: Path, record: dict[str, Any], codes: list[str], qc: dict[str, Any]) -> ScanResult:
    """A record without arrays: the next run knows the answer. Arrays of an earlier run would be stale, so they go."""
    for name in ("step.json", "hu.npy", "mask.npy", "qc.png"):
        (folder / name).unlink(missing_ok=True)
    record |= {"status": "refused", "code": _shown(codes), "codes": codes, "grade": "", "content_sha256": ""}
    write_record(folder, record, {"scan": None, "pair": None, "grade": "", "codes": codes} | qc)
    return result_of(folder, record, reused=False)


def _shown(codes: Sequence[str]) -> str:
    """The one code that a table shows: the gravest."""
    return next((c for kind in ("E_", "V_", "W_") for c in codes if c.startswith(kind)), "")
