"""What the header of an image file announces, in whatever format, and whether the bytes behind it bear it out.

ITK gives whatever memory held for a file that was cut short, turns values that are not finite into 0 HU, and inflates
what a header of a hundred bytes promises. So the voxel bytes are counted here first, in blocks, and never beyond what
the header announces.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from fourdvq.data.limits import ReaderLimits, shown
from fourdvq.errors import VolumeError

INTERCEPTS = (-1000.0, -1024.0, -8192.0)  # of files that keep a scanner's unsigned values
_BLOCK = 1 << 22


class Readable(Protocol):
    """A file, or what inflates one."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class ImageHeader:
    """A 3-D image as its header announces it: size (x, y, z), numpy type of a voxel, scale to HU."""

    size: tuple[int, int, int]
    voxel: np.dtype
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def voxels(self) -> int:
        """How many voxels are announced."""
        return math.prod(self.size)

    @property
    def data_bytes(self) -> int:
        """How many bytes they take."""
        return self.voxels * self.voxel.itemsize

    def has_plain_scale(self, smallest: float) -> bool:
        """Whether the stored values are HU, or a scanner's unsigned values with a usual offset.

        A scale in a file has nothing to be checked against: any other one may be a damaged byte. `smallest` is the
        smallest value after scaling.
        """
        if self.slope != 1.0:
            return False
        return self.intercept == 0.0 or (self.intercept in INTERCEPTS and smallest >= self.intercept)


class Inflater:
    """Reads a zlib or gzip stream piece by piece, never more than was asked for."""

    def __init__(self, stream: BinaryIO, wbits: int) -> None:
        self._stream = stream
        self._inflater = zlib.decompressobj(wbits)
        self._waiting = b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; empty at the end. Raises EOFError if the stream was cut short."""
        found = b""
        while not found and not self._inflater.eof:
            if not self._waiting:
                self._waiting = self._stream.read(1 << 16)
            if not self._waiting:
                raise EOFError
            found = self._inflater.decompress(self._waiting, size)
            self._waiting = self._inflater.unconsumed_tail
        return found


def check_announced(header: ImageHeader, path: Path, limits: ReaderLimits) -> None:
    """Raise VolumeError E_NIFTI for a flat image and E_BOMB for one that is too large to decode."""
    if min(header.size) < 2:
        found = f"an image of {'x'.join(map(str, header.size))} (x,y,z) voxels"
        raise VolumeError("E_NIFTI", where=shown(path), found=found, wanted="a 3-D image with one value per voxel")
    limits.check_size(header.voxels, header.voxel.itemsize, shown(path))


def check_voxel_bytes(stream: Readable, header: ImageHeader, path: Path) -> None:
    """Read the voxels in blocks and forget them.

    Raises VolumeError E_CORRUPT if there are fewer than announced, E_BOMB if more follow, E_NAN for values that are not
    finite. A decoder's own errors come through.
    """
    found, wanted = 0, header.data_bytes
    while block := stream.read(min(_BLOCK, wanted + 1 - found)):
        found += len(block)
        if found > wanted:
            raise VolumeError("E_BOMB", where=shown(path), found="more voxels than the header announces")
        _check_finite(block, header.voxel, path)
    if found < wanted:
        raise VolumeError("E_CORRUPT", where=shown(path), found=f"{found} bytes", wanted=f"{wanted} bytes")


def _check_finite(block: bytes, voxel: np.dtype, path: Path) -> None:
    if voxel.kind != "f":
        return
    whole = len(block) // voxel.itemsize
    bad = int((~np.isfinite(np.frombuffer(block, voxel, whole))).sum())
    if bad:
        raise VolumeError("E_NAN", where=shown(path), found=f"{bad} voxels or more")
