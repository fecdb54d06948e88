"""A CT volume or mask in patient space, and the image files (NIfTI, MHA, NRRD) it is read from and written to.

Arrays are (D, H, W) = (z, y, x). Patient space is LPS: x to the patient's left, y to the back, z to the head, in mm.
Whatever the file's own order, a volume out of `read_volume` is turned to LPS and holds true Hounsfield units.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from fourdvq.data.files import write_with
from fourdvq.data.image_files import check_image
from fourdvq.data.image_header import ImageHeader
from fourdvq.data.limits import HU_MAX, HU_MIN, IMAGE_SUFFIXES, ReaderLimits, is_image_file, shown
from fourdvq.errors import VolumeError

__all__ = [
    "HU_MAX",
    "HU_MIN",
    "IMAGE_SUFFIXES",
    "Volume",
    "VolumeLimits",
    "from_image",
    "is_image_file",
    "read_mask",
    "read_volume",
    "require_same_grid",
    "to_image",
    "write_nifti",
]

IDENTITY_DIRECTION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
# ITK prints its warnings past Python, with the path of the file: a folder's name may be a patient's. What matters in
# them is refused here by a check of our own.
sitk.ProcessObject.SetGlobalWarningDisplay(False)
_NUMERIC = {sitk.sitkInt16, sitk.sitkInt32, sitk.sitkInt64, sitk.sitkFloat32, sitk.sitkFloat64}


@dataclass(frozen=True)
class VolumeLimits:
    """What an image file must satisfy to be read as CT."""

    air_below_hu: float = -900.0  # some voxel must be below it, or the file is not in Hounsfield units
    min_grey_values: int = 257  # 256 or fewer means an 8-bit export


@dataclass(frozen=True)
class Volume:
    """HU int16 or a mask (bool or uint8), shape (D, H, W), with its place in patient space.

    `spacing` is (z, y, x) in mm; `origin` is the (x, y, z) of the first voxel's centre, LPS in mm; `direction` is the
    row-major 3x3 matrix whose columns are the directions of the x, y and z index axes.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = IDENTITY_DIRECTION

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing)) / 1000.0


def read_volume(path: Path, *, limits: VolumeLimits | None = None, readers: ReaderLimits | None = None) -> Volume:
    """Read a CT volume from NIfTI, MHA or NRRD: HU int16 clamped to [-1024, 3071], oriented to LPS.

    `readers` are the site's limits on sizes. Raises VolumeError: E_FILE, E_ARCHIVE,
    E_CORRUPT (unreadable, cut short, or too long), E_BOMB (too many voxels announced, or more bytes than announced),
    E_NIFTI (4-D, 8-bit, windowed, rescaled, no geometry or two that disagree), E_GEOMETRY (impossible spacing), E_NAN.
    """
    limits = limits or VolumeLimits()
    image, header = _read_image(path, readers or ReaderLimits(), allowed=_NUMERIC)
    values = sitk.GetArrayViewFromImage(image)
    _check_hounsfield(values, header, path, limits)
    hu = np.clip(np.rint(values), HU_MIN, HU_MAX).astype(np.int16)
    return from_image(sitk.DICOMOrient(_like(hu, image), "LPS"))


def read_mask(path: Path, *, readers: ReaderLimits | None = None) -> Volume:
    """Read a mask file (any non-zero voxel is inside) as uint8 0/1, oriented to LPS.

    Raises VolumeError as `read_volume` does for an unreadable file, and E_MASK for an empty mask.
    """
    image, _ = _read_image(path, readers or ReaderLimits(), allowed=None)
    inside = (sitk.GetArrayViewFromImage(image) != 0).astype(np.uint8)
    if not inside.any():
        raise VolumeError("E_MASK", where=shown(path), found="no voxel inside")
    return from_image(sitk.DICOMOrient(_like(inside, image), "LPS"))


def require_same_grid(mask: Volume, volume: Volume, *, where: str) -> None:
    """Raise VolumeError E_MASK unless the mask has the scan's shape and place (corners within a tenth of a voxel)."""
    if mask.hu.shape != volume.hu.shape:
        found = f"mask {'x'.join(map(str, mask.hu.shape))}, scan {'x'.join(map(str, volume.hu.shape))} voxels (z,y,x)"
        raise VolumeError("E_MASK", where=where, found=found)
    apart = float(np.abs(_corners(mask) - _corners(volume)).max())
    if apart > 0.1 * min(volume.spacing):
        raise VolumeError("E_MASK", where=where, found=f"mask and scan lie {apart:.2f} mm apart")


