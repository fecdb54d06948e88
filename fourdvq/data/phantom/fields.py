"""Scalar fields over a grid: smooth noise, soft edges, and tubes laid down by the volume they fill.

Everything is a function of millimetres and only then of voxels, so grids of any size sample the same anatomy. What is
thinner than a voxel fades by the share of the voxel that it fills; nothing aliases.
Points are (N, 3) in the order (x, y, z), in mm; arrays are (D, H, W) = (z, y, x), float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline

Array = NDArray[np.float32]

_GOLDEN_ANGLE = np.pi * (3.0 - np.sqrt(5.0))


@dataclass(frozen=True)
class Grid:
    """A field of view in mm, cut into `size` (D, H, W) voxels; `low` is the corner (x, y, z), `extent` its lengths."""

    size: tuple[int, int, int]
    low: tuple[float, float, float]
    extent: tuple[float, float, float]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size (z, y, x) in mm."""
        d, h, w = self.size
        return self.extent[2] / d, self.extent[1] / h, self.extent[0] / w

    @property
    def origin(self) -> tuple[float, float, float]:
        """Centre of the first voxel, (x, y, z) in mm."""
        dz, dy, dx = self.spacing
        return self.low[0] + dx / 2, self.low[1] + dy / 2, self.low[2] + dz / 2

    def axes(self) -> tuple[Array, Array, Array]:
        """Voxel centres along z, y, x in mm, shaped to broadcast over (D, H, W)."""
        (dz, dy, dx), (x0, y0, z0), (d, h, w) = self.spacing, self.origin, self.size
        z, y, x = (o + s * np.arange(n, dtype=np.float32) for o, s, n in ((z0, dz, d), (y0, dy, h), (x0, dx, w)))
        return (
            z.astype(np.float32)[:, None, None],
            y.astype(np.float32)[None, :, None],
            x.astype(np.float32)[None, None, :],
        )

    def resized(self, size: tuple[int, int, int]) -> Grid:
        """The same field of view in another number of voxels."""
        return Grid(size, self.low, self.extent)


