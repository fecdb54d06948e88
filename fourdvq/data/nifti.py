"""What a NIfTI file's own bytes must satisfy before ITK reads it, because ITK is silent about three faults.

A file that was cut short gives whatever memory held, values that are not finite become 0 HU, and of two placements that
disagree one is taken.
"""

from __future__ import annotations

import gzip
import io
import itertools
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fourdvq.errors import VolumeError

FORM_TOLERANCE_MM = 0.1  # how far the two placements may differ at a corner of the image
_BLOCK = 1 << 22


def check_nifti(path: Path) -> None:
    """Raise VolumeError E_CORRUPT (no header, or cut short), E_NIFTI (no placement, or two that differ) or E_NAN."""
    header = _NiftiHeader.read(path)
    _check_forms(header, path)
    _check_data(header, path)


def _check_forms(header: _NiftiHeader, path: Path) -> None:
    """A NIfTI file can hold two placements; if both are set they must agree, and one of them must be set."""
    if header.qform_code <= 0 and header.sform_code <= 0:
        raise VolumeError("E_NIFTI", where=str(path), found="no placement (qform and sform codes are 0)")
    if header.qform_code > 0 and header.sform_code > 0:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in header.size], [1], indexing="ij")).reshape(4, -1)
        apart = float(np.abs((header.qform() - header.sform) @ corners).max())
        if not apart <= FORM_TOLERANCE_MM:
            found = f"qform and sform differ by {apart:.2f} mm"
            raise VolumeError("E_NIFTI", where=str(path), found=found, wanted=f"at most {FORM_TOLERANCE_MM} mm")


def _check_data(header: _NiftiHeader, path: Path) -> None:
    found = 0
    try:
        with _open_nifti(path) as stream:
            stream.read(header.data_offset)
            while block := stream.read(_BLOCK):
                found += len(block)
                _check_finite(block, header.float_type, path)
    except (EOFError, OSError, zlib.error):
        raise VolumeError("E_CORRUPT", where=str(path), found="the compressed data end early") from None
    if found < header.data_bytes:
        raise VolumeError("E_CORRUPT", where=str(path), found=f"{found} bytes", wanted=f"{header.data_bytes} bytes")


def _check_finite(block: bytes, float_type: str | None, path: Path) -> None:
    if float_type is None:
        return
    whole = len(block) // np.dtype(float_type).itemsize
    bad = int((~np.isfinite(np.frombuffer(block, float_type, whole))).sum())
    if bad:
        raise VolumeError("E_NAN", where=str(path), found=f"{bad} voxels or more")


def _open_nifti(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


@dataclass(frozen=True)
class _NiftiLayout:
    """(struct format, byte offset) of dim; datatype, bitpix; pixdim; vox_offset; form codes; quaternion with sform."""

    header_bytes: int
    fields: tuple[tuple[str, int], ...]


_NIFTI_FLOATS = {16: "f4", 64: "f8"}  # datatype codes of the standard
_NIFTI_LAYOUTS = (
    _NiftiLayout(348, (("4h", 40), ("2h", 70), ("4f", 76), ("f", 108), ("2h", 252), ("18f", 256))),
    _NiftiLayout(540, (("4q", 16), ("2h", 12), ("4d", 104), ("q", 168), ("2i", 344), ("18d", 352))),
)


@dataclass(frozen=True)
class _NiftiHeader:
    """The placement fields of a NIfTI-1 or NIfTI-2 header. Source: the NIfTI standard, nifti1.h and nifti2.h."""

    size: tuple[int, int, int]
    pixdim: tuple[float, ...]  # qfac, then the three voxel sizes
    data_offset: int
    data_bytes: int
    float_type: str | None  # numpy type of floating point voxels
    qform_code: int
    sform_code: int
    quatern: tuple[float, ...]  # b c d, then the three offsets
    sform: np.ndarray  # (3, 4)

    @classmethod
    def read(cls, path: Path) -> _NiftiHeader:
        try:
            with _open_nifti(path) as stream:
                raw = stream.read(540)
        except (EOFError, OSError, zlib.error):
            raw = b""
        for order, layout in itertools.product("<>", _NIFTI_LAYOUTS):
            if len(raw) < layout.header_bytes or struct.unpack_from(f"{order}i", raw)[0] != layout.header_bytes:
                continue
            dim, (kind, bits), pixdim, (offset,), codes, numbers = (
                struct.unpack_from(order + form, raw, at) for form, at in layout.fields
            )
            size = (int(dim[1]), int(dim[2]), int(dim[3]))
            data_bytes = size[0] * size[1] * size[2] * int(bits) // 8
            float_type = order + _NIFTI_FLOATS[kind] if kind in _NIFTI_FLOATS else None
            quatern, sform = numbers[:6], np.array(numbers[6:]).reshape(3, 4)
            return cls(size, pixdim, int(offset), data_bytes, float_type, codes[0], codes[1], quatern, sform)
        raise VolumeError("E_CORRUPT", where=str(path), found="no NIfTI header")

    def qform(self) -> np.ndarray:
        """The (3, 4) matrix from voxel index to RAS mm that the quaternion stands for."""
        b, c, d = self.quatern[:3]
        a = np.sqrt(max(0.0, 1.0 - b * b - c * c - d * d))
        rotation = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        qfac = -1.0 if self.pixdim[0] < 0 else 1.0
        scale = np.array([self.pixdim[1], self.pixdim[2], qfac * self.pixdim[3]])
        return np.column_stack([rotation * scale, self.quatern[3:]])
