"""Damages one file of a scan at a time, byte by byte or value by value, and says what became of the scan.

A verdict is `refused` (with its code), `identical` (geometry and voxels as before), or what must never be: `changed`,
or an exception that is no refusal. Damage is done to headers only; seeded, so that every verdict can be had again.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dicom_factory import compress, write_enhanced, write_series
from fourdvq.data.choice import best_series
from fourdvq.data.series import load_series
from fourdvq.data.volume import Volume, read_volume, to_image, write_nifti
from fourdvq.errors import VolumeError
from synthetic_lungs import chest

CORNER_MM = 0.1  # what the gate itself tolerates in placements that disagree
# Kinds whose geometry and scale stand in two places or in many files, so that damage to one can be seen.
CHECKED_TWICE = ("dicom-first", "dicom-middle", "dicom-last", "nii")
# One number in one place: what it says is believed, if it can be.
SAID_ONCE = ("enhanced", "mha", "nrrd", "JPEG2000", "JPEG", "RLE")


@dataclass
class Tally:
    """Verdicts of many mutations; `wrong` are those that must never be, with what it takes to repeat them."""

    verdicts: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many mutations were tried."""
        return sum(self.verdicts.values())


@dataclass(frozen=True)
class Target:
    """A scan on disk: the file to damage, the length of its header, and how the scan is read."""

    kind: str
    file: Path
    header: int
    read: Callable[[], Volume]


def targets(folder: Path) -> dict[str, Target]:
    """A good scan of each kind, small, with room in the body for what a mutation may do."""
    scan, _ = chest((12, 20, 24))
    volume = Volume(scan.hu, (1.5, 0.75, 0.75), (-80.0, -70.0, -200.0))
    made: dict[str, Target] = {}
    for kind, which in (("dicom-first", 0), ("dicom-middle", 6), ("dicom-last", 11)):
        files = write_series(folder / kind, volume)
        made[kind] = Target(kind, files[which], _pixel_start(files[which]), _series_reader(folder / kind))
    enhanced = write_enhanced(folder / "enhanced" / "a.dcm", volume)
    made["enhanced"] = Target("enhanced", enhanced, _pixel_start(enhanced), _series_reader(enhanced.parent))
    for kind in ("nii", "mha", "nrrd"):
        path = folder / kind / f"a.{kind}"
        path.parent.mkdir(parents=True)
        if kind == "nii":
            write_nifti(volume, path)
        else:
            sitk.WriteImage(to_image(volume), str(path))
        header = path.stat().st_size - volume.hu.nbytes
        made[kind] = Target(kind, path, header, _image_reader(path))
    for how in ("JPEG2000", "JPEG", "RLE"):
        files = write_series(folder / how, volume)
        for path in files:
            compress(path, how)
        # The head of the code stream is as good a place for damage as the header before it.
        head = files[6].read_bytes().rindex(b"\xe0\x7f\x10\x00OB") + 120
        made[how] = Target(how, files[6], head, _series_reader(folder / how))
    return made


def fuzz(target: Target, count: int, seed: int, tally: Tally | None = None) -> Tally:
    """Damage the target's file `count` times, each time from its good state, and note the verdicts."""
    tally = tally or Tally()
    good = target.file.read_bytes()
    whole = target.read()
    try:
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            damaged, what = _damaged(good, target.header, rng)
            if damaged == good:
                tally.verdicts["identical"] += 1
                continue
            target.file.write_bytes(damaged)
            _judge(target, whole, f"{target.kind} seed {seed} number {number}: {what}", tally)
    finally:
        target.file.write_bytes(good)
    return tally


def _judge(target: Target, whole: Volume, name: str, tally: Tally) -> None:
    try:
        found = target.read()
    except VolumeError as error:
        tally.verdicts["refused"] += 1
        tally.codes[error.code] += 1
        return
    except Exception as error:  # the very thing that is looked for
        tally.verdicts["crashed"] += 1
        tally.wrong.append(f"{name}: {type(error).__name__}: {error}")
        return
    difference = _difference(whole, found)
    tally.verdicts["changed" if difference else "identical"] += 1
    if difference:
        tally.wrong.append(f"{name}: {difference}")


def _difference(a: Volume, b: Volume) -> str:
    if a.hu.shape != b.hu.shape:
        return f"shape {a.hu.shape} became {b.hu.shape}"
    apart = float(np.abs(_corners(a) - _corners(b)).max())
    if not apart <= CORNER_MM:
        return f"corners {apart:.3f} mm apart"
    return "" if np.array_equal(a.hu, b.hu) else f"voxels up to {np.abs(a.hu.astype(int) - b.hu).max()} HU apart"


def _corners(v: Volume) -> np.ndarray:
    d, h, w = v.hu.shape
    ends = np.array([[x, y, z] for x in (0, w - 1) for y in (0, h - 1) for z in (0, d - 1)])
    return np.array(v.origin) + (ends * np.array(v.spacing[::-1])) @ np.array(v.direction).reshape(3, 3).T


def _damaged(good: bytes, header: int, rng: np.random.Generator) -> tuple[bytes, str]:
    """One of: a bit, a byte, a run of bytes, zeros, a cut, an insertion, a removal, a digit, all in the header."""
    raw = bytearray(good)
    at = int(rng.integers(header))
    run = min(int(rng.integers(2, 9)), header - at)
    how = int(rng.integers(10))
    if how < 2:
        raw[at] ^= 1 << int(rng.integers(8))
    elif how < 4:
        raw[at] = int(rng.integers(256))
    elif how == 4:
        raw[at : at + run] = rng.bytes(len(raw[at : at + run]))
    elif how == 5:
        raw[at : at + run] = bytes(len(raw[at : at + run]))
    elif how == 6:
        raw[at:at] = rng.bytes(run)
    elif how == 7:
        del raw[at : at + run]
    elif how == 8:
        raw = raw[: int(rng.integers(len(raw)))]
    else:
        digits = [i for i in range(header) if 48 <= raw[i] <= 57]
        at = digits[int(rng.integers(len(digits)))] if digits else at
        raw[at] = 48 + int(rng.integers(10))
    return bytes(raw), f"damage {how} at byte {at}"


def _image_reader(path: Path) -> Callable[[], Volume]:
    return lambda: read_volume(path)


def _series_reader(folder: Path) -> Callable[[], Volume]:
    return lambda: load_series(best_series(folder)).volume


def _pixel_start(path: Path) -> int:
    raw = path.read_bytes()
    return raw.rindex(b"\xe0\x7f\x10\x00OW") + 12


def fuzz_apart(kinds: tuple[str, ...], count: int, seed: int = 0) -> Tally:
    """`count` mutations in equal parts over `kinds`, in a process of its own as preparation has it.

    A process that dies is the verdict `died`; what it had done until then is lost.
    """
    tally = Tally()
    for kind in kinds:
        share = -(-count // len(kinds))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                one = pool.submit(_fuzz_one, kind, share, seed).result()
            except BrokenProcessPool:
                one = Tally(Counter(died=share), Counter(), [f"{kind} seed {seed}: the process died"])
        tally.verdicts += one.verdicts
        tally.codes += one.codes
        tally.wrong += one.wrong
    return tally


def _fuzz_one(kind: str, count: int, seed: int) -> Tally:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        return fuzz(targets(Path(folder))[kind], count, seed)
