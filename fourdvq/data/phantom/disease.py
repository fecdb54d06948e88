"""Fibrosis that starts under the pleura at the bases and grows: where it comes first, and what it looks like.

Every lung voxel has a rank in [0, 1], the share of the lung that falls ill before it. A patient whose extent is E has
severity s = S((E - rank) / width + 1/2): it rises with E, so with time, and its mean over the lung is E (to 0.02).
Severity drives ground glass at the advancing border, then a net of thickened septa, then honeycomb cysts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourdvq.data.phantom.fields import Array, Grid, mix, smooth_noise, smoothstep

BORDER = 0.16  # width of the advancing border, in ranks

_CELL_MM = 6.5  # mean size of the cells between septa
_SEPTUM_MM = 0.8
_CYST_WALL_MM = 1.2
_WALL_PER_CELL = 2.9  # wall area per volume of a foam of random cells, times the size of a cell


@dataclass(frozen=True)
class DiseaseMap:
    """Per lung voxel (N,): rank of falling ill; ground-glass pattern, mean 1; septa and cyst walls as shares of the
    voxel; and how much of the tissue there turns into cysts in the end."""

    rank: Array
    glass: Array
    septa: Array
    walls: Array
    honeycomb: Array


def severity_of(extent: float, rank: Array) -> Array:
    """Severity in [0, 1] of voxels with this rank when the share `extent` of the lung is ill."""
    return smoothstep(np.float32(extent) - rank, -BORDER / 2, BORDER / 2)


def map_disease(
    rng: np.random.Generator,
    grid: Grid,
    index: NDArray[np.intp],
    *,
    share: Array,
    depth_mm: Array,
    height: Array,
    back: Array,
) -> DiseaseMap:
    """Draw one patient's pattern for the voxels `index` of the flattened grid.

    Lists over those voxels: `share` is how much of the voxel is lung, `depth_mm` the distance to the chest wall or the
    diaphragm, `height` 0 at the base and 1 at the apex, `back` 0 in front and 1 behind.
    """
    patches = smooth_noise(rng, grid, 34.0).ravel()[index]
    fine = smooth_noise(rng, grid, 13.0).ravel()[index]
    lateral = float(rng.normal(0.0, 0.25))
    depth_mm = np.maximum(depth_mm, 0.0)
    order = 0.07 * depth_mm + 1.9 * height - 0.9 * back + 0.34 * patches + 0.16 * fine
    x = grid.axes()[2].ravel()[index % grid.size[2]]
    order = order + np.float32(lateral) * np.sign(x)
    glass = np.clip(1.0 + 0.45 * smooth_noise(rng, grid, 9.0).ravel()[index], 0.1, 2.2)
    septa, walls = _network(rng, grid, index)
    septa *= np.clip(0.75 + 0.5 * smooth_noise(rng, grid, 11.0).ravel()[index], 0.15, 1.6)
    honeycomb = smoothstep(depth_mm + 5.0 * patches, 18.0, 8.0) * smoothstep(height, 0.7, 0.35)
    return DiseaseMap(_rank(order, share > 0.5), glass, septa, walls, honeycomb)


def diseased_hu(healthy: Array, disease: DiseaseMap, extent: float) -> Array:
    """HU (N,) of lung tissue, without vessels and airways, when the share `extent` of the lung is ill."""
    s = severity_of(extent, disease.rank)
    border = 4.0 * s * (1.0 - s)
    glass = (130.0 * s + 130.0 * border) * disease.glass
    hu = healthy + glass + 520.0 * smoothstep(s, 0.1, 0.75) * disease.septa
    cysts = np.float32(-930.0) + 760.0 * disease.walls
    share = disease.honeycomb * smoothstep(np.float32(extent) - disease.rank, 0.02, 0.30)
    return np.minimum(mix(hu, cysts, share), np.float32(60.0))


def _rank(order: Array, in_lung: NDArray[np.bool_]) -> Array:
    """Monotone map of `order` to its distribution function over the lung: the share of lung voxels below."""
    levels = np.linspace(0.0, 1.0, 1025)
    return np.interp(order, np.quantile(order[in_lung], levels), levels).astype(np.float32)


def _network(rng: np.random.Generator, grid: Grid, index: NDArray[np.intp]) -> tuple[Array, Array]:
    """Shares of each voxel filled by thin septa and by the thicker walls of cysts, of one network of random cells.

    The septa are where the two nearest of many random points are equally far. In voxels larger than a septum it is
    spread out with its volume kept, so the net fades into a mean density instead of aliasing.
    """
    from scipy.spatial import cKDTree

    low, extent = np.array(grid.low), np.array(grid.extent)
    seeds = low + rng.random((int(np.prod(extent) / _CELL_MM**3), 3)) * extent
    z, y, x = np.unravel_index(index, grid.size)
    points = np.stack([o + s * v for o, s, v in zip(grid.origin, grid.spacing[::-1], (x, y, z), strict=True)], axis=1)
    near, _ = cKDTree(seeds).query(points, k=2, eps=0.1)
    middle = ((near[:, 1] - near[:, 0]) / 2).astype(np.float32)
    blur = 0.55 * float(np.prod(grid.spacing)) ** (1 / 3)
    return _wall_share(middle, _SEPTUM_MM, blur), _wall_share(middle, _CYST_WALL_MM, blur)


def _wall_share(middle: Array, thickness: float, blur: float) -> Array:
    """Share of a voxel that is wall, from its distance to the middle of the nearest wall; `blur`: half a voxel."""
    share = np.exp(-np.square(middle / np.float32(max(0.6 * thickness, blur))))
    wanted = 0.9 * _WALL_PER_CELL * thickness / _CELL_MM
    filled: Array = np.minimum(share * np.float32(wanted / float(share.mean())), 1.0)
    return filled
