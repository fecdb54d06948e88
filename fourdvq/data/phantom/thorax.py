"""The shapes of a chest: cavity, diaphragm, mediastinum, lungs and skin, as smooth fields that are positive inside.

Shapes are written in canonical mm of one adult (x to the left, y to the back, z up; the carina is near z = 45) and a
patient is that adult scaled, bent and made irregular. Distances are approximate: good to a few mm near the surface.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourdvq.data.phantom.fields import Array, Grid, sample_nodes, smooth_max, smooth_min, smoothstep, upsample

LUNG_TOP = 116.0  # canonical z of the apex
SPINE_Y = 64.0  # canonical y of the middle of the vertebral bodies
_FLOOR = -170.0
_TABLE_STEP = 0.25


@dataclass(frozen=True)
class Build:
    """A patient's own proportions."""

    scale: tuple[float, float, float]  # x, y, z, about 1
    kyphosis: float  # bend of the spine, mm per (100 mm)^2
    fat_mm: float  # thickness of the fat under the skin
    heart: float  # size of the heart, about 1
    dome_mm: float  # height of the diaphragm, 0 is average
    nodes: NDArray[np.float32]  # (3, 6, 6, 6) irregularity x, y, z in mm


@dataclass(frozen=True)
class Shapes:
    """Fields (in mm, positive inside) at some points; `wall_mm` is the distance to the chest wall, from inside."""

    lung: Array
    cavity: Array
    heart: Array
    mediastinum: Array
    diaphragm: Array
    skin: Array


def draw_build(rng: np.random.Generator, *, female: bool) -> Build:
    """Proportions of one patient; women are a little smaller."""
    size = 0.95 if female else 1.0
    return Build(
        scale=tuple(float(size * np.clip(rng.normal(1.0, s), 0.92, 1.07)) for s in (0.035, 0.03, 0.03)),  # type: ignore[arg-type]
        kyphosis=float(rng.uniform(5.0, 11.0)),
        fat_mm=float(rng.uniform(6.0, 15.0)),
        heart=float(np.clip(rng.normal(1.0, 0.05), 0.9, 1.1)),
        dome_mm=float(rng.uniform(-6.0, 8.0)),
        nodes=(rng.standard_normal((3, 6, 6, 6)) * np.array([2.2, 2.2, 3.0])[:, None, None, None]).astype(np.float32),
    )


def to_canonical(build: Build, grid: Grid) -> tuple[Array, Array, Array]:
    """Canonical coordinates x, y, z of every voxel, each (D, H, W)."""
    z, y, x = grid.axes()
    x, y, z = (
        axis / np.float32(s) + upsample(nodes, grid.size)
        for axis, s, nodes in zip((x, y, z), build.scale, build.nodes, strict=True)
    )
    return x, y + _bend(build, z), z


