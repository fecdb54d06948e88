"""How large a file may be and what its name may end in: decided from headers, before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fourdvq.errors import VolumeError

HU_MIN, HU_MAX = -1024, 3071  # the range of 12-bit CT; reconstruction padding (-2000, -3024) is clamped to air
IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")


@dataclass(frozen=True)
class ReaderLimits:
    """What a header may announce; a site states its own numbers under `limits:` of its policy."""

    max_voxels: int = 1 << 29  # 1 GiB of int16: more is a damaged or hostile header
    spacing_mm: tuple[float, float] = (0.05, 50.0)
    decode_memory_mb: int = 8192

    def check_size(self, voxels: int, bytes_a_voxel: int, where: str) -> None:
        """Raise VolumeError E_BOMB for more voxels, or more memory, than may be decoded."""
        if voxels > self.max_voxels:
            raise VolumeError("E_BOMB", where=where, found=f"{voxels} voxels", wanted=f"at most {self.max_voxels}")
        megabytes = voxels * bytes_a_voxel / (1 << 20)
        if megabytes > self.decode_memory_mb:
            wanted = f"at most {self.decode_memory_mb} MB"
            raise VolumeError("E_BOMB", where=where, found=f"{megabytes:.0f} MB of voxels", wanted=wanted)

    def check_spacing(self, spacing: tuple[float, ...], where: str) -> None:
        """Raise VolumeError E_GEOMETRY for a voxel size (mm, any order) that no scanner makes."""
        low, high = self.spacing_mm
        if not all(low <= s <= high for s in spacing):
            found = f"voxels of {' x '.join(f'{s:g}' for s in spacing)} mm"
            raise VolumeError("E_GEOMETRY", where=where, found=found, wanted=f"{low:g} to {high:g} mm on each axis")


def is_image_file(path: Path) -> bool:
    """Whether the name ends like a volume file that `read_volume` accepts."""
    return path.name.lower().endswith(IMAGE_SUFFIXES)


def shown(path: Path | str) -> str:
    """A path as text that can be printed and stored: bytes that are no UTF-8 become escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")
