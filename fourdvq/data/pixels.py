"""Pixels of a sorted stack as Hounsfield units, each slice with its own scale.

Uncompressed pixels are taken from the file as they lie, after their place and length have been checked. Compressed ones
are decoded by SimpleITK (run lengths by pydicom), one image at a time, after the size in the code stream has been
compared with the header's: a JPEG header that announces more than the DICOM header would be decoded in full.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from fourdvq.data.dicom_file import SliceHeader
from fourdvq.data.limits import HU_MAX, HU_MIN, shown
from fourdvq.errors import VolumeError

AS_THEY_LIE = frozenset({"", ImplicitVRLittleEndian, ExplicitVRLittleEndian})
_WHOLE_FILE = frozenset({DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian})
_ITEM = b"\xfe\xff\x00\xe0"


def stack_hu(slices: Sequence[SliceHeader]) -> np.ndarray:
    """HU int16 (len(slices), rows, columns), clamped to [-1024, 3071]. Raises VolumeError E_CORRUPT or E_BOMB."""
    result = np.empty((len(slices), slices[0].rows, slices[0].columns), dtype=np.int16)
    for where, (s, raw) in enumerate(_raw_images(slices)):
        result[where] = to_hu(raw, s)
    return result


def slice_hu(s: SliceHeader) -> np.ndarray:
    """HU int16 (rows, columns) of one image."""
    result: np.ndarray = stack_hu([s])[0]
    return result


def to_hu(raw: np.ndarray, s: SliceHeader, scale: tuple[float, float] | None = None) -> np.ndarray:
    """Stored values as clamped HU, with the slice's own slope and intercept or with `scale` (slope, intercept)."""
    slope, intercept = scale or (s.slope if s.slope is not None else 1.0, s.intercept or 0.0)
    whole = float(slope).is_integer() and float(intercept).is_integer() and raw.dtype.kind in "iu"
    if whole and max(abs(slope), abs(intercept)) < 2**15:
        values = raw.astype(np.int32 if slope == 1 else np.int64)
        if slope != 1:
            np.multiply(values, int(slope), out=values)
        np.add(values, int(intercept), out=values)
        return np.clip(values, HU_MIN, HU_MAX, out=values).astype(np.int16)
    return np.clip(np.rint(raw * float(slope) + float(intercept)), HU_MIN, HU_MAX).astype(np.int16)


def raw_image(s: SliceHeader) -> np.ndarray:
    """Stored values (rows, columns) of an uncompressed image. Raises VolumeError E_CORRUPT."""
    with s.path.open("rb") as stream:
        return _as_it_lies(stream, s)


def stored_bytes(s: SliceHeader) -> bytes:
    """The pixels of an image as they are stored, compressed or not; of a deflated file, all of it."""
    with s.path.open("rb") as stream:
        if s.pixels.length < 0 or s.pixels.at == 0:
            stream.seek(s.pixels.at)
            return stream.read()
        size = s.pixels.length // max(1, s.frames)
        stream.seek(s.pixels.at + (s.frame or 0) * size)
        return stream.read(size)


def is_compressed(s: SliceHeader) -> bool:
    """Whether reading the image needs a decoder."""
    return s.transfer_syntax not in AS_THEY_LIE


def needs_foreign_decoder(s: SliceHeader) -> bool:
    """Whether that decoder is no Python, so that a damaged image may take the process down with it."""
    return is_compressed(s) and s.transfer_syntax not in (*_WHOLE_FILE, RLELossless)


def _raw_images(slices: Sequence[SliceHeader]) -> Iterator[tuple[SliceHeader, np.ndarray]]:
    """Each slice with its stored values; slices of one file next to each other share one opening of it."""
    frames: dict[Path, list[bytes]] = {}
    for s in slices:
        if not is_compressed(s):
            yield s, raw_image(s)
        elif s.transfer_syntax in _WHOLE_FILE:
            yield s, _whole_file(s)
        else:
            if s.path not in frames:
                frames = {s.path: _code_streams(s)}
            yield s, _decoded(frames[s.path][s.frame or 0], s)


def _as_it_lies(stream: BinaryIO, s: SliceHeader) -> np.ndarray:
    place = s.pixels
    kind = {(8, False): "u1", (8, True): "i1", (16, False): "<u2", (16, True): "<i2", (32, False): "<u4"}.get(
        (place.bits_allocated, place.signed), "<i4"
    )
    size = s.rows * s.columns * np.dtype(kind).itemsize
    whole = size * s.frames
    # Padded to an even length; some writers add a word to what is even already.
    if place.at == 0 or place.length not in (whole, whole + whole % 2, whole + 2):
        raise _corrupt(s, f"{max(place.length, 0)} bytes of pixels", f"{whole} bytes")
    stream.seek(place.at + (s.frame or 0) * size)
    data = stream.read(size)
    if len(data) < size:
        raise _corrupt(s, f"{len(data)} bytes of pixels", f"{size} bytes")
    return _clean(np.frombuffer(data, kind).reshape(s.rows, s.columns), s)


