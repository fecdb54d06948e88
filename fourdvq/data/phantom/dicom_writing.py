"""A phantom scan as a CT series, one file per slice, as a hospital would export it.

Names, dates and numbers in the headers are invented; identifiers are a function of the patient's seed, so the same
cohort gives the same files. They hold what the intake must not let through: that is what they are for.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fourdvq.data.phantom.patients import PhantomPatient, PhantomVisit
from fourdvq.data.phantom.sites import site_style
from fourdvq.data.volume import Volume

_FAMILY_NAMES = ("Peeters", "Janssens", "Maes", "Claes", "Wouters", "Smith", "Taylor", "Evans", "Walker", "Hughes")
_GIVEN_NAMES = {"M": ("Jan", "Luc", "Marc", "John", "Peter"), "F": ("Anna", "Maria", "Els", "Mary", "Susan")}
_KERNEL_ORDER = ("soft", "standard", "sharp")


def write_series(volume: Volume, patient: PhantomPatient, visit: PhantomVisit, folder: Path) -> None:
    """Write `volume` (D, H, W) as files IM0001.dcm ... in `folder`, from the head downwards."""
    folder.mkdir(parents=True, exist_ok=True)
    depth = len(volume.hu)
    dataset = _common(volume, patient, visit)
    stored = (volume.hu.astype(np.int32) + 1024).astype(np.int16)
    x0, y0, z0 = volume.origin
    for number in range(1, depth + 1):
        row = depth - number
        z = z0 + row * volume.spacing[0]
        uid = _uid(patient, visit, f"image {number}")
        dataset.file_meta.MediaStorageSOPInstanceUID = uid
        dataset.SOPInstanceUID = uid
        dataset.InstanceNumber = number
        dataset.ImagePositionPatient = [f"{x0:.6f}", f"{y0:.6f}", f"{z:.6f}"]
        dataset.SliceLocation = f"{z:.6f}"
        dataset.PixelData = stored[row].tobytes()
        dataset.save_as(folder / f"IM{number:04d}.dcm", enforce_file_format=True)


def _common(volume: Volume, patient: PhantomPatient, visit: PhantomVisit) -> FileDataset:
    """What all slices share: patient, study, series, scanner and geometry."""
    style = site_style(patient.site)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = generate_uid(entropy_srcs=["fourdvq phantom"])
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    _identify(dataset, patient, visit)
    dataset.SOPClassUID = CTImageStorage
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Manufacturer = style.manufacturer
    dataset.KVP = style.kvp
    dataset.ConvolutionKernel = style.kernels[_KERNEL_ORDER.index(visit.kernel)]
    dataset.BodyPartExamined = "CHEST"
    dataset.ProtocolName = "Thorax inspiration"
    dataset.SeriesDescription = "Thorax"
    dataset.PatientPosition = "HFS"
    dz, dy, dx = volume.spacing
    dataset.SliceThickness = f"{dz:.6f}"
    dataset.SpacingBetweenSlices = f"{dz:.6f}"
    dataset.PixelSpacing = [f"{dy:.6f}", f"{dx:.6f}"]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.Rows, dataset.Columns = volume.hu.shape[1:]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    return dataset


def _identify(dataset: FileDataset, patient: PhantomPatient, visit: PhantomVisit) -> None:
    day = datetime.date.fromisoformat(patient.first_date) + datetime.timedelta(days=visit.days)
    born = datetime.date.fromisoformat(patient.birth_date)
    pick = patient.number + patient.cohort_seed
    given = _GIVEN_NAMES[patient.sex]
    dataset.PatientID = patient.patient_id
    dataset.PatientName = f"{_FAMILY_NAMES[pick % len(_FAMILY_NAMES)]}^{given[pick // 7 % len(given)]}"
    dataset.PatientBirthDate = born.strftime("%Y%m%d")
    dataset.PatientSex = patient.sex
    dataset.PatientAge = f"{int(patient.age + visit.years):03d}Y"
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = day.strftime("%Y%m%d")
    dataset.StudyTime = dataset.SeriesTime = "101500"
    dataset.StudyID = visit.scan_id
    dataset.AccessionNumber = f"{patient.patient_id[-6:]}{visit.days:05d}"
    dataset.ReferringPhysicianName = ""
    dataset.InstitutionName = patient.site
    dataset.StudyInstanceUID = _uid(patient, visit, "study")
    dataset.SeriesInstanceUID = _uid(patient, visit, "series")
    dataset.FrameOfReferenceUID = _uid(patient, visit, "frame")
    dataset.SeriesNumber = 2
    dataset.AcquisitionNumber = 1


def _uid(patient: PhantomPatient, visit: PhantomVisit, what: str) -> str:
    """A unique identifier that is the same whenever the cohort is made again."""
    return str(generate_uid(entropy_srcs=["fourdvq phantom", *map(str, patient.stream()), visit.scan_id, what]))
