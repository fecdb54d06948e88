"""One patient from files to prepared arrays: read, segment, check, register to the baseline, resample once, look.

The baseline is the earliest scan that is not refused. A scan whose inputs and parameters did not change is not made
again; a bad scan becomes a result with a code, and the others go on. This module decides what has to be made and keeps
the records; the making is in `fourdvq.preprocessing.making` and is imported only if there is something to make.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourdvq.errors import ConfigError, DataError, ModelError, TemporaryStop
from fourdvq.os_errors import from_os, reading
from fourdvq.preprocessing.inputs import ScanInput, scan_inputs, source_key, told, unreadable, without_paths
from fourdvq.preprocessing.manifest import write_manifest
from fourdvq.preprocessing.profile import Profile, profile_to_plain
from fourdvq.preprocessing.records import (
    Keys,
    PatientResult,
    ScanResult,
    forget,
    is_intact,
    new_record,
    output_key,
    read_key,
    read_record,
    recipe_key,
    remove_leftovers,
    result_of,
    rewrite_record,
    segment_key,
    shown_code,
    write_outputs,
    write_record,
    write_without_outputs,
)

if TYPE_CHECKING:
    from fourdvq.data.limits import ReaderLimits
    from fourdvq.preprocessing.making import Maker

__all__ = [
    "FORCED_STEPS",
    "PatientResult",
    "ScanInput",
    "ScanResult",
    "StepInHand",
    "forget_step",
    "prepare_patient",
    "record_failure",
    "scan_inputs",
    "settled_patient",
    "write_manifest",
]

FORCED_STEPS = ("segment", "register", "resample")
_NO_MEMORY = re.compile(r"out of memory|allocate memory|bad.?alloc", re.IGNORECASE)


@dataclass(frozen=True)
class StepInHand:
    """What is being done: enough to name a scan as failed if the process that does it dies."""

    scan: ScanInput
    name: str  # read, segment, register, resample, pictures
    keys: Keys  # of the scan's record
    baseline: int | None  # index; None for a baseline


def prepare_patient(
    scans: Sequence[ScanInput],
    profile: Profile,
    out: Path,
    *,
    pseudonym: str,
    rejected: Collection[str] = (),
    retry: Collection[int] = (),
    device: str = "cpu",
    weights: Path | None = None,
    readers: ReaderLimits | None = None,
    on_step: Callable[[StepInHand], None] | None = None,
) -> PatientResult:
    """Prepare a patient's scans under `out`/`pseudonym` and say what became of each; resumable and deterministic.

    `rejected` are recipes that a person rejected: such a scan is left as it is and cannot be the baseline. `retry` are
    indices whose refusal or failure is not taken from the record. `readers` bound what an image header may announce.
    Folders of indices that are no longer among `scans` are removed; what was made of a scan whose files cannot be
    opened just now is left as it is. Raises ConfigError E_UNSUPPORTED or ModelError E_WEIGHTS for a profile that cannot
    be run here, and what `from_os` says (DISK_FULL, E_STORAGE, E_RIGHTS) if nothing can be written; nothing about a
    single scan raises.
    """

    def maker(patient: _Patient) -> Maker:
        from fourdvq.preprocessing.making import Maker

        return Maker(profile, patient.folder, device=device, weights=weights, readers=readers)

    patient = _Patient(profile, out / pseudonym, pseudonym, retry, maker, on_step)
    for folder in patient.folder.glob("*"):
        remove_leftovers(folder)
    return patient.results(scans, rejected)


def settled_patient(
    scans: Sequence[ScanInput],
    profile: Profile,
    out: Path,
    *,
    pseudonym: str,
    rejected: Collection[str] = (),
    retry: Collection[int] = (),
) -> PatientResult | None:
    """What `prepare_patient` would return if nothing has to be made, else None. Needs no imaging library."""
    try:
        return _Patient(profile, out / pseudonym, pseudonym, retry).results(scans, rejected)
    except _SomethingToMakeError:
        return None


def record_failure(step: StepInHand, profile: Profile, folder: Path, code: str) -> None:
    """Record for a process that died, or was stopped, in the middle of a scan; `folder` is the patient's."""
    scan = step.scan
    record = new_record(profile, folder.name, index=scan.index, days=scan.days, keys=step.keys, baseline=step.baseline)
    write_without_outputs(folder / str(scan.index), record, "failed", [code])


def forget_step(folder: Path, step: str) -> None:
    """Have a patient's scans made again from `step` on by the next run; arrays stay until then."""
    for scan in (p for p in folder.glob("*") if p.name.isdigit()):
        record = read_record(scan)
        if step != "register" or (record is not None and record["baseline"] != record["index"]):
            forget(scan, mask=step == "segment")


class _SomethingToMakeError(Exception):
    """A scan is not as its record says, and there is nobody to make it."""