def to_world(build: Build, grid: Grid, points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Canonical points (N, 3) placed in the patient; the inverse of `to_canonical` to a fraction of a mm."""
    straight = np.asarray(points, np.float64).copy()
    straight[:, 1] -= _bend(build, straight[:, 2])
    world = straight * build.scale
    for _ in range(2):
        moved = np.stack([sample_nodes(nodes, grid, world) for nodes in build.nodes], axis=1)
        world = (straight - moved) * build.scale
    return world


def _bend(build: Build, z: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(build.kyphosis * 1e-4 * (z + 10.0) ** 2, dtype=z.dtype)


def cavity_profile(z: NDArray[np.floating]) -> tuple[Array, Array, Array]:
    """Half width, half depth and middle y of the inner chest wall at height z."""
    u = np.clip((LUNG_TOP - z) / 240.0, 0.0, 1.0)
    half_width = 131.0 * (1 - (1 - u) ** 3.5) ** 0.38
    half_depth = 90.0 * (1 - (1 - u) ** 2.7) ** 0.41
    middle = 12.0 * (1 - u) ** 1.5 - 2.0
    return (
        np.maximum(half_width, 2.0).astype(np.float32),
        np.maximum(half_depth, 2.0).astype(np.float32),
        middle.astype(np.float32),
    )


def _skin_profile(z: NDArray[np.floating]) -> tuple[Array, Array, Array]:
    shoulder = smoothstep(np.asarray(z, np.float32), 20.0, 120.0)
    neck = smoothstep(np.asarray(z, np.float32), 70.0, 150.0)
    waist = smoothstep(np.asarray(z, np.float32), -60.0, -170.0)
    return 154.0 + 15.0 * shoulder - 5.0 * waist, 112.0 - 30.0 * neck - 2.0 * waist, 1.0 + 15.0 * neck


def _oval(x: Array, y: Array, half_x: Array | float, half_y: Array | float, square: float = 0.0) -> Array:
    """0 in the middle, 1 on the outline; `square` in [0, 1) fills the corners."""
    p = np.square(x / half_x)
    q = np.square(y / half_y)
    # Far outside the product would win over the sum; there the corners do not matter.
    radius: Array = np.sqrt(p + q - np.float32(square) * np.minimum(p, 2.0) * np.minimum(q, 2.0))
    return radius


def ball(x: Array, y: Array, z: Array, middle: tuple[float, float, float], half: tuple[float, float, float]) -> Array:
    """Approximate distance to an ellipsoid, positive inside."""
    r = np.sqrt(
        np.square((x - middle[0]) / half[0])
        + np.square((y - middle[1]) / half[1])
        + np.square((z - middle[2]) / half[2])
    )
    distance: Array = (1.0 - r) * np.float32(min(half))
    return distance


def shapes_at(build: Build, x: Array, y: Array, z: Array) -> Shapes:
    """All fields at canonical points; x, y, z of one shape."""
    table = np.arange(_FLOOR, 200.0, _TABLE_STEP, dtype=np.float32)
    row = np.clip((z - _FLOOR) * (1 / _TABLE_STEP), 0, len(table) - 1).astype(np.int32)
    half_x, half_y, middle = (values[row] for values in cavity_profile(table))
    # Above the apex the section shrinks to nothing; a steep field keeps it outside there.
    cavity = (1.0 - _oval(x, y - middle, half_x, half_y, 0.22)) * np.maximum(half_y, 30.0)
    cavity -= 3.0 * np.maximum(z - np.float32(LUNG_TOP - 2.0), 0.0)
    skin_x, skin_y, skin_middle = (values[row] for values in _skin_profile(table))
    grown = np.float32(build.fat_mm - 9.0)
    skin = (1.0 - _oval(x, y - skin_middle, skin_x + grown, skin_y + grown, 0.34)) * skin_y
    diaphragm = (z - dome_height(build, x, y)) * np.float32(0.8)
    heart = heart_field(build, x, y, z)
    mediastinum = _mediastinum(x, y, z, heart)
    lung = smooth_min(smooth_min(cavity - 2.0, diaphragm, 3.0), -mediastinum, 7.0)
    return Shapes(lung, cavity, heart, mediastinum, diaphragm, skin)


def dome_height(build: Build, x: Array, y: Array) -> Array:
    """Canonical z of the diaphragm: two domes, the right one higher, falling steeply to the back and the sides."""
    back = np.maximum(y + 22.0, 0.0) / 88.0
    front = np.minimum(y + 22.0, 0.0) / 130.0
    depth = np.square(back) * np.sqrt(back + 0.05) + np.square(front)
    right = -50.0 - 54.0 * (depth + np.square((x + 60.0) / 96.0))
    left = -62.0 - 48.0 * (depth + np.square((x - 62.0) / 92.0))
    height = right + (left - right) * smoothstep(x, -18.0, 22.0) + np.float32(build.dome_mm)
    # The recess behind the domes ends at the last ribs.
    return smooth_max(height, np.full_like(height, -126.0), 24.0)


def heart_field(build: Build, x: Array, y: Array, z: Array) -> Array:
    """Ventricles and atria as three overlapping ellipsoids, the apex to the left, front and below."""
    s = build.heart
    turned_x = 0.86 * (x - 27.0) - 0.40 * (y + 28.0) - 0.34 * (z + 42.0)
    turned_y = 0.42 * (x - 27.0) + 0.90 * (y + 28.0)
    turned_z = 0.32 * (x - 27.0) + 0.95 * (z + 42.0)
    ventricles = ball(turned_x, turned_y, turned_z, (0, 0, 0), (64 * s, 41 * s, 43 * s))
    right_atrium = ball(x, y, z, (-22.0, -18.0, -24.0), (30 * s, 34 * s, 40 * s))
    left_atrium = ball(x, y, z, (3.0, 14.0, -8.0), (36 * s, 24 * s, 28 * s))
    return smooth_max(smooth_max(ventricles, right_atrium, 12.0), left_atrium, 12.0)


def _mediastinum(x: Array, y: Array, z: Array, heart: Array) -> Array:
    """What keeps the lungs apart: spine, great vessels with their fat, and the heart."""
    spine = (1.0 - _oval(x, y - np.float32(SPINE_Y + 8.0), 25.0, 30.0)) * 25.0
    upper = smoothstep(z, -30.0, 30.0)
    high = smoothstep(z, 60.0, 112.0)
    great = (1.0 - _oval(x - 1.0, y - 2.0, 31.0 + 2.0 * upper - 4.0 * high, 42.0 - 6.0 * high)) * 30.0 - 20.0 * (
        1 - upper
    )
    junction = (1.0 - _oval(x - 2.0, y + 58.0, 12.0 + 10.0 * (1 - upper), 40.0)) * 12.0
    aorta = (1.0 - _oval(x - 22.0, y - 44.0, 17.0, 17.0)) * 17.0 - 12.0 * high
    gullet = (1.0 - _oval(x - 3.0, y - 30.0, 16.0, 26.0)) * 16.0
    union = smooth_max(heart + 3.0, spine, 10.0)
    for part, width in ((great, 12.0), (junction, 8.0), (aorta, 6.0), (gullet, 10.0)):
        union = smooth_max(union, part, width)
    return union
