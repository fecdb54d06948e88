"""Writes good DICOM series with pydicom, and lets a test break them one tag, one file or one slice at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

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
    data.Manufacturer, data.KVP = "SIEMENS", 120
    data.PixelData = (volume.hu[i].astype(np.int32) + 1024).astype("<u2").tobytes()
    return data


def rewrite(path: Path, change: Callable[[Dataset], None]) -> None:
    """Change one written file."""
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path, enforce_file_format=True)


def write_enhanced(
    path: Path,
    volume: Volume,
    *,
    order: Sequence[int] | None = None,
    edit: Callable[[Dataset], None] | None = None,
    edit_frame: Edit | None = None,
) -> Path:
    """One enhanced multi-frame file of a volume; frames in `order` (from the head down if none is given).

    Even frames are stored with slope 1, odd ones with slope 0.5 and doubled values, so that only a reader that scales
    each frame by its own tags gets the HU back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = volume.hu.shape[0]
    order = list(range(depth - 1, -1, -1)) if order is None else [int(i) for i in order]
    data = _dataset(volume, 0, "study", "enhanced")
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope"):
        delattr(data, name)
    del data.RescaleIntercept
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = EnhancedCTImageStorage
    data.PatientID, data.PatientName, data.StudyDate = CANARY_ID, CANARY_NAME, CANARY_DATE
    data.NumberOfFrames = len(order)
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.SharedFunctionalGroupsSequence = [_shared_groups(volume)]
    data.PerFrameFunctionalGroupsSequence = [_frame_groups(volume, i, k) for k, i in enumerate(order)]
    scaled = [(volume.hu[i].astype(np.int32) + 1024) * (1 + k % 2) for k, i in enumerate(order)]
    data.PixelData = np.stack(scaled).astype("<u2").tobytes()
    if edit is not None:
        edit(data)
    for k, groups in enumerate(data.PerFrameFunctionalGroupsSequence if edit_frame else ()):
        edit_frame(k, groups)  # type: ignore[misc]  # the loop is empty without it
    data.save_as(path, enforce_file_format=True)
    return path


def _shared_groups(volume: Volume) -> Dataset:
    z, y, x = volume.spacing
    shared, measures, plane, kind = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [y, x], z
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    kind.FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    shared.CTImageFrameTypeSequence = [kind]
    return shared


def _frame_groups(volume: Volume, i: int, k: int) -> Dataset:
    own, place, scale, content = Dataset(), Dataset(), Dataset(), Dataset()
    ox, oy, oz = volume.origin
    place.ImagePositionPatient = [ox, oy, oz + i * volume.spacing[0]]
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 1 / (1 + k % 2), -1024, "HU"
    content.StackID, content.InStackPositionNumber, content.FrameAcquisitionNumber = "1", i + 1, 1
    own.PlanePositionSequence, own.PixelValueTransformationSequence = [place], [scale]
    own.FrameContentSequence = [content]
    return own


def compress(path: Path, how: str) -> None:
    """Store the pixels of a written file another way: RLE, JPEG (lossless), JPEG2000, deflated or big-endian."""
    data = pydicom.dcmread(path)
    if how == "deflated":
        data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    elif how == "big-endian":
        data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        data.PixelData = np.frombuffer(data.PixelData, "<u2").astype(">u2").tobytes()
        data["PixelData"].VR = "OW"
        pydicom.dcmwrite(path, data, implicit_vr=False, little_endian=False, enforce_file_format=True)
        return
    elif how == "RLE":
        data.compress(RLELossless)
    else:
        frames = np.asarray(data.pixel_array).reshape(-1, data.Rows, data.Columns)
        streams = [_code_stream(frame, how) for frame in frames]
        data.file_meta.TransferSyntaxUID = streams[0][1]
        data.PixelData = encapsulate([code for code, _ in streams])
        data["PixelData"].VR = "OB"
    data.save_as(path, enforce_file_format=True)


def _code_stream(frame: np.ndarray, how: str) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory() as folder:
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(f"{folder}/a.dcm")
        writer.UseCompressionOn()
        writer.SetCompressor(how)
        writer.Execute(sitk.GetImageFromArray(frame[None]))
        data = pydicom.dcmread(f"{folder}/a.dcm")
        return next(generate_frames(data.PixelData, number_of_frames=1)), str(data.file_meta.TransferSyntaxUID)
