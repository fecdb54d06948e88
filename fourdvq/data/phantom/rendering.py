"""A patient as a scan: through the motion of a visit, onto its grid, with or without the scanner's own marks.

`scan` is what a site would export. `render` and `severity` are the truth at any time, also where nobody scanned: in the
breath and table position of the first CT, without noise, so that a generated future can be compared voxel by voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, map_coordinates

from fourdvq.data.phantom.anatomy import Anatomy, build_anatomy
from fourdvq.data.phantom.fields import Array, Grid, upsample
from fourdvq.data.phantom.motion import backward_nodes, displacement_nodes, motion_of
from fourdvq.data.phantom.patients import PhantomPatient, PhantomVisit, extent_at
from fourdvq.data.phantom.sites import SiteStyle, site_style
from fourdvq.data.volume import Volume

_FIELD_OF_VIEW_MM = (340.0, 292.0)  # in the slice (square) and along the body, of an average adult
_LOWEST_SHARE = -0.545  # so much of it lies below the carina's level, z = 0
_REFERENCE_VOXEL_MM3 = 1.33 * 1.33 * 3.0
_KERNEL_BLUR_MM = {"soft": 0.45, "standard": 0.0, "sharp": 0.0}
_SHARPEN = {"soft": 0.0, "standard": 0.0, "sharp": 0.7}


@dataclass(frozen=True)
class PhantomScan:
    """One scan with its truth, all on the scan's own grid (D, H, W).

    `lung` is bool, `severity` float32 in [0, 1]; `displacement` holds the nodes (3, d, h, w) of the true displacement
    (x, y, z, mm) of this scan against the first CT, see `motion`.
    """

    volume: Volume
    lung: NDArray[np.bool_]
    severity: Array
    displacement: NDArray[np.float64]


def grid_of(patient: PhantomPatient) -> Grid:
    """The patient's field of view, the same at all visits; its length in mm varies a little between patients."""
    rng = np.random.default_rng(patient.stream(3000))
    wide, high = (length * float(rng.uniform(0.98, 1.03)) for length in _FIELD_OF_VIEW_MM)
    return Grid(patient.size, (-wide / 2, -wide / 2, _LOWEST_SHARE * high), (wide, wide, high))


@lru_cache(maxsize=2)
def anatomy_of(patient: PhantomPatient) -> Anatomy:
    """The patient's chest; building it costs more than a scan, so the last two are kept."""
    return build_anatomy(grid_of(patient), patient.stream(4000), female=patient.sex == "F")


def render(patient: PhantomPatient, years: float) -> Volume:
    """The true scan at `years` since the first CT: HU int16, no noise, breath and table position of the first CT.

    Loss of volume is left out too: a voxel of the result is the same piece of tissue as in the first CT.
    """
    anatomy, grid, first = anatomy_of(patient), grid_of(patient), patient.visits[0]
    hu = _moved(anatomy.hu(extent_at(patient, years)), _places(patient, first, grid), -1000.0)
    style = site_style(patient.site)
    return _volume(grid, _sharpness(hu, style, first, grid) + np.float32(style.offset_hu))


def severity(patient: PhantomPatient, years: float) -> Array:
    """True severity (D, H, W) in [0, 1] at `years`, in the breath of the first CT on its grid; 0 outside the lung."""
    places = _places(patient, patient.visits[0], grid_of(patient))
    return _truth(anatomy_of(patient), extent_at(patient, years), places)[1]


def lung_mask(patient: PhantomPatient) -> NDArray[np.bool_]:
    """True lung of the first CT (D, H, W); trachea and main bronchi are not lung."""
    return _moved(anatomy_of(patient).lung_share(), _places(patient, patient.visits[0], grid_of(patient)), 0.0) > 0.5


def scan(patient: PhantomPatient, visit: PhantomVisit) -> PhantomScan:
    """The scan of a visit as the site's scanner makes it, with its truth."""
    anatomy, grid, style = anatomy_of(patient), grid_of(patient), site_style(patient.site)
    places = _places(patient, visit, grid)
    hu = _moved(anatomy.hu(visit.extent), places, -1000.0)
    lung, ill = _truth(anatomy, visit.extent, places)
    hu = np.maximum(hu, _table(grid))
    hu = _sharpness(hu + _noise(patient, visit, style, grid), style, visit, grid)
    first, this = motion_of(patient, patient.visits[0], grid), motion_of(patient, visit, grid)
    return PhantomScan(
        volume=_volume(grid, hu + np.float32(style.offset_hu)),
        lung=lung,
        severity=ill,
        displacement=displacement_nodes(first, this, grid),
    )


def displacement_field(nodes: NDArray[np.floating], size: Sequence[int]) -> Array:
    """The displacement (3, D, H, W), components x, y, z in mm, through its nodes."""
    d, h, w = size
    return np.stack([upsample(component, (d, h, w)) for component in nodes])


