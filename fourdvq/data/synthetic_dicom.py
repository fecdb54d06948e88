"""A generated volume as a CT series that says in every header that no scanner made it.

For viewers that read DICOM only. The series is derived and secondary, so this package's own intake, and any other that
reads ImageType, leaves it out. It holds no patient: every identifier is new, and made from the image's own content.
Source: DICOM PS3.3, CT Image IOD (A.3) and General Image module (C.7.6.1).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fourdvq.data.volume import Volume

PATIENT = "SYNTHETIC"
_AIR_HU = -1024  # stored values start here, so that all are positive in the viewers that ignore signs


@dataclass(frozen=True)
class Provenance:
    """What made the series: years since the first scan, the model's version and its weights' sha256, a warning."""

    years: float
    model: str
    weights_sha256: str
    label: str


def write_synthetic_series(volume: Volume, folder: Path, made_by: Provenance, *, number: int = 1) -> tuple[Path, ...]:
    """Write `volume` as files IM0001.dcm ..., first slice first; returns their paths.

    `number` is the series number: series of one trajectory share a study and a frame of reference, made from the
    model and the grid's place. HU and geometry read back as they are, to the 16 characters of a DICOM number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = (made_by.weights_sha256, repr((volume.origin, volume.direction, volume.spacing, volume.hu.shape)))
    own = (*shared, f"{made_by.years:.6f}", hashlib.sha256(volume.hu.tobytes()).hexdigest())
    dataset = _common(volume, made_by, number)
    dataset.StudyInstanceUID = _uid("study", *shared)
    dataset.FrameOfReferenceUID = _uid("frame", *shared)
    dataset.SeriesInstanceUID = _uid("series", *own)
    stored = (volume.hu.astype(np.int32) - _AIR_HU).astype("<i2")
    along = np.array(volume.direction).reshape(3, 3)[:, 2] * volume.spacing[0]
    paths = []
    for k, pixels in enumerate(stored):
        uid = _uid("image", *own, str(k))
        dataset.file_meta.MediaStorageSOPInstanceUID = uid
        dataset.SOPInstanceUID = uid
        dataset.InstanceNumber = k + 1
        dataset.ImagePositionPatient = [_number(v) for v in np.array(volume.origin) + k * along]
        dataset.PixelData = pixels.tobytes()
        path = folder / f"IM{k + 1:04d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return tuple(paths)


def _common(volume: Volume, made_by: Provenance, number: int) -> FileDataset:
    """What all slices share."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _uid("implementation")
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = CTImageStorage
    dataset.Modality = "CT"
    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    dataset.PatientID = dataset.PatientName = PATIENT
    # Required, and empty: there is no person, no visit and no scanner behind this image.
    dataset.PatientBirthDate = dataset.PatientSex = dataset.ReferringPhysicianName = ""
    dataset.StudyDate = dataset.StudyTime = dataset.StudyID = dataset.AccessionNumber = ""
    dataset.PositionReferenceIndicator = dataset.PatientPosition = ""
    dataset.KVP = dataset.AcquisitionNumber = None
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "no patient data was put in"
    dataset.Manufacturer = "fourdvq"
    dataset.ManufacturerModelName = made_by.model[:64]
    dataset.SeriesNumber = number
    dataset.SeriesDescription = f"SYNTHETIC {made_by.years:g} years"
    dataset.ImageComments = made_by.label
    dataset.DerivationDescription = (
        f"SYNTHETIC: generated for {made_by.years:g} years after the first scan by the 4D-VQ-GAN {made_by.model}, "
        f"weights sha256 {made_by.weights_sha256}"
    )
    dataset.ContentQualification = "RESEARCH"
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    _geometry(dataset, volume)
    return dataset


def _geometry(dataset: FileDataset, volume: Volume) -> None:
    dz, dy, dx = volume.spacing
    direction = np.array(volume.direction).reshape(3, 3)
    dataset.SliceThickness = dataset.SpacingBetweenSlices = _number(dz)
    dataset.PixelSpacing = [_number(dy), _number(dx)]
    dataset.ImageOrientationPatient = [_number(v) for v in (*direction[:, 0], *direction[:, 1])]
    dataset.Rows, dataset.Columns = volume.hu.shape[1:]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, _AIR_HU, "HU"


def _number(value: float) -> str:
    """A decimal string: at most 16 characters."""
    text = f"{value:.10g}"
    return text if len(text) <= 16 else f"{value:.8g}"


def _uid(*parts: str) -> str:
    return str(generate_uid(entropy_srcs=["fourdvq synthetic", *parts]))
