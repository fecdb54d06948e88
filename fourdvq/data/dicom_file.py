"""One DICOM file: what its header says of each image in it, and where its pixels lie. Pixels are not read here.

Everything read from a header stays in memory at the site. Source of tag names and meanings: DICOM PS3.3 (CT image,
image plane and multi-frame functional groups modules) and PS3.10 (file format).
"""

from __future__ import annotations

import logging
import math
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless

from fourdvq.data.limits import shown
from fourdvq.errors import VolumeError

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1")  # CT image, enhanced CT image
LOSSY_SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)  # JPEG 2000 may be either
# A directory of files, a hanging protocol, a colour palette, raw data, presentation states: whole without a modality.
_NO_IMAGES = tuple(
    "1.2.840.10008." + tail
    for tail in ("1.3.10", "5.1.4.38.1", "5.1.4.39.1", "5.1.4.1.1.66", "5.1.4.1.1.11.1", "5.1.4.1.1.11.2")
)
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
MAX_INFLATED = 1 << 26  # of a deflated file: a CT slice is 0.5 MB, a multi-frame file is not stored this way
_PIXEL_DATA = b"\xe0\x7f\x10\x00"
_UNDEFINED = 0xFFFFFFFF
_CODE_CHARACTERS = 16  # of a code string, PS3.5 table 6.2-1
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "StudyInstanceUID", "SeriesInstanceUID",
    "FrameOfReferenceUID", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "Rows", "Columns",
    "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept",
    "AcquisitionNumber", "ConvolutionKernel", "SeriesDescription", "ProtocolName", "SliceThickness",
    "BurnedInAnnotation", "ContrastBolusAgent", "PatientPosition", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "Manufacturer",
    "KVP", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "LossyImageCompression",
]  # fmt: skip
# pydicom logs header values with its warnings; a log may hold no patient's value.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


class PixelPlace(NamedTuple):
    """How the pixels are stored. `at` is the byte where their value starts, `length` its bytes (-1: compressed)."""

    at: int = 0  # 0: not known, as in a deflated file
    length: int = 0
    bits_allocated: int = 16
    bits_stored: int = 16
    high_bit: int = 15
    signed: bool = False
    samples: int = 1
    photometric: str = "MONOCHROME2"

    @property
    def layout(self) -> tuple[int, int, int, bool, int, str]:
        """What must be equal in all slices of a series."""
        return self.bits_allocated, self.bits_stored, self.high_bit, self.signed, self.samples, self.photometric


class SliceHeader(NamedTuple):
    """What one image's header says; None where a tag is absent or not a finite number.

    A cohort has 200,000 of them: a named tuple is made ten times as fast as a frozen data class of as many fields.
    """

    path: Path
    modality: str
    image_type: tuple[str, ...]
    sop_class: str
    transfer_syntax: str  # empty if the file has no preamble and so does not say
    study: str
    series: str
    frame_of_reference: str
    patient_id: str
    birth_date: str
    sex: str
    study_date: str
    rows: int
    columns: int
    pixel_spacing: tuple[float, ...] | None  # between rows, between columns, in mm
    position: tuple[float, ...] | None  # LPS mm of the first pixel's centre
    orientation: tuple[float, ...] | None  # direction of a row, direction of a column
    slope: float | None
    intercept: float | None
    acquisition: str
    kernel: str
    description: str
    protocol: str
    thickness: float | None
    burned_in: bool
    contrast: bool
    patient_position: str
    frames: int  # images in the file
    pixels: PixelPlace
    manufacturer: str = ""
    kvp: float | None = None
    frame: int | None = None  # which image of an enhanced multi-frame file
    stack: str = ""  # of an enhanced multi-frame file
    lossy: bool = False  # the pixels have been through a compression that changes them
    instance: str = ""  # SOPInstanceUID of an enhanced multi-frame file; of others it is not kept

    @property
    def has_geometry(self) -> bool:
        """Whether position, orientation and pixel spacing are all there."""
        return None not in (self.position, self.orientation, self.pixel_spacing)


