"""What an NRRD file must satisfy before ITK reads it. Source: the NRRD format definition, teem project.

The data follow the header in the same file, raw or as one gzip stream. A detached header could name any file.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fourdvq.data.image_header import ImageHeader, Inflater, check_announced, check_voxel_bytes
from fourdvq.data.limits import ReaderLimits
from fourdvq.data.text_header import TextHeader

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_BY_NAME = {name: kind for kind, names in _TYPES.items() for name in names}
_SKIPS = ("line skip", "lineskip", "byte skip", "byteskip")


def check_nrrd(path: Path, limits: ReaderLimits) -> ImageHeader:
    """What the header announces, borne out by the data. Raises VolumeError as `image_files.check_image` says."""
    with path.open("rb") as stream:
        text = _read(stream, path)
        header = _announced(text)
        check_announced(header, path, limits)
        encoding = text.fields.get("encoding", "").lower()
        if encoding == "raw":
            check_voxel_bytes(stream, header, path)
        elif encoding in ("gzip", "gz"):
            check_voxel_bytes(Inflater(stream, zlib.MAX_WBITS | 16), header, path)
        else:
            raise text.unusable(f"encoding {encoding!r}", "raw or gzip")
    return header


def _read(stream: BinaryIO, path: Path) -> TextHeader:
    text = TextHeader(path)
    magic = text.line(stream)
    if len(magic) != 8 or not magic.startswith("NRRD000"):
        raise text.broken("no NRRD header")
    while line := text.line(stream):
        if line.startswith("#"):
            continue
        key, sign, value = line.partition(":")
        if not sign:
            raise text.broken("a line without ':'")
        text.add(key, value.removeprefix("="))
    return text


def _announced(text: TextHeader) -> ImageHeader:
    fields = text.fields
    size = text.wholes("sizes")
    if fields.get("dimension") != "3" or len(size) != 3:
        raise text.unusable(f"{len(size)}-D image", "a 3-D image with one value per voxel")
    kind = _BY_NAME.get(fields.get("type", "").lower())
    if kind is None:
        raise text.unusable(f"voxels of type {fields.get('type')}", "numbers")
    if "data file" in fields or "datafile" in fields:
        raise text.unusable("data in another file", "the data in the file itself")
    if any(fields.get(skip, "0") != "0" for skip in _SKIPS):
        raise text.unusable("bytes to be skipped before the data", "data right behind the header")
    for key, count in (("space directions", 9), ("spacings", 3), ("space origin", 3)):
        if len(text.numbers(key)) not in (0, count):
            raise text.broken(f"{key} without {count} numbers")
    if "space directions" not in fields and "spacings" not in fields:
        raise text.unusable("neither space directions nor spacings", "the size of a voxel")
    endian = fields.get("endian", "little").lower()
    if endian not in ("little", "big"):
        raise text.broken(f"endian {endian!r}")
    return ImageHeader((size[0], size[1], size[2]), np.dtype((">" if endian == "big" else "<") + kind))