def smoothstep(value: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, smooth between; a decreasing step if low > high."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    step: Array = t * t * (3.0 - 2.0 * t)
    return step


def smooth_min(a: Array, b: Array, width: float) -> Array:
    """min(a, b) with the corner rounded over `width`."""
    h = np.maximum(np.float32(width) - np.abs(a - b), 0.0)
    rounded: Array = np.minimum(a, b) - h * h * np.float32(0.25 / width)
    return rounded


def smooth_max(a: Array, b: Array, width: float) -> Array:
    """max(a, b) with the corner filled over `width`."""
    return -smooth_min(-a, -b, width)


def mix(under: Array, over: Array | float, share: Array) -> Array:
    """`over` where `share` is 1, `under` where it is 0, in proportion between."""
    mixed: Array = under + (np.float32(over) - under) * share
    return mixed


def soft_step(field: Array, edge: float) -> Array:
    """0 well below zero, 1 well above, linear across `edge` (in the field's unit) around it."""
    step: Array = np.clip(field / np.float32(edge) + np.float32(0.5), 0.0, 1.0)
    return step


def soft_inside(field: Array, reach: float) -> Array:
    """Share of each voxel in which `field` is positive, taking the field as linear across the voxel.

    The field's own slope gives the width of the edge, also where voxels are anisotropic. `reach` is a few voxels in the
    field's unit: farther from the surface than that the slope is not looked at, so the field may be rough there.
    """
    field = np.clip(field, -reach, reach)
    slope = np.full(field.shape, 1e-6, np.float32)
    for axis in range(3):
        step = np.gradient(field, axis=axis)
        slope += step * step
    return np.clip(field / np.sqrt(slope) + np.float32(0.5), 0.0, 1.0)


@lru_cache(maxsize=64)
def _cubic_rows(n_out: int, n_nodes: int) -> Array:
    """(n_out, n_nodes) weights of the interpolating cubic spline through nodes that span the field of view."""
    at = (np.arange(n_out) + 0.5) / n_out * (n_nodes - 1)
    return np.ascontiguousarray(make_interp_spline(np.arange(n_nodes), np.eye(n_nodes), k=3)(at), dtype=np.float32)


def upsample(nodes: NDArray[np.floating], size: tuple[int, int, int]) -> Array:
    """A field (D, H, W) through nodes (d, h, w) whose corners are the corners of the field of view; d, h, w >= 4."""
    rows_z, rows_y, rows_x = (_cubic_rows(n, m) for n, m in zip(size, nodes.shape, strict=True))
    partial = np.matmul(rows_y, np.asarray(nodes, np.float32) @ rows_x.T)
    return np.tensordot(rows_z, partial, axes=1)


def smooth_noise(rng: np.random.Generator, grid: Grid, scale_mm: float) -> Array:
    """Gaussian noise, mean 0, SD about 1, that varies over `scale_mm`; the same field for every size of the grid."""
    nodes = tuple(max(4, round(length / scale_mm) + 1) for length in reversed(grid.extent))
    field = upsample(rng.standard_normal(nodes), grid.size)
    # Between its nodes the spline has about 0.8 of the nodes' SD per axis.
    return field * np.float32(1.0 / 0.66)


def sample_nodes(nodes: NDArray[np.floating], grid: Grid, points: NDArray[np.floating]) -> NDArray[np.float64]:
    """The node field at points (N, 3); linear between nodes of a four times denser field, clamped at the border."""
    from scipy.ndimage import map_coordinates

    dense = upsample(nodes, (32, 32, 32))
    relative = [(points[:, i] - grid.low[i]) / grid.extent[i] * 32 - 0.5 for i in (2, 1, 0)]
    values: NDArray[np.float64] = map_coordinates(dense, relative, order=1, mode="nearest").astype(np.float64)
    return values


def lay_down(grid: Grid, points: NDArray[np.floating], volume: NDArray[np.floating]) -> Array:
    """Share of each voxel filled by `points` (N, 3) that stand for `volume` (N,) mm^3 each; clipped to 1.

    A point is shared linearly among its eight voxels, so volume is kept whatever the voxel size.
    """
    d, h, w = grid.size
    voxel = float(np.prod(grid.spacing))
    base = np.empty((3, len(points)), np.int64)
    part = np.empty((3, len(points)), np.float32)
    for axis, (component, step) in enumerate(zip((2, 1, 0), grid.spacing, strict=True)):
        at = (points[:, component] - grid.origin[component]) / step
        base[axis] = np.floor(at)
        part[axis] = at - base[axis]
    keep = np.all((base >= 0) & (base < np.array([[d - 1], [h - 1], [w - 1]])), axis=0)
    (z, y, x), (fz, fy, fx) = base[:, keep], part[:, keep]
    share = (volume[keep] / voxel).astype(np.float32)
    first = (z * h + y) * w + x
    corners = [(cz, cy, cx) for cz in (0, 1) for cy in (0, 1) for cx in (0, 1)]
    at_corner = np.concatenate([first + (cz * h + cy) * w + cx for cz, cy, cx in corners])
    weight = np.concatenate(
        [share * (fz if cz else 1 - fz) * (fy if cy else 1 - fy) * (fx if cx else 1 - fx) for cz, cy, cx in corners]
    )
    filled = np.bincount(at_corner, weight, minlength=d * h * w).astype(np.float32)
    return np.minimum(filled, 1.0).reshape(grid.size)


def disc_points(
    centres: NDArray[np.floating],
    axis_1: NDArray[np.floating],
    axis_2: NDArray[np.floating],
    lengths: NDArray[np.floating],
    step: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fill discs (ellipses with half axes `axis_1`, `axis_2`, each (N, 3)) around `centres` with points.

    Each disc stands for a piece of tube of `lengths` (N,) mm. Returns points (M, 3) and the volume of each in mm^3.
    """
    area = np.pi * np.linalg.norm(axis_1, axis=1) * np.linalg.norm(axis_2, axis=1)
    count = np.maximum(1, np.ceil(area / step**2)).astype(np.int64)
    owner = np.repeat(np.arange(len(centres)), count)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    radius = np.where(count[owner] == 1, 0.0, np.sqrt((rank + 0.5) / count[owner]))
    angle = rank * _GOLDEN_ANGLE + owner * 1.9
    points = (
        centres[owner]
        + (radius * np.cos(angle))[:, None] * axis_1[owner]
        + (radius * np.sin(angle))[:, None] * axis_2[owner]
    )
    return points, (area * lengths / count)[owner]


def tube_points(
    path: NDArray[np.floating], radius: NDArray[np.floating] | float, step: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fill a round tube along the polyline `path` (N, 3) with points; radius (N,) or one number, in mm."""
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    count = max(2, int(np.ceil(length[-1] / step)))
    at = (np.arange(count) + 0.5) * length[-1] / count
    centres = np.stack([np.interp(at, length, path[:, i]) for i in range(3)], axis=1)
    radii = np.interp(at, length, np.broadcast_to(radius, len(path)))
    normal, binormal = frames(np.gradient(centres, axis=0))
    return disc_points(
        centres, normal * radii[:, None], binormal * radii[:, None], np.full(count, length[-1] / count), step
    )


def frames(tangent: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two unit vectors (N, 3) that stand on each tangent and on each other."""
    unit = tangent / np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9)
    # The helper axis is the one that the tangent leans to least, so the cross product cannot vanish.
    helper = np.eye(3)[np.argmin(np.abs(unit), axis=1)]
    normal = np.cross(unit, helper)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return normal, np.cross(unit, normal)