def read_headers(path: Path) -> tuple[SliceHeader, ...]:
    """The headers of a file's images: one, or one for each frame of an enhanced file; none if it is not DICOM.

    Raises VolumeError E_CORRUPT for a DICOM file that cannot be read, E_BOMB for a deflated one that never ends.
    """
    named = path.name.lower().endswith(DICOM_SUFFIXES)
    with path.open("rb") as stream:
        kind = _sniff(stream.read(144), named=named)
        if kind == "other":
            return ()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pydicom's warnings quote header values
                headers = _read(path, stream, kind)
            if headers is not None:
                return headers
            found = "a header that ends early"
        except VolumeError:
            raise
        except Exception as error:  # a damaged header fails in many ways inside pydicom; all mean the same here
            found = type(error).__name__
    if kind == "bare" and not named:
        return ()
    raise VolumeError("E_CORRUPT", where=shown(path), found=found)


def _sniff(head: bytes, *, named: bool) -> str:
    """preamble, bare (a data set without preamble), damaged (by its remains or by its name), or other."""
    if head[128:132] == b"DICM":
        return "preamble"
    if _starts_data_set(head):
        return "bare"
    meta_follows = head[132:136] == b"\x02\x00\x00\x00" and head[136:138] == b"UL"
    nearly = sum(a == b for a, b in zip(head[128:132], b"DICM", strict=False)) >= 3
    return "damaged" if meta_follows or nearly or b"DICM" in head or not any(head) or named else "other"


def _starts_data_set(head: bytes) -> bool:
    """Whether the first bytes are an element of group 2 or 8, little endian, with a known length."""
    if len(head) < 12 or head[:2] not in (b"\x02\x00", b"\x08\x00"):
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    return explicit or struct.unpack_from("<I", head, 4)[0] < 1024


def _read(path: Path, stream: BinaryIO, kind: str) -> tuple[SliceHeader, ...] | None:
    """None for a header that lacks what every image has; nothing for a whole file of another kind, as a directory."""
    if kind == "damaged":
        raise VolumeError("E_CORRUPT", where=shown(path), found="a damaged preamble")
    stream.seek(0)
    if kind == "preamble":
        _refuse_endless(path, stream)
    data = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_TAGS, force=kind == "bare")
    if not (data.get("SOPClassUID") and data.get("Modality")):
        kind_of_file = getattr(data.file_meta, "MediaStorageSOPClassUID", None)
        return () if kind_of_file in _NO_IMAGES else None
    if len(text_of(data, "Modality")) > _CODE_CHARACTERS:
        return None  # a damaged length has made it swallow the elements after it
    header = _header(path, data)
    if header.transfer_syntax != DeflatedExplicitVRLittleEndian:
        at, length = _pixel_value(stream, implicit=bool(data.original_encoding[0]))
        header = header._replace(pixels=header.pixels._replace(at=at, length=length))
    if "PerFrameFunctionalGroupsSequence" not in data:
        return (header,)
    from fourdvq.data.enhanced import frames_of

    return frames_of(header, data)


def _refuse_endless(path: Path, stream: BinaryIO) -> None:
    """A deflated file of a few kB can hold gigabytes, which pydicom would inflate in one go."""
    meta = pydicom.filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        stream.seek(144 + int(meta.FileMetaInformationGroupLength))
        inflater, inflated = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while block := stream.read(1 << 16):
            while block and inflated <= MAX_INFLATED:
                inflated += len(inflater.decompress(block, 1 << 20))
                block = inflater.unconsumed_tail
            if inflated > MAX_INFLATED:
                found = f"more than {MAX_INFLATED >> 20} MB in a deflated file"
                raise VolumeError("E_BOMB", where=shown(path), found=found)
    stream.seek(0)


