"""Bones: ribs with their cartilage, shoulder blades, collar bones, breast bone and spine.

Curved bones are points that stand for volume (`fields.lay_down`); the spine is a field in its own narrow box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourdvq.data.phantom.fields import Array, Grid, disc_points, lay_down, smoothstep, tube_points
from fourdvq.data.phantom.thorax import SPINE_Y, cavity_profile

CORTEX_HU, MARROW_HU, CARTILAGE_HU = 720.0, 190.0, 110.0
_SPINE_PERIOD = 23.0
_Points = tuple[NDArray[np.float64], NDArray[np.float64]]
ToWorld = Callable[[NDArray[np.floating]], NDArray[np.float64]]


@dataclass(frozen=True)
class Skeleton:
    """Share of each voxel (D, H, W): bone (cortex and marrow together), marrow, cartilage."""

    bone: Array
    marrow: Array
    cartilage: Array


def build_skeleton(grid: Grid, to_world: ToWorld) -> Skeleton:
    """Ribs, shoulder blades, collar bones and breast bone of one patient; the spine is painted by `spine_hu`."""
    step = max(0.7 * min(grid.spacing), 0.9)
    ribs = [_rib(number, side, step, to_world) for number in range(1, 13) for side in (-1.0, 1.0)]
    outer = [bone for bone, _, _ in ribs] + _flat_bones(step, to_world, shrink=0.0)
    inner = [marrow for _, marrow, _ in ribs] + _flat_bones(step, to_world, shrink=2.2)
    soft = [cartilage for _, _, cartilage in ribs]
    return Skeleton(*(_joined(grid, pieces) for pieces in (outer, inner, soft)))


def _joined(grid: Grid, pieces: list[_Points]) -> Array:
    points, volume = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return lay_down(grid, points, volume)


def _rib(number: int, side: float, step: float, to_world: ToWorld) -> tuple[_Points, _Points, _Points]:
    """One rib as (bone, marrow, cartilage): leaves the spine, runs around the chest wall and downwards to the front."""
    last = {1: 150, 2: 155, 10: 135, 11: 95, 12: 62}.get(number, 160)
    angle = np.deg2rad(np.linspace(14.0, last, 120))
    drop = np.interp(number, [1, 2, 5, 9, 12], [28.0, 42.0, 62.0, 58.0, 34.0])
    z = 122.0 - 21.5 * (number - 1) - drop * (1 - np.cos(angle)) / 2 * 1.15
    half_x, half_y, middle = cavity_profile(np.minimum(z, 104.0))
    # Ribs lie on the outline of the cavity, a little outside it.
    corner = 1.0 / np.sqrt(np.maximum(1.0 - 0.22 * np.sin(angle) ** 2 * np.cos(angle) ** 2, 0.1))
    gap = 5.5
    x = side * (half_x * corner + gap) * np.sin(angle)
    y = middle + (half_y * corner + gap) * np.cos(angle)
    path = to_world(np.stack([x, y, z], axis=1))
    outward = np.stack([side * np.sin(angle), np.cos(angle), np.zeros_like(angle)], axis=1)
    end_of_bone = int(np.searchsorted(np.rad2deg(angle), 122.0)) if last > 122 else len(angle)
    bone = _flat_tube(path[:end_of_bone], outward[:end_of_bone], 3.3, 6.2, step)
    marrow = _flat_tube(path[:end_of_bone], outward[:end_of_bone], 1.9, 4.6, step)
    if end_of_bone < len(angle):
        cartilage = _flat_tube(path[end_of_bone:], outward[end_of_bone:], 3.6, 6.5, step)
    else:
        cartilage = (np.empty((0, 3)), np.empty(0))
    return bone, marrow, cartilage


def _flat_tube(
    path: NDArray[np.floating], outward: NDArray[np.floating], thick: float, high: float, step: float
) -> _Points:
    """A tube with an elliptic section: half axis `thick` along `outward`, `high` across it and the path."""
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    count = max(2, int(np.ceil(length[-1] / step)))
    at = (np.arange(count) + 0.5) * length[-1] / count
    centres, normals = (np.stack([np.interp(at, length, v[:, i]) for i in range(3)], axis=1) for v in (path, outward))
    across = np.cross(np.gradient(centres, axis=0), normals)
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    return disc_points(centres, normals * thick, across * high, np.full(count, length[-1] / count), step)


def _flat_bones(step: float, to_world: ToWorld, *, shrink: float) -> list[_Points]:
    """Shoulder blades, collar bones and breast bone; `shrink` mm off every half thickness gives their marrow."""
    pieces = [_breast_bone(shrink, step, to_world)]
    for side in (-1.0, 1.0):
        pieces.append(_shoulder_blade(side, max(2.6 - shrink, 0.5), step, to_world))
        collar = np.array([[18, -66, 96], [55, -74, 104], [95, -52, 116], [140, -22, 128]]) * [side, 1, 1]
        pieces.append(tube_points(to_world(_curve(collar)), 6.0 - shrink, step))
    return pieces


def _breast_bone(shrink: float, step: float, to_world: ToWorld) -> _Points:
    z = np.linspace(82.0, -58.0, 60)
    _, half_y, middle = cavity_profile(z)
    y = middle - half_y - 8.0
    path = np.stack([np.zeros_like(z), np.maximum(y, y[12] - 0.32 * (82.0 - z) + 2.0), z], axis=1)
    width = np.interp(z, [-58, -50, 40, 55, 82], [6, 15, 13, 20, 26]) - shrink
    count = int(np.ceil(140.0 / step))
    at = np.linspace(0, len(z) - 1, count)
    centres = np.stack([np.interp(at, np.arange(len(z)), path[:, i]) for i in range(3)], axis=1)
    half = np.interp(at, np.arange(len(z)), width)
    sideways = np.stack([half, np.zeros(count), np.zeros(count)], axis=1)
    forward = np.broadcast_to([0.0, 5.2 - shrink, 0.0], (count, 3))
    return disc_points(to_world(centres), sideways, forward, np.full(count, 140.0 / count), step)


def _shoulder_blade(side: float, half_thickness: float, step: float, to_world: ToWorld) -> _Points:
    """A thin triangle behind the upper ribs, its outer edge thicker."""
    across, down = np.meshgrid(np.arange(0, 1, step / 85.0), np.arange(0, 1, step / 105.0))
    across, down = across.ravel(), down.ravel()
    inside = across < 1.02 - 0.85 * down
    across, down = across[inside], down[inside]
    z = 112.0 - 105.0 * down
    angle = np.deg2rad(34.0 + 44.0 * across + 10.0 * down)
    half_x, half_y, middle = cavity_profile(np.minimum(z, 70.0))
    centres = np.stack([side * (half_x + 17.0) * np.sin(angle), middle + (half_y + 15.0) * np.cos(angle), z], axis=1)
    thick = half_thickness * (0.75 + 1.4 * (across > 0.80 - 0.85 * down))
    layers = max(1, int(np.ceil(2 * half_thickness / step)))
    offsets = (np.arange(layers) + 0.5) / layers * 2 - 1
    normal = np.stack([side * np.sin(angle), np.cos(angle), np.zeros_like(angle)], axis=1)
    points = (to_world(centres)[None] + offsets[:, None, None] * (thick[:, None] * normal)[None]).reshape(-1, 3)
    return points, np.tile(step * step * 2 * thick / layers, layers)


def _curve(knots: NDArray[np.floating]) -> NDArray[np.float64]:
    """A smooth path through a few knots."""
    from scipy.interpolate import make_interp_spline

    at = np.linspace(0, len(knots) - 1, 12 * len(knots))
    path: NDArray[np.float64] = make_interp_spline(np.arange(len(knots)), knots, k=min(3, len(knots) - 1))(at)
    return path


def spine_hu(x: Array, y: Array, z: Array, edge_mm: float) -> tuple[Array, Array]:
    """The spine's HU and the share of each voxel that it covers, at canonical points near it."""
    y = y - np.float32(SPINE_Y)
    phase = np.mod(z + 4.0, np.float32(_SPINE_PERIOD)) - np.float32(_SPINE_PERIOD / 2)
    half_x = 17.0 - 0.022 * z
    body = (1.0 - np.sqrt(np.square(x / half_x) + np.square(y / (half_x * 0.80)))) * 14.0
    disc = smoothstep(np.abs(phase), 8.0 - 0.25 * edge_mm, 9.2 + 0.25 * edge_mm)
    end_plate = np.exp(-np.square((np.abs(phase) - 7.4) / np.float32(max(1.0, edge_mm / 2))))
    rim = np.exp(-np.square((body - 1.0) / np.float32(max(1.1, edge_mm / 2))))
    in_body = np.clip(body / np.float32(edge_mm) + 0.5, 0.0, 1.0)
    body_hu = (190.0 + 260.0 * np.maximum(end_plate, rim)) * (1 - disc) + 95.0 * disc

    canal = np.sqrt(np.square(x / 10.5) + np.square((y - 23.0) / 9.0))
    ring = 4.5 - np.abs((canal - 1.35) * 9.0)
    level = smoothstep(np.abs(phase), 10.5, 7.0)
    wing = 6.0 - np.hypot(y - 24.0 - 0.22 * np.abs(x), (phase + 1.0) * 0.9) - np.maximum(np.abs(x) - 36.0, 0.0)
    wing = np.where(np.abs(x) > 10.0, wing, np.float32(-9.0))
    slope = np.mod(z + 4.0 + 0.75 * (y - 32.0), np.float32(_SPINE_PERIOD)) - np.float32(_SPINE_PERIOD / 2)
    thorn = np.minimum(3.4 - np.abs(x), np.minimum(np.minimum(y - 30.0, 44.0 - y) * 0.5, 7.5 - np.abs(slope)))
    arch = np.maximum(np.maximum(np.where(level > 0.3, ring, ring - 3.0), wing), thorn)
    in_arch = np.clip(arch / np.float32(edge_mm) + 0.5, 0.0, 1.0) * (canal > 0.95)
    share = np.maximum(in_body, in_arch)
    hu = np.where(in_body >= in_arch, body_hu, np.float32(420.0) - 120.0 * smoothstep(arch, 1.0, 3.0))
    return hu.astype(np.float32), share.astype(np.float32)
