"""The truth beside a phantom cohort: written with it, read back by whoever wants to score against it.

truth/patients.json         the cohort's arguments and, per patient, every scalar: enough to render it again
truth/<patient>/<scan>_severity.npy      uint8 (D, H, W), severity x 255, on the scan's own grid
truth/<patient>/<scan>_lung.npy          uint8, the lung mask's bits packed in C order (numpy.packbits)
truth/<patient>/<scan>_displacement.npy  float32 (3, d, h, w) nodes: first CT to this scan, x, y, z in mm
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourdvq.config import to_plain
from fourdvq.data.files import write_atomic, write_with
from fourdvq.data.phantom.fields import Array
from fourdvq.data.phantom.patients import PhantomPatient, patient_from
from fourdvq.data.phantom.rendering import PhantomScan, displacement_field
from fourdvq.errors import CohortError

FORMAT = 1


@dataclass(frozen=True)
class PhantomCohort:
    """A cohort on disk: its folder and its patients; all truth follows from these."""

    folder: Path
    patients: tuple[PhantomPatient, ...]

    def patient(self, patient_id: str) -> PhantomPatient:
        """The patient with this id. Raises CohortError E_FILE if the cohort does not have it."""
        for patient in self.patients:
            if patient.patient_id == patient_id:
                return patient
        raise CohortError("E_FILE", where=str(self.folder), found="no such patient", wanted=patient_id)


def write_patients(folder: Path, patients: tuple[PhantomPatient, ...]) -> None:
    """Write truth/patients.json."""
    text = json.dumps({"format": FORMAT, "patients": to_plain(patients)}, indent=1)
    write_atomic(folder / "truth" / "patients.json", f"{text}\n".encode())


def load_cohort_truth(folder: Path) -> PhantomCohort:
    """Read the truth of the cohort in `folder`. Raises CohortError E_FILE if there is none that this version reads."""
    path = folder / "truth" / "patients.json"
    if not path.is_file():
        raise CohortError("E_FILE", where=str(path), fix="make the cohort with its truth: `fourdvq-client phantom`")
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("format") != FORMAT:
        raise CohortError("E_FILE", where=str(path), found=f"format {data.get('format')!r}", wanted=f"format {FORMAT}")
    return PhantomCohort(folder, tuple(patient_from(row) for row in data["patients"]))


def write_scan_truth(folder: Path, patient_id: str, scan_id: str, scan: PhantomScan) -> None:
    """Write the three arrays of one scan."""
    arrays = {
        "severity": np.rint(scan.severity * 255.0).astype(np.uint8),
        "lung": np.packbits(scan.lung),
        "displacement": scan.displacement.astype(np.float32),
    }
    for name, array in arrays.items():
        _save(_path(folder, patient_id, scan_id, name), array)


def load_severity(folder: Path, patient: PhantomPatient, scan_id: str) -> Array:
    """Severity (D, H, W) in [0, 1], in steps of 1/255, on the scan's own grid."""
    return _load(_path(folder, patient.patient_id, scan_id, "severity")).astype(np.float32) / np.float32(255.0)


def load_lung(folder: Path, patient: PhantomPatient, scan_id: str) -> NDArray[np.bool_]:
    """Lung mask (D, H, W) of a scan; trachea and main bronchi are not lung."""
    bits = _load(_path(folder, patient.patient_id, scan_id, "lung"))
    count = int(np.prod(patient.size))
    return np.unpackbits(bits, count=count).reshape(patient.size).astype(bool)


def load_displacement(folder: Path, patient: PhantomPatient, scan_id: str) -> Array:
    """True displacement (3, D, H, W), x, y, z in mm, on the grid of the first CT.

    Voxel p of the first CT shows the tissue that lies at p + displacement in the scan `scan_id`.
    """
    return displacement_field(_load(_path(folder, patient.patient_id, scan_id, "displacement")), patient.size)


def _path(folder: Path, patient_id: str, scan_id: str, name: str) -> Path:
    return folder / "truth" / patient_id / f"{scan_id}_{name}.npy"


def _load(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise CohortError("E_FILE", where=str(path))
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    return array


def _save(path: Path, array: NDArray[np.generic]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)

    write_with(path, write)