def _pixel_value(stream: BinaryIO, *, implicit: bool) -> tuple[int, int]:
    """Where the pixel value starts and its length; (0, 0) if the file ends before it."""
    head = stream.read(12)
    if len(head) < 12 or head[:4] != _PIXEL_DATA:
        return 0, 0
    (length,) = struct.unpack_from("<I", head, 4 if implicit else 8)
    at = stream.tell() - (4 if implicit else 0)
    return at, -1 if length == _UNDEFINED else length


def _header(path: Path, data: pydicom.Dataset) -> SliceHeader:
    meta = getattr(data, "file_meta", None)
    syntax = str(getattr(meta, "TransferSyntaxUID", "") or "")
    spacing = numbers_of(data, "PixelSpacing", 2)
    return SliceHeader(
        path=path,
        modality=text_of(data, "Modality"),
        image_type=tuple(str(v) for v in values_of(data, "ImageType")),
        sop_class=text_of(data, "SOPClassUID"),
        transfer_syntax=syntax,
        study=text_of(data, "StudyInstanceUID"),
        series=text_of(data, "SeriesInstanceUID"),
        frame_of_reference=text_of(data, "FrameOfReferenceUID"),
        patient_id=text_of(data, "PatientID"),
        birth_date=text_of(data, "PatientBirthDate"),
        sex=text_of(data, "PatientSex"),
        study_date=text_of(data, "StudyDate"),
        rows=int(data.get("Rows") or 0),
        columns=int(data.get("Columns") or 0),
        pixel_spacing=spacing if spacing and min(spacing) > 0 else None,
        position=numbers_of(data, "ImagePositionPatient", 3),
        orientation=numbers_of(data, "ImageOrientationPatient", 6),
        slope=number_of(data, "RescaleSlope"),
        intercept=number_of(data, "RescaleIntercept"),
        acquisition=text_of(data, "AcquisitionNumber"),
        kernel="/".join(str(v) for v in values_of(data, "ConvolutionKernel")),
        description=text_of(data, "SeriesDescription"),
        protocol=text_of(data, "ProtocolName"),
        thickness=number_of(data, "SliceThickness"),
        burned_in=text_of(data, "BurnedInAnnotation").upper() == "YES",
        contrast=bool(text_of(data, "ContrastBolusAgent")),
        patient_position=text_of(data, "PatientPosition").upper(),
        frames=int(data.get("NumberOfFrames") or 1),
        pixels=_pixel_place(data),
        lossy=text_of(data, "LossyImageCompression") == "01" or syntax in LOSSY_SYNTAXES,
        manufacturer=text_of(data, "Manufacturer"),
        kvp=number_of(data, "KVP"),
    )


def _pixel_place(data: pydicom.Dataset) -> PixelPlace:
    allocated = int(data.get("BitsAllocated") or 0)
    stored = int(data.get("BitsStored") or allocated)
    return PixelPlace(
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=int(data.get("HighBit", stored - 1)),
        signed=int(data.get("PixelRepresentation") or 0) == 1,
        samples=int(data.get("SamplesPerPixel") or 1),
        photometric=text_of(data, "PhotometricInterpretation"),
    )


def text_of(data: pydicom.Dataset, name: str) -> str:
    """A tag as text, empty if absent."""
    value = data.get(name)
    return "" if value is None else str(value).strip()


def values_of(data: pydicom.Dataset, name: str) -> list[Any]:
    """The values of a tag that may hold several."""
    value = data.get(name)
    if value is None or isinstance(value, str):
        return [value] if value else []
    return list(value)


def numbers_of(data: pydicom.Dataset, name: str, count: int) -> tuple[float, ...] | None:
    """Exactly `count` finite numbers, or None."""
    try:
        numbers = tuple(float(v) for v in values_of(data, name))
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(math.isfinite(v) for v in numbers) else None


def number_of(data: pydicom.Dataset, name: str) -> float | None:
    """A finite number, or None."""
    value = data.get(name)
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None
