"""Figures of the intake: the time from a folder of DICOM to a volume, and what damaged headers do."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _common import cpu_seconds, emit, figure, quartiles  # type: ignore[import-not-found]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dicom_factory import compress, write_series
from fourdvq.data.choice import best_series
from fourdvq.data.cohort import Cohort, load_cohort
from fourdvq.data.dicom import scan_folder
from fourdvq.data.dicom_studies import DicomOptions
from fourdvq.data.known_headers import KnownHeaders
from fourdvq.data.series import load_series
from fourdvq.data.volume import Volume
from header_fuzz import CHECKED_TWICE, SAID_ONCE, fuzz_apart
from synthetic_lungs import chest

SLICES, EDGE = 300, 512
INTAKE_SECONDS = 5.0
FUZZ_SECONDS = 180.0
MUTATIONS = 2000


def figures(quick: bool) -> list[dict[str, Any]]:
    """Intake of a 300-slice series in CPU seconds, plain and compressed; the fuzz row; a folder of many files."""
    with _folder() as folder:
        plain = _series(folder / "plain")
        result = [_intake(folder / "plain", plain, 3 if quick else 7), _parts(folder / "plain")]
        result += [_compressed(folder / how, plain, how, quick) for how in ("RLE", "JPEG", "JPEG2000")]
    result.append(_remembered(4 if quick else 24))
    result.append(_many_files(5_000 if quick else 100_000))
    return [*result, *_fuzzed(quick)]


def _series(folder: Path) -> Volume:
    """300 axial images of 512 x 512 pixels, a chest with noise of its own in every voxel."""
    coarse, _ = chest((SLICES // 3, EDGE // 4, EDGE // 4))
    hu = np.repeat(np.repeat(np.repeat(coarse.hu, 3, axis=0), 4, axis=1), 4, axis=2)
    noise = np.random.default_rng(0).integers(-8, 9, hu.shape, dtype=np.int16)
    volume = Volume(np.clip(hu + noise, -1024, 3071), (1.0, 0.7, 0.7), (-180.0, -180.0, -150.0))
    write_series(folder, volume)
    return volume


def _intake(folder: Path, truth: Volume, repeat: int) -> dict[str, Any]:
    kept: list[Volume] = []

    def read() -> None:
        kept[:] = [load_series(best_series(folder)).volume]

    times = cpu_seconds(read, repeat)
    low, middle, high = quartiles(times)
    equal = bool(np.array_equal(kept[0].hu, truth.hu))
    return figure(
        "intake of a 300-slice series (walk, headers, gate, pixels)",
        round(middle, 3),
        "CPU s",
        target=f"<= {INTAKE_SECONDS:g}",
        holds=equal and high <= INTAKE_SECONDS,
        n=len(times),
        spread=(round(low, 3), round(high, 3)),
        seconds=sum(times),
        note=f"{SLICES} x {EDGE} x {EDGE}, uncompressed, one thread; voxels equal to the written ones: {equal}",
    )


def _parts(folder: Path) -> dict[str, Any]:
    headers = min(cpu_seconds(lambda: scan_folder(folder), 3))
    return figure("headers of a 300-slice series (what scan does)", round(headers, 3), "CPU s", n=3)


def _compressed(folder: Path, truth: Volume, how: str, quick: bool) -> dict[str, Any]:
    """A fifth of the series (a tenth in quick mode), scaled up: making all of it takes longer than reading it."""
    count = SLICES // (10 if quick else 5)
    for path in write_series(folder, Volume(truth.hu[:count], truth.spacing, truth.origin)):
        compress(path, how)
    kept: list[Volume] = []
    (seconds,) = cpu_seconds(lambda: kept.append(load_series(best_series(folder)).volume))
    whole = seconds * SLICES / count
    equal = bool(np.array_equal(kept[0].hu, truth.hu[:count]))
    note = f"measured on {count} slices, scaled to {SLICES}; voxels equal to the uncompressed ones: {equal}"
    shutil.rmtree(folder)
    return figure(
        f"intake of a 300-slice series, {how}",
        round(whole, 2),
        "CPU s",
        n=1,
        seconds=seconds,
        note=note,
    )


def _remembered(scans: int) -> dict[str, Any]:
    """The second look at a hospital's export: its cohort from unchanged files, without and with a memory of headers."""
    rng = np.random.default_rng(0)
    with _folder() as folder:
        rows = ["patient_id,age,sex,smoking,time_days,event"]
        for n in range(scans):
            pixels = rng.integers(-1000, 400, (SLICES, 8, 8), dtype=np.int16)  # of its own, so that no scan is a double
            volume = Volume(pixels, (1.0, 45.0, 45.0), (-180.0, -180.0, -150.0))
            patient, date = f"P{n // 2:03d}", f"{2014 + n % 2}0301"
            write_series(folder / "scans" / str(n), volume, patient_id=patient, study_date=date, study=str(n))
        rows += [f"P{n:03d},60,M,ever,900,death" for n in range(scans // 2)]
        (folder / "clinical.csv").write_text("\n".join(rows) + "\n")

        def cohort(known: KnownHeaders | None) -> Cohort:
            return load_cohort(folder / "clinical.csv", None, folder / "scans", dicom=DicomOptions(known=known))

        filled = KnownHeaders()
        read = cohort(filled)
        text = filled.as_text(all_met=True)
        if len(read.scans) != scans or cohort(KnownHeaders(text)) != read:
            raise RuntimeError("a cohort from memory differs from the one that was read")
        (without,) = cpu_seconds(lambda: cohort(None))
        times = cpu_seconds(lambda: cohort(KnownHeaders(text)), 9)
    low, middle, high = quartiles(times)
    count, whole = scans * SLICES, 700 * SLICES
    note = (
        f"walk, memory, grouping, choice; {without:.2f} s without memory; {len(text) / count:.0f} bytes a file; "
        f"scaled to {whole:,} files {middle * whole / count:.1f} s"
    )
    return figure(
        f"resume: headers of {count} unchanged DICOM slices from memory",
        round(middle, 3),
        "CPU s",
        n=len(times),
        spread=(round(low, 3), round(high, 3)),
        seconds=sum(times),
        note=note,
    )


def _many_files(count: int) -> dict[str, Any]:
    with _folder() as folder:
        for k in range(count):
            (folder / f"{k}.txt").write_bytes(b"a note, no image")
        (seconds,) = cpu_seconds(lambda: scan_folder(folder))
    note = f"{count} small files that are no DICOM, scaled to 100,000"
    return figure("walk of 100,000 other files", round(seconds * 100_000 / count, 2), "CPU s", n=count, note=note)


def _fuzzed(quick: bool) -> list[dict[str, Any]]:
    count = 200 if quick else MUTATIONS
    twice, seconds = _timed(lambda: fuzz_apart(CHECKED_TWICE, count, seed=0))
    wrong = len(twice.wrong)
    codes = ", ".join(f"{n} {code}" for code, n in twice.codes.most_common())
    scaled = seconds * MUTATIONS / count
    result = [
        figure(
            "header fuzz: mutations of one file of a DICOM series or of a NIfTI file, neither refused nor identical",
            wrong,
            "mutations",
            target=0,
            holds=wrong == 0,
            n=twice.count,
            seconds=seconds,
            note=f"{twice.verdicts['refused']} refused ({codes}), {twice.verdicts['identical']} identical in geometry "
            f"and voxels, {twice.verdicts['crashed'] + twice.verdicts['died']} crashes",
        ),
        figure(
            "header fuzz: wall time of 2,000 mutations",
            round(scaled, 1),
            "s",
            target=f"<= {FUZZ_SECONDS:g}",
            holds=scaled <= FUZZ_SECONDS,
            n=twice.count,
            note="in a process of its own, as preparation reads; includes four process starts",
        ),
    ]
    once, seconds = _timed(lambda: fuzz_apart(SAID_ONCE, 120 if quick else 1200, seed=0))
    crashes = once.verdicts["crashed"] + once.verdicts["died"]
    verdicts = ", ".join(f"{n} {verdict}" for verdict, n in once.verdicts.most_common())
    note = f"{verdicts}; enhanced DICOM, MHA, NRRD and code streams say a number once: what it says is read"
    name = "header fuzz of files without a second copy of their geometry: crashes"
    return [
        *result,
        figure(name, crashes, "mutations", target=0, holds=crashes == 0, n=once.count, seconds=seconds, note=note),
    ]


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.monotonic()
    return work(), time.monotonic() - start


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="intake-") as name:
        yield Path(name)


if __name__ == "__main__":
    emit("preprocessing", figures("--quick" in sys.argv), "--quick" in sys.argv)