def to_image(volume: Volume) -> sitk.Image:
    """The volume as a SimpleITK image (bool becomes uint8), with its geometry."""
    array = volume.hu.astype(np.uint8) if volume.hu.dtype == bool else volume.hu
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetSpacing([float(s) for s in reversed(volume.spacing)])
    image.SetOrigin([float(o) for o in volume.origin])
    image.SetDirection([float(d) for d in volume.direction])
    return image


def from_image(image: sitk.Image) -> Volume:
    """A 3-D SimpleITK image as a Volume; the array is a copy."""
    x, y, z = image.GetSpacing()
    ox, oy, oz = image.GetOrigin()
    return Volume(sitk.GetArrayFromImage(image), (z, y, x), (ox, oy, oz), tuple(image.GetDirection()))


def write_nifti(volume: Volume, path: Path, *, description: str = "") -> None:
    """Write NIfTI (.nii or .nii.gz by the name) atomically; the header's free text is `description`, else blank."""
    image = to_image(volume)
    if description:
        image.SetMetaData("ITK_FileNotes", description)  # becomes the header's descrip: 79 characters
    write_with(path, lambda temporary: sitk.WriteImage(image, str(temporary), useCompression=path.suffix == ".gz"))


def _read_image(path: Path, limits: ReaderLimits, *, allowed: set[int] | None) -> tuple[sitk.Image, ImageHeader]:
    """ITK's image of a file whose own bytes have been checked first: ITK is silent about too much."""
    header = check_image(path, limits)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _check_information(reader, header, path, limits, allowed)
        return reader.Execute(), header
    except RuntimeError as error:
        code = "E_NIFTI" if "rthonormal" in str(error) else "E_CORRUPT"
        raise VolumeError(code, where=shown(path), found=_last_line(error)) from None


def _check_information(
    reader: sitk.ImageFileReader, header: ImageHeader, path: Path, limits: ReaderLimits, allowed: set[int] | None
) -> None:
    size = reader.GetSize()
    if tuple(size) != header.size or reader.GetNumberOfComponents() != 1:
        found = (
            f"{len(size)}-D image of {'x'.join(map(str, size))} voxels, {reader.GetNumberOfComponents()} values each"
        )
        raise VolumeError("E_NIFTI", where=shown(path), found=found, wanted="a 3-D image with one value per voxel")
    limits.check_spacing(reader.GetSpacing(), shown(path))
    if allowed is not None and reader.GetPixelID() not in allowed:
        found = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        wanted = "16 or 32 bit integers, or floating point"
        raise VolumeError("E_NIFTI", where=shown(path), found=found, wanted=wanted)


def _check_hounsfield(values: np.ndarray, header: ImageHeader, path: Path, limits: VolumeLimits) -> None:
    where = shown(path)
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise VolumeError("E_NAN", where=where, found=f"{int((~np.isfinite(values)).sum())} voxels")
    low = float(values.min())
    if not header.has_plain_scale(low):
        found = f"a scale of {header.slope:g} and an offset of {header.intercept:g}"
        raise VolumeError("E_NIFTI", where=where, found=found, wanted="Hounsfield units as they are stored")
    if low >= limits.air_below_hu:
        wanted = f"air below {limits.air_below_hu:g} HU"
        raise VolumeError("E_NIFTI", where=where, found=f"smallest value {low:g}", wanted=wanted)
    grey_values = np.unique(values[:: max(1, len(values) // 32)]).size
    if grey_values < limits.min_grey_values:
        wanted = f"at least {limits.min_grey_values} grey values"
        raise VolumeError("E_NIFTI", where=where, found=f"{grey_values} grey values", wanted=wanted)


def _corners(volume: Volume) -> np.ndarray:
    """(2, 3) LPS positions of the first and last voxel centre."""
    extent = np.array([(n - 1) * s for n, s in zip(reversed(volume.hu.shape), reversed(volume.spacing), strict=True)])
    first = np.array(volume.origin)
    return np.stack([first, first + np.array(volume.direction).reshape(3, 3) @ extent])


def _like(array: np.ndarray, image: sitk.Image) -> sitk.Image:
    result = sitk.GetImageFromArray(array)
    result.CopyInformation(image)
    return result


def _last_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else "unreadable"
