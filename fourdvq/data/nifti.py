"""What a NIfTI file's own bytes must satisfy before ITK reads it.

Of two placements that disagree ITK takes one, of a damaged unit it makes metres, and a scale it applies whatever it is.
Source: the NIfTI standard, nifti1.h and nifti2.h.
"""

from __future__ import annotations

import gzip
import itertools
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from fourdvq.data.image_header import ImageHeader, check_announced, check_voxel_bytes
from fourdvq.data.limits import ReaderLimits, shown
from fourdvq.errors import VolumeError

FORM_TOLERANCE_MM = 0.1  # how far the two placements may differ at a corner of the image
MAX_DATA_OFFSET = 1 << 20  # bytes: before the voxels lie notes at most, and what is skipped is inflated all the same


def check_nifti(path: Path, limits: ReaderLimits) -> ImageHeader:
    """What the header announces, borne out by the data.

    Raises VolumeError E_CORRUPT (no header, or cut short), E_NIFTI (not 3-D, no placement, or two that differ), E_BOMB
    and E_NAN.
    """
    header = _NiftiHeader.read(path)
    check_announced(header.image, path, limits)
    _check_forms(header, path)
    with _open_nifti(path) as stream:
        stream.read(header.data_offset)
        check_voxel_bytes(stream, header.image, path)
    return header.image


def _check_forms(header: _NiftiHeader, path: Path) -> None:
    """A NIfTI file says twice where its voxels lie, by qform and sform or by sform and voxel sizes: both must agree."""
    if header.qform_code <= 0 and header.sform_code <= 0:
        raise VolumeError("E_NIFTI", where=shown(path), found="no placement (qform and sform codes are 0)")
    # Beside an sform alone its own directions with the header's voxel sizes: that is what ITK takes.
    name, other = ("qform", header.qform()) if header.qform_code > 0 else ("voxel sizes", header.resized_sform())
    sform = header.sform if header.sform_code > 0 else other
    if not (np.isfinite(other).all() and np.isfinite(sform).all()):
        raise VolumeError("E_NIFTI", where=shown(path), found="a placement that is not made of numbers")
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in header.image.size], [1], indexing="ij")).reshape(4, -1)
    apart = float(np.abs((other - sform) @ corners).max())
    if not apart <= FORM_TOLERANCE_MM:
        found = f"{name} and sform differ by {apart:.2f} mm"
        raise VolumeError("E_NIFTI", where=shown(path), found=found, wanted=f"at most {FORM_TOLERANCE_MM} mm")


def _open_nifti(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


@dataclass(frozen=True)
class _NiftiLayout:
    """(struct format, byte offset) of each field that is read; the magic text and the unit byte beside them."""

    header_bytes: int
    magic: tuple[bytes, int]
    units: tuple[str, int]
    fields: tuple[tuple[str, int], ...]  # dim; datatype, bitpix; pixdim; vox_offset; scale; codes; quaternion, sform


_MM_OR_UNKNOWN = (0, 2)
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_LAYOUTS = (
    _NiftiLayout(
        348,
        (b"n+1\0", 344),
        ("b", 123),
        (("8h", 40), ("2h", 70), ("4f", 76), ("f", 108), ("2f", 112), ("2h", 252), ("18f", 256)),
    ),
    _NiftiLayout(
        540,
        (b"n+2\0\r\n\x1a\n", 4),
        ("i", 500),
        (("8q", 16), ("2h", 12), ("4d", 104), ("q", 168), ("2d", 176), ("2i", 344), ("18d", 352)),
    ),
)


@dataclass(frozen=True)
class _NiftiHeader:
    """The fields of a NIfTI-1 or NIfTI-2 header that say what and where the voxels are."""

    image: ImageHeader
    pixdim: tuple[float, ...]  # qfac, then the three voxel sizes
    data_offset: int
    qform_code: int
    sform_code: int
    quatern: tuple[float, ...]  # b c d, then the three offsets
    sform: np.ndarray  # (3, 4)

    @classmethod
    def read(cls, path: Path) -> _NiftiHeader:
        try:
            with _open_nifti(path) as stream:
                raw = stream.read(544)
        except (EOFError, OSError, zlib.error):
            raw = b""
        for order, layout in itertools.product("<>", _LAYOUTS):
            if len(raw) >= layout.header_bytes and struct.unpack_from(f"{order}i", raw)[0] == layout.header_bytes:
                return cls._typed(raw, order, layout, path)
        raise VolumeError("E_CORRUPT", where=shown(path), found="no NIfTI header")

    @classmethod
    def _typed(cls, raw: bytes, order: str, layout: _NiftiLayout, path: Path) -> _NiftiHeader:
        dim, (kind, bits), pixdim, (offset,), scale, codes, numbers = (
            struct.unpack_from(order + form, raw, at) for form, at in layout.fields
        )
        magic, at = layout.magic
        voxel = np.dtype(order + _TYPES[kind]) if kind in _TYPES else None
        (units,) = struct.unpack_from(order + layout.units[0], raw, layout.units[1])
        faults = {
            f"{dim[0]}-D image": dim[0] != 3 or min(dim[1:4]) < 1,
            "data in another file": raw[at : at + len(magic)] != magic,
            f"voxels of type {kind} with {bits} bits": voxel is None or voxel.itemsize * 8 != bits,
            "lengths that are not in mm": (units & 7) not in _MM_OR_UNKNOWN,
            f"voxels from byte {offset:g} on": not (
                layout.header_bytes + 4 <= offset <= MAX_DATA_OFFSET and offset == int(offset)
            ),
        }
        for found, fails in faults.items():
            if fails:
                wanted = "a 3-D image with one value per voxel, in one file, in mm"
                raise VolumeError("E_NIFTI", where=shown(path), found=found, wanted=wanted)
        # The standard's 0 (and what is no number) means that the values are as they are.
        slope, intercept = scale if scale[0] != 0 and math.isfinite(scale[0]) else (1.0, 0.0)
        image = ImageHeader(
            (int(dim[1]), int(dim[2]), int(dim[3])),
            np.dtype(order + _TYPES[kind]),
            float(slope),
            float(intercept) if math.isfinite(intercept) else 0.0,
        )
        quatern, sform = numbers[:6], np.array(numbers[6:]).reshape(3, 4)
        return cls(image, pixdim, int(offset), codes[0], codes[1], quatern, sform)

    def resized_sform(self) -> np.ndarray:
        """The sform with the voxel sizes in place of the lengths of its columns; not finite if one of these is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = self.sform[:, :3] / np.linalg.norm(self.sform[:, :3], axis=0)
        return np.column_stack([unit * np.abs(self.pixdim[1:4]), self.sform[:, 3]])

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
