"""The door for image files: NIfTI, MetaImage and NRRD, each checked by its own bytes before ITK sees it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

from fourdvq.data.image_header import ImageHeader
from fourdvq.data.limits import ARCHIVE_SUFFIXES, IMAGE_SUFFIXES, ReaderLimits, is_image_file, shown
from fourdvq.data.metaimage import check_metaimage
from fourdvq.data.nifti import check_nifti
from fourdvq.data.nrrd import check_nrrd
from fourdvq.errors import VolumeError

CHECKS: dict[str, Callable[[Path, ReaderLimits], ImageHeader]] = {
    ".nii": check_nifti,
    ".gz": check_nifti,
    ".mha": check_metaimage,
    ".mhd": check_metaimage,
    ".nrrd": check_nrrd,
}


def check_image(path: Path, limits: ReaderLimits) -> ImageHeader:
    """What the file announces, borne out by its bytes.

    Raises VolumeError E_FILE, E_ARCHIVE, E_NIFTI (another kind of file, or a header that cannot be used), E_CORRUPT,
    E_BOMB and E_NAN.
    """
    name = path.name.lower()
    if not path.exists():
        raise VolumeError("E_FILE", where=shown(path))
    if name.endswith(ARCHIVE_SUFFIXES):
        raise VolumeError("E_ARCHIVE", where=shown(path), found=path.suffix)
    if not path.is_file() or not is_image_file(path):
        found = f"a name ending {path.suffix!r}"
        raise VolumeError("E_NIFTI", where=shown(path), found=found, wanted=" ".join(IMAGE_SUFFIXES))
    try:
        return CHECKS[path.suffix.lower()](path, limits)
    except (EOFError, OSError, zlib.error) as error:
        found = f"data that end early or cannot be decompressed ({type(error).__name__})"
        raise VolumeError("E_CORRUPT", where=shown(path), found=found) from None
