"""Writes good DICOM series with pydicom, and lets a test break them one tag, one file or one slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fourdvq.data.volume import Volume

Edit = Callable[[int, Dataset], None]
CANARY_ID = "CANARY-PATIENT-4711"
CANARY_NAME = "Canary^Catharina"
CANARY_DATE = "20150301"


def write_series(
    folder: Path,
    volume: Volume,
    *,
    edit: Edit | None = None,
    leave_out: Iterable[int] = (),
    patient_id: str = CANARY_ID,
    study_date: str = CANARY_DATE,
    study: str = "study",
    series: str = "series",
    prefix: str = "im",
) -> list[Path]:
    """One file per axial slice (D, H, W), from the feet up, names in no order; `edit(i, dataset)` may break slice i."""
    folder.mkdir(parents=True, exist_ok=True)
    depth = volume.hu.shape[0]
    files = []
    for i in range(depth):
        if i in set(leave_out):
            continue
        data = _dataset(volume, i, study, series)
        data.PatientID, data.PatientName, data.StudyDate = patient_id, CANARY_NAME, study_date
        if edit is not None:
            edit(i, data)
        path = folder / f"{prefix}{(i * 7919) % 100_003:06d}.dcm"
        data.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


def _dataset(volume: Volume, i: int, study: str, series: str) -> Dataset:
    z, y, x = volume.spacing
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPClassUID = CTImageStorage
    data.SOPInstanceUID = generate_uid(entropy_srcs=[study, series, str(i)])
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.StudyInstanceUID = generate_uid(entropy_srcs=[study])
    data.SeriesInstanceUID = generate_uid(entropy_srcs=[study, series])
    data.FrameOfReferenceUID = generate_uid(entropy_srcs=[study, "frame"])
    data.Modality = "CT"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.PatientBirthDate, data.PatientSex = "19500101", "M"
    data.AccessionNumber = "CANARY-ACC-99"
    data.SeriesDescription = "Thorax insp"
    data.PatientPosition = "HFS"
    data.ConvolutionKernel = "B30f"
    data.AcquisitionNumber = 1
    data.InstanceNumber = volume.hu.shape[0] - i
    data.SliceThickness = z
    data.Rows, data.Columns = volume.hu.shape[1:]
    data.PixelSpacing = [y, x]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ox, oy, oz = volume.origin
    data.ImagePositionPatient = [ox, oy, oz + i * z]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = (volume.hu[i].astype(np.int32) + 1024).astype("<u2").tobytes()
    return data


def rewrite(path: Path, change: Callable[[Dataset], None]) -> None:
    """Change one written file."""
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path, enforce_file_format=True)
