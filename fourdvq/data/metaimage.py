"""What a MetaImage (.mha, .mhd) must satisfy before ITK reads it. Source: the MetaIO documentation of ITK.

The data lie in the file itself, or in one plain file beside it: a header that names a path, a pattern or a list could
make us read any file of this machine.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fourdvq.data.image_header import ImageHeader, Inflater, check_announced, check_voxel_bytes
from fourdvq.data.limits import ReaderLimits
from fourdvq.data.text_header import TextHeader
from fourdvq.errors import VolumeError

_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
_PLAIN_NAME = re.compile(r"[\w][\w .()-]*\.z?raw", re.IGNORECASE)
_TRUE = "true"


def check_metaimage(path: Path, limits: ReaderLimits) -> ImageHeader:
    """What the header announces, borne out by the data. Raises VolumeError as `image_files.check_image` says."""
    with path.open("rb") as stream:
        text = _read(stream, path)
        header = _announced(text)
        check_announced(header, path, limits)
        named = text.fields["elementdatafile"]
        if named == "LOCAL":
            _check_data(stream, text, header, path)
            return header
    plain = path.suffix.lower() == ".mhd" and _PLAIN_NAME.fullmatch(named) is not None
    if not plain or path.with_name(named).is_symlink():
        raise text.unusable("data in another file", "the data in the file itself, or in one .raw file beside an .mhd")
    beside = path.with_name(named)
    if not beside.is_file():
        raise text.broken("no file with the data beside it")
    with beside.open("rb") as stream:
        _check_data(stream, text, header, path)
    return header


def files_of(path: Path) -> tuple[Path, ...]:
    """The header file, and the one file beside it that an .mhd may name, if it can be told."""
    try:
        with path.open("rb") as stream:
            named = _read(stream, path).fields["elementdatafile"]
    except (OSError, VolumeError):
        return (path,)
    beside = path.with_name(named) if _PLAIN_NAME.fullmatch(named) else path
    return (path, beside) if beside != path and beside.is_file() else (path,)


def _read(stream: BinaryIO, path: Path) -> TextHeader:
    text = TextHeader(path)
    while "elementdatafile" not in text.fields:
        key, sign, value = text.line(stream).partition("=")
        if not sign:
            raise text.broken("a line without '='")
        text.add(key, value)
    return text


def _announced(text: TextHeader) -> ImageHeader:
    fields = text.fields
    size = text.wholes("dimsize")
    if fields.get("ndims") != "3" or len(size) != 3 or fields.get("elementnumberofchannels", "1") != "1":
        raise text.unusable(f"{len(size)}-D image", "a 3-D image with one value per voxel")
    if fields.get("elementtype") not in _TYPES:
        raise text.unusable(f"voxels of type {fields.get('elementtype')}", "numbers")
    if fields.get("binarydata", "True").lower() != _TRUE or "headersize" in fields:
        raise text.unusable("data as text, or behind a second header", "binary data right behind the header")
    for key, count in (("elementspacing", 3), ("elementsize", 3), ("offset", 3), ("position", 3), ("origin", 3)):
        if len(text.numbers(key)) not in (0, count):
            raise text.broken(f"{key} without {count} numbers")
    for key in ("transformmatrix", "rotation", "orientation"):
        if len(text.numbers(key)) not in (0, 9):
            raise text.broken(f"{key} without 9 numbers")
    if not (text.numbers("elementspacing") or text.numbers("elementsize")):
        raise text.unusable("no ElementSpacing", "the size of a voxel")
    big = _TRUE in (fields.get("binarydatabyteordermsb", "").lower(), fields.get("elementbyteordermsb", "").lower())
    voxel = np.dtype((">" if big else "<") + _TYPES[fields["elementtype"]])
    return ImageHeader((size[0], size[1], size[2]), voxel)


def _check_data(stream: BinaryIO, text: TextHeader, header: ImageHeader, path: Path) -> None:
    if text.fields.get("compresseddata", "False").lower() != _TRUE:
        check_voxel_bytes(stream, header, path)
        return
    check_voxel_bytes(Inflater(stream, zlib.MAX_WBITS), header, path)