def _clean(values: np.ndarray, s: SliceHeader) -> np.ndarray:
    """Without the bits above the stored ones, which some scanners use for overlays."""
    spare = s.pixels.bits_allocated - s.pixels.bits_stored
    if spare == 0:
        return values
    # Shifting up and back drops the spare bits and spreads the sign.
    return np.asarray(np.left_shift(values, spare) >> spare)


def _code_streams(s: SliceHeader) -> list[bytes]:
    """The compressed images of a file, in the order of its frames."""
    if s.pixels.length >= 0:
        raise _corrupt(s, "compressed pixels that are not in fragments")
    with s.path.open("rb") as stream:
        stream.seek(s.pixels.at)
        data = stream.read()
    if data[:4] != _ITEM:
        raise _corrupt(s, "no fragment where the pixels start")
    try:
        frames = list(generate_frames(data, number_of_frames=s.frames))
    except Exception as error:  # pydicom names its reasons by many types; the file is damaged in all of them
        raise _corrupt(s, f"fragments that cannot be read ({type(error).__name__})") from None
    if len(frames) != s.frames or min(map(len, frames)) < 2:
        raise _corrupt(s, f"{sum(len(f) > 1 for f in frames)} of {s.frames} images")
    return frames


def _decoded(code: bytes, s: SliceHeader) -> np.ndarray:
    """One compressed image, through a file that holds nothing else: no scale, no name, no identifier."""
    announced = announced_size(code)
    if announced is not None and announced != (s.rows, s.columns):
        found = f"a code stream of {announced[0]} x {announced[1]} pixels"
        code_word = "E_BOMB" if announced[0] * announced[1] > s.rows * s.columns else "E_CORRUPT"
        raise VolumeError(code_word, where=shown(s.path), found=found, wanted=f"{s.rows} x {s.columns} pixels")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = s.transfer_syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Modality, data.Rows, data.Columns = "CT", s.rows, s.columns
    data.SamplesPerPixel, data.PhotometricInterpretation = s.pixels.samples, s.pixels.photometric
    data.BitsAllocated, data.BitsStored, data.HighBit, signed, *_ = s.pixels.layout
    data.PixelRepresentation = int(signed)
    data.PixelData = encapsulate([code])
    if s.transfer_syntax == RLELossless:
        # Six times as fast as GDCM, which reads it byte by byte, and without leaving Python.
        return _with_pydicom(data, s)
    with tempfile.TemporaryDirectory(prefix="fourdvq-") as folder:
        path = Path(folder) / "image.dcm"
        data.save_as(path, enforce_file_format=True)
        return _read_with_itk(path, s)


def announced_size(code: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 code stream announces; None for what has no such header.

    Source: ITU-T T.81 (frame header), T.87 (JPEG-LS) and T.800 (SIZ marker).
    """
    if code[:4] == b"\xff\x4f\xff\x51" and len(code) >= 24:
        right, bottom, left, top = struct.unpack_from(">4I", code, 8)
        return bottom - top, right - left
    if code[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(code) and code[at] == 0xFF:
        marker, length = code[at + 1], struct.unpack_from(">H", code, at + 2)[0]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = struct.unpack_from(">2H", code, at + 5)
            return rows, columns
        at += 1 if marker == 0xFF else 2 + length
    return 0, 0


def _whole_file(s: SliceHeader) -> np.ndarray:
    """A deflated or big-endian file of one image, read by pydicom: rare, small, and checked for its size before."""
    if s.frames != 1:
        raise VolumeError("E_SYNTAX", where=shown(s.path), found=f"{s.frames} images in {s.transfer_syntax}")
    return _with_pydicom(s.path, s)


def _with_pydicom(source: Path | pydicom.Dataset, s: SliceHeader) -> np.ndarray:
    """One image that pydicom reads with numpy alone."""
    try:
        data = pydicom.dcmread(source) if isinstance(source, Path) else source
        values = np.asarray(data.pixel_array)
    except Exception as error:  # as in a header, damage shows in many ways
        raise _corrupt(s, f"pixels that cannot be read ({type(error).__name__})") from None
    return _clean(_shaped(values, s), s)


def _read_with_itk(path: Path, s: SliceHeader) -> np.ndarray:
    import SimpleITK as sitk

    try:
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError:
        raise _corrupt(s, "pixels that cannot be decoded") from None
    return _shaped(values, s)


def _shaped(values: np.ndarray, s: SliceHeader) -> np.ndarray:
    if values.size != s.rows * s.columns:
        raise _corrupt(s, f"{values.size} pixels", f"{s.rows * s.columns} pixels")
    return values.reshape(s.rows, s.columns)


def _corrupt(s: SliceHeader, found: str, wanted: str = "") -> VolumeError:
    return VolumeError("E_CORRUPT", where=shown(s.path), found=found, wanted=wanted)