def _places(patient: PhantomPatient, visit: PhantomVisit, grid: Grid) -> Array:
    """Where each voxel of the scan comes from: reference voxel coordinates (3, D, H, W), z first."""
    moved = displacement_field(backward_nodes(motion_of(patient, visit, grid), grid), grid.size)
    places = np.empty_like(moved)
    for axis, (component, step) in enumerate(zip((2, 1, 0), grid.spacing, strict=True)):
        shape = [1, 1, 1]
        shape[axis] = grid.size[axis]
        places[axis] = moved[component] / np.float32(step) + np.arange(grid.size[axis], dtype=np.float32).reshape(shape)
    return places


def _moved(field: Array, places: Array, outside: float) -> Array:
    """`field` looked up at `places`, linearly; beyond the top and bottom the last slice goes on, sideways is air."""
    result: Array = map_coordinates(field, places, output=np.float32, order=1, mode="nearest", prefilter=False)
    for axis in (1, 2):
        beyond = (places[axis] < -0.5) | (places[axis] > field.shape[axis] - 0.5)
        result[beyond] = outside
    return result


def _truth(anatomy: Anatomy, extent: float, places: Array) -> tuple[NDArray[np.bool_], Array]:
    """Lung mask and severity at `places`; at the edge of the lung, severity is that of the voxel's part in the lung."""
    share = _moved(anatomy.lung_share(), places, 0.0)
    lung = share > 0.5
    return lung, np.where(lung, _moved(anatomy.severity(extent), places, 0.0) / np.maximum(share, 0.5), np.float32(0.0))


def _table(grid: Grid) -> Array:
    """The scanner's table, (1, H, W) HU: a thin curved shell with a light core, -1000 elsewhere."""
    _, y, x = grid.axes()
    dy = max(1.6, 0.7 * grid.spacing[1])
    top = 129.0 - np.square(x) / 520.0
    shell = np.exp(-np.square((y - top) / np.float32(dy))) + 0.8 * np.exp(-np.square((y - top - 22.0) / np.float32(dy)))
    core = ((y > top) & (y < top + 22.0)).astype(np.float32)
    return np.float32(-1000.0) + (np.float32(480.0 * min(1.0, 1.8 / dy)) * shell + 45.0 * core) * (np.abs(x) < 150.0)


def _noise(patient: PhantomPatient, visit: PhantomVisit, style: SiteStyle, grid: Grid) -> Array:
    """White noise that has the visit's SD after the kernel; larger voxels average over more of it."""
    index = int(visit.scan_id.removeprefix("CT"))
    rng = np.random.default_rng(patient.stream(5000, index))
    spread = visit.noise_hu * (_REFERENCE_VOXEL_MM3 / float(np.prod(grid.spacing))) ** 0.25
    # What the kernel will take away of white noise, or add to it.
    sigma = _blur_voxels(style, visit, grid)
    kept = 1.0 if sigma < 0.3 else 1.0 / (2.0 * np.sqrt(np.pi) * sigma)
    noise = rng.standard_normal(grid.size, dtype=np.float32)
    return noise * np.float32(spread / min(1.0, kept) ** 0.5)


def _blur_voxels(style: SiteStyle, visit: PhantomVisit, grid: Grid) -> float:
    return float(np.hypot(style.blur_mm, _KERNEL_BLUR_MM[visit.kernel]) / grid.spacing[2])


def _sharpness(hu: Array, style: SiteStyle, visit: PhantomVisit, grid: Grid) -> Array:
    """The reconstruction kernel in the slice, and the slice thickness across it."""
    sigma = _blur_voxels(style, visit, grid)
    if sigma >= 0.3:
        hu = gaussian_filter1d(gaussian_filter1d(hu, sigma, axis=2, truncate=3.0), sigma, axis=1, truncate=3.0)
    gain = _SHARPEN[visit.kernel]
    wide = 1.4 / grid.spacing[2]
    if gain > 0.0 and wide >= 0.4:
        smooth = gaussian_filter1d(gaussian_filter1d(hu, wide, axis=2, truncate=3.0), wide, axis=1, truncate=3.0)
        hu = hu + np.float32(gain) * (hu - smooth)
    extra = np.sqrt(max(visit.thickness_mm**2 - grid.spacing[0] ** 2, 0.0)) / 2.355 / grid.spacing[0]
    return gaussian_filter1d(hu, extra, axis=0, truncate=3.0) if extra >= 0.25 else hu


def _volume(grid: Grid, hu: Array) -> Volume:
    return Volume(hu=np.clip(np.rint(hu), -1024, 3071).astype(np.int16), spacing=grid.spacing, origin=grid.origin)
