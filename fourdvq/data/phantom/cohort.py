"""A whole phantom cohort on disk: scans, the two tables a hospital brings, and the truth."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context, resource_tracker
from pathlib import Path
from typing import Literal

import numpy as np

from fourdvq.data.files import csv_bytes, write_atomic
from fourdvq.data.phantom.patients import PhantomPatient, draw_patients
from fourdvq.data.phantom.rendering import scan
from fourdvq.data.phantom.truth import PhantomCohort, write_patients, write_scan_truth
from fourdvq.data.volume import Volume, write_nifti
from fourdvq.errors import CohortError, ConfigError

Format = Literal["nifti", "dicom"]
_FORMATS = ("dicom", "nifti")


def make_cohort(
    out: Path,
    *,
    patients: int,
    seed: int,
    size: tuple[int, int, int] = (96, 256, 256),
    format: Format = "nifti",
    scans_per_patient: tuple[int, int] = (2, 4),
    site: str = "leuven",
    longitudinal_share: float = 1.0,
    masks: bool = True,
    truth: bool = True,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> PhantomCohort:
    """Write a cohort of `patients` under `out`; the same arguments give the same files, byte for byte.

    out/scans/<patient>/<scan>.nii.gz (or a folder of DICOM slices), with `masks` also <scan>_lung.nii.gz;
    out/scans.csv, out/clinical.csv, and with `truth` out/truth (see `fourdvq.data.phantom.truth`). A share
    `longitudinal_share` of the patients has between the two numbers of `scans_per_patient`, the others one scan.
    `progress(done, all)` is called after each patient; `workers` > 1 spawns processes. The tables are written last, so
    an interrupted cohort can be made again in place.
    Raises CohortError E_EXISTS if `out` holds a finished cohort, ConfigError E_VALUE for impossible arguments.
    """
    if format not in _FORMATS:
        raise ConfigError("E_VALUE", where="phantom: format", found=repr(format), wanted=" or ".join(_FORMATS))
    if workers < 1:
        raise ConfigError("E_VALUE", where="phantom: workers", found=repr(workers), wanted="1 or more")
    drawn = draw_patients(
        patients,
        seed,
        size=size,
        scans_per_patient=scans_per_patient,
        site=site,
        longitudinal_share=longitudinal_share,
    )
    if (out / "clinical.csv").exists():
        raise CohortError("E_EXISTS", where=str(out), found="clinical.csv", wanted="an empty or new folder")
    out.mkdir(parents=True, exist_ok=True)
    for done in _write_all(out, drawn, format, masks, truth, workers):
        if progress is not None:
            progress(done, len(drawn))
    if truth:
        write_patients(out, drawn)
    _write_tables(out, drawn, format, masks)
    return PhantomCohort(out, drawn)


def _write_all(
    out: Path, drawn: tuple[PhantomPatient, ...], format: Format, masks: bool, truth: bool, workers: int
) -> Iterator[int]:
    """Write every patient; yields how many are done."""
    if workers == 1 or len(drawn) == 1:
        for done, patient in enumerate(drawn, start=1):
            write_patient(out, patient, format, masks, truth)
            yield done
        return
    # Spawned, not forked: a caller may hold threads (torch, gRPC) that a fork would copy in an undefined state.
    pool = ProcessPoolExecutor(min(workers, len(drawn)), mp_context=get_context("spawn"))
    others = set(active_children())
    try:
        with _unheard_by_children():
            jobs = [pool.submit(write_patient, out, patient, format, masks, truth) for patient in drawn]
        for done, job in enumerate(as_completed(jobs), start=1):
            job.result()
            yield done
    except BaseException:
        # A patient takes up to a minute, and whoever stops this has said that nobody waits for it.
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _unheard_by_children() -> Iterator[None]:
    """Ctrl-C at the terminal reaches this process, which ends its children; they themselves would print tracebacks."""
    resource_tracker.ensure_running()  # multiprocessing's own helper first: its start would end the blocking
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits what is blocked
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_patient(out: Path, patient: PhantomPatient, format: Format, masks: bool, truth: bool) -> None:
    """Render and write all scans of one patient."""
    folder = out / "scans" / patient.patient_id
    folder.mkdir(parents=True, exist_ok=True)
    for visit in patient.visits:
        made = scan(patient, visit)
        if format == "dicom":
            from fourdvq.data.phantom.dicom_writing import write_series

            write_series(made.volume, patient, visit, folder / visit.scan_id)
        else:
            write_nifti(made.volume, folder / f"{visit.scan_id}.nii.gz")
        if masks:
            mask = Volume(made.lung.astype(np.uint8), made.volume.spacing, made.volume.origin, made.volume.direction)
            write_nifti(mask, folder / f"{visit.scan_id}_lung.nii.gz")
        if truth:
            write_scan_truth(out, patient.patient_id, visit.scan_id, made)


def _write_tables(out: Path, drawn: tuple[PhantomPatient, ...], format: Format, masks: bool) -> None:
    suffix = ".nii.gz" if format == "nifti" else ""
    scans: list[list[object]] = []
    for patient in drawn:
        for visit in patient.visits:
            stem = f"scans/{patient.patient_id}/{visit.scan_id}"
            mask = f"{stem}_lung.nii.gz" if masks else ""
            scans.append([patient.patient_id, visit.scan_id, stem + suffix, visit.days, mask])
    clinical: list[list[object]] = [[p.patient_id, p.age, p.sex, p.smoking, p.time_days, p.event] for p in drawn]
    scan_columns = ["patient_id", "scan_id", "path", "days_from_baseline", "mask"]
    write_atomic(out / "scans.csv", csv_bytes(scan_columns, scans))
    patient_columns = ["patient_id", "age", "sex", "smoking", "time_days", "event"]
    write_atomic(out / "clinical.csv", csv_bytes(patient_columns, clinical))