@dataclass(frozen=True)
class _Baseline:
    scan: ScanInput
    key: str


class _Patient:
    """The state of one patient's preparation: the baseline, once there is one. Without a maker nothing is made."""

    def __init__(
        self,
        profile: Profile,
        folder: Path,
        pseudonym: str,
        retry: Collection[int],
        maker: Callable[[_Patient], Maker] | None = None,
        on_step: Callable[[StepInHand], None] | None = None,
    ) -> None:
        self.profile = profile
        self.folder = folder
        self.pseudonym = pseudonym
        self.retry = retry
        self.on_step = on_step
        self.baseline: _Baseline | None = None
        self.stopped = ""  # code of a failure of the baseline that may pass: without it nothing can be aligned
        self._new_maker = maker
        self._maker: Maker | None = None

    def results(self, scans: Sequence[ScanInput], rejected: Collection[str]) -> PatientResult:
        """All scans in time order."""
        self._remove_others({scan.index for scan in scans})
        found = [self._result(scan, rejected) for scan in sorted(scans, key=lambda s: (s.days, s.index))]
        return PatientResult(self.pseudonym, tuple(self._with_breath_check(found)))

    def _result(self, scan: ScanInput, rejected: Collection[str]) -> ScanResult:
        if self.stopped:
            return self._failed(scan, Keys(), self.stopped, "the baseline failed")
        scan_key, keys = "", Keys()
        try:
            scan = replace(scan, source_sha256=source_key(scan))
            scan_key = read_key(scan.source_sha256, self.profile)
            output = output_key(scan_key, self.profile, self.baseline.key if self.baseline else None)
            keys = Keys(output, recipe_key(scan_key, self.profile))
            left_out = keys.recipe in rejected
            result = (left_out and self._left_out(scan, keys)) or self._reused(scan, keys) or self._made(scan, keys)
        except (_SomethingToMakeError, ConfigError, ModelError, TemporaryStop):
            raise
        except Exception as error:  # image libraries, drivers and plug-ins fail in many ways; each is about this scan
            left_out, result = False, self._fallen(scan, keys, error)
        if self.baseline is None and not left_out:
            if result.status == "failed":
                self.stopped = result.code
            elif result.status != "refused":
                self.baseline = _Baseline(scan, scan_key)
        return result if result.status != "refused" or result.detail else self._explained(result)

    def _fallen(self, scan: ScanInput, keys: Keys, error: Exception) -> ScanResult:
        """What an error means that no reader of ours raised: files that are gone, a disk in trouble, or this scan."""
        if reason := self._unreadable(scan):
            return self._failed(scan, Keys(), "E_READ", reason)
        if isinstance(error, OSError):  # not of reading, so of writing: that is no fault of the scan
            raise from_os(error, str(self.folder)) or error from None
        code = "OUT_OF_MEMORY" if _is_out_of_memory(error) else "E_INTERNAL"
        return self._failed(scan, keys, code, without_paths(f"{type(error).__name__}: {error}", scan))

    def _unreadable(self, scan: ScanInput) -> str:
        """Why the files of a scan, or of its baseline, cannot be read just now; empty if they can."""
        return unreadable(scan) or (unreadable(self.baseline.scan) if self.baseline else "")

    def _explained(self, result: ScanResult) -> ScanResult:
        """A scan that the limits refuse, with the numbers that did it: also where it was refused by an earlier run."""
        from fourdvq.preprocessing.grades import refusal_words

        return replace(result, detail=refusal_words(result.code, result.qc.get("scan") or {}, self.profile.limits))

    def _left_out(self, scan: ScanInput, keys: Keys) -> ScanResult | None:
        """A rejected scan as it was made, whatever the baseline is now; None if there is none to look at."""
        folder = self.folder / str(scan.index)
        record = read_record(folder)
        if record is None or record["recipe_sha256"] != keys.recipe or not is_intact(folder, record):
            return None
        return result_of(folder, self._brought_up(scan, folder, record), reused=True)

    def _reused(self, scan: ScanInput, keys: Keys) -> ScanResult | None:
        folder = self.folder / str(scan.index)
        record = read_record(folder)
        if record is None or record["key"] != keys.output or not is_intact(folder, record):
            return None
        if record["status"] in ("refused", "failed") and scan.index in self.retry:
            return None
        record = self._brought_up(scan, folder, record)
        result = result_of(folder, record, reused=True)
        pair = result.qc.get("pair")
        if pair and self.baseline and pair["days_between"] != scan.days - self.baseline.scan.days:
            pair["days_between"] = scan.days - self.baseline.scan.days
            write_record(folder, record, result.qc)
        return result

    def _brought_up(self, scan: ScanInput, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
        """The record with what may change without changing a voxel."""
        now = {"days": scan.days, "profile_sha256": self.profile.sha256, "profile": profile_to_plain(self.profile)}
        if any(record[name] != value for name, value in now.items()):
            record |= now
            rewrite_record(folder, record)
        return record

    def _made(self, scan: ScanInput, keys: Keys) -> ScanResult:
        if self._new_maker is None:
            raise _SomethingToMakeError
        if self._maker is None:
            self._maker = self._new_maker(self)
        maker, base, folder = self._maker, self.baseline, self.folder / str(scan.index)
        index = base.scan.index if base else None
        maker.say = lambda name: self._say(StepInHand(scan, name, keys, index))
        record = self._new_record(scan, keys) | {"versions": maker.versions}
        mask_key = segment_key(scan.source_sha256, self.profile)
        try:
            checked = maker.read_and_check(scan, mask_key)
            if checked.refused:
                return write_without_outputs(folder, record, "refused", checked.codes, facts=checked.plain_facts())
            if base is None:
                made = maker.baseline_output(scan, checked)
            else:
                base_mask = segment_key(base.scan.source_sha256, self.profile)
                made = maker.follow_up_output(scan, checked, base.scan, base_mask)
        except DataError as error:
            if reason := self._unreadable(scan):
                return self._failed(scan, Keys(), "E_READ", reason)
            return write_without_outputs(folder, record, "refused", [error.code], detail=told(error, scan))
        record |= write_outputs(folder, made.hu, made.mask, made.pictures)
        record |= made.described | _outcome(made.qc["codes"], made.qc["grade"])
        write_record(folder, record, made.qc)
        return result_of(folder, record, reused=False)

    def _failed(self, scan: ScanInput, keys: Keys, code: str, detail: str) -> ScanResult:
        """A failed scan with its record; what was made of a scan that cannot be read just now is left as it is."""
        folder, record = self.folder / str(scan.index), self._new_record(scan, keys)
        known = read_record(folder)
        if known is not None and known["status"] == "failed" and known == {**known, **record, "code": code}:
            return result_of(folder, known, reused=True)
        if code == "E_READ" and known is not None and is_intact(folder, known):
            return ScanResult(scan.index, scan.days, "failed", code, "", detail=detail)
        with reading(str(self.folder)):
            return write_without_outputs(folder, record, "failed", [code], detail=detail)

    def _new_record(self, scan: ScanInput, keys: Keys) -> dict[str, Any]:
        baseline = self.baseline.scan.index if self.baseline else None
        return new_record(self.profile, self.pseudonym, index=scan.index, days=scan.days, keys=keys, baseline=baseline)

    def _remove_others(self, indices: Collection[int]) -> None:
        """A scan that was taken out of the cohort must not stay in what training reads."""
        for folder in self.folder.glob("*") if self.folder.is_dir() else ():
            if folder.is_dir() and folder.name.isdigit() and int(folder.name) not in indices:
                shutil.rmtree(folder)

    def _with_breath_check(self, results: list[ScanResult]) -> list[ScanResult]:
        """Send a scan to review that has much less lung than all others of the patient."""
        from fourdvq.preprocessing.grades import expiratory

        volumes = {r.index: float(r.qc["scan"]["lung_ml"]) for r in results if r.content_sha256 and r.qc.get("scan")}
        suspects = expiratory(volumes)
        return [self._breath(r, r.index in suspects) if r.index in volumes else r for r in results]

    def _breath(self, result: ScanResult, suspect: bool) -> ScanResult:
        from fourdvq.preprocessing.grades import grade_of

        folder = self.folder / str(result.index)
        record = read_record(folder)
        # A header may have said so already: only what this comparison added is taken back.
        added = record is not None and record.get("less_lung", False)
        if record is None or suspect == added or (suspect and "V_EXPIR" in result.codes):
            return result
        codes = [c for c in result.codes if c != "V_EXPIR"] + (["V_EXPIR"] if suspect else [])
        codes.sort(key=lambda code: "EVW".index(code[0]))  # stable: the gravest first, as they were found
        grade = grade_of(codes, result.qc["pair"]["grade"] if result.qc.get("pair") else "PASS")
        record |= _outcome(codes, grade) | {"less_lung": suspect}
        write_record(folder, record, result.qc | {"codes": codes, "grade": grade})
        return result_of(folder, record, reused=result.reused)

    def _say(self, step: StepInHand) -> None:
        if self.on_step is not None:
            self.on_step(step)


def _is_out_of_memory(error: Exception) -> bool:
    """torch and ITK say so in words only."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


def _outcome(codes: list[str], grade: str) -> dict[str, object]:
    return {
        "codes": codes,
        "code": shown_code(codes),
        "grade": grade,
        "status": "ok" if grade == "PASS" else "review",
    }
