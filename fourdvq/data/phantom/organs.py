"""Soft tissue in HU: the body wall, the mediastinum with heart and great vessels, and what lies under the diaphragm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fourdvq.data.phantom.fields import Array, Grid, lay_down, mix, smoothstep, soft_step, tube_points
from fourdvq.data.phantom.skeleton import ToWorld
from fourdvq.data.phantom.thorax import Build, Shapes, ball

AIR_HU, FAT_HU, MUSCLE_HU, BLOOD_HU, LIVER_HU, SKIN_HU = -1000.0, -102.0, 52.0, 42.0, 60.0, 15.0
_GAS_HU = -940.0
_Knots = list[tuple[float, float, float, float]]

# Canonical knots (x, y, z, radius) in mm.
_VESSELS: dict[str, _Knots] = {
    "aorta": [
        (-8, -14, -8, 15), (-14, -18, 20, 15.5), (-12, -16, 48, 15), (-2, -4, 66, 14), (12, 18, 68, 13),
        (21, 38, 56, 12.5), (22, 46, 30, 12),
        (20, 46, -20, 11.5), (15, 44, -80, 11), (8, 40, -130, 10.5), (4, 38, -185, 10),
    ],
    "superior caval vein": [
        (-24, -14, -10, 9), (-24, -16, 20, 9), (-22, -18, 60, 8.5), (-20, -22, 84, 8), (-30, -24, 112, 8),
    ],
    "left brachiocephalic vein": [(-20, -22, 78, 7), (0, -30, 82, 6.5), (22, -26, 92, 6.5), (34, -18, 114, 7)],
    "brachiocephalic artery": [(-6, -8, 72, 6.5), (-14, -6, 92, 6), (-22, -2, 118, 5.5), (-26, 0, 150, 5)],
    "left carotid": [(4, 4, 74, 4), (12, 4, 96, 4), (16, 4, 125, 4), (18, 4, 150, 4)],
    "left subclavian": [(13, 18, 74, 5), (20, 20, 98, 5), (30, 16, 118, 5), (60, 6, 128, 5)],
    "pulmonary trunk": [(16, -36, -4, 14), (20, -28, 14, 14), (22, -14, 30, 13), (26, 2, 36, 11.5), (36, 14, 30, 10)],
    "right pulmonary artery": [(20, -14, 28, 11), (4, -4, 28, 10.5), (-18, 2, 26, 10.5), (-38, 6, 22, 9)],
    "upper left vein": [(20, 6, 2, 8), (34, 0, 6, 7), (44, -4, 12, 6)],
    "upper right vein": [(-14, 6, 0, 8), (-30, 0, 4, 7), (-42, -4, 10, 6)],
    "lower caval vein": [(-20, 4, -40, 12), (-22, 8, -70, 12), (-22, 14, -120, 12), (-20, 18, -185, 11)],
    "azygos": [(-8, 46, -120, 3.5), (-9, 46, 30, 4), (-16, 34, 54, 4.5), (-22, 4, 56, 4.5)],
    "gullet": [
        (0, 32, 150, 6.5), (3, 33, 70, 6.5), (4, 30, 10, 7), (8, 32, -50, 7.5), (18, 22, -90, 8), (30, 5, -105, 9),
    ],
}  # fmt: skip
_AIRWAYS: dict[str, _Knots] = {
    "trachea": [(0, 4, 175, 8.5), (0, 8, 120, 8.5), (0, 13, 80, 8.5), (0, 16, 52, 8.8)],
    "right main": [(0, 16, 52, 8), (-14, 17, 38, 7.2), (-36, 16, 24, 6.4)],
    "left main": [(0, 16, 52, 8), (18, 20, 36, 6.6), (40, 20, 20, 5.8)],
}


def wall_hu(build: Build, shapes: Shapes, x: Array, z: Array, noise: Array, edge_mm: float) -> Array:
    """Skin, fat and muscle of the body wall, from the depth under the skin."""
    depth = shapes.skin
    fat = np.float32(build.fat_mm) * (1.0 + 0.18 * noise)
    muscle = soft_step(depth - fat, edge_mm)
    # Fat lies in sheets between the muscles, and fills much of the armpit.
    sheets = 0.7 * smoothstep(noise, 0.75, 1.2) * (0.3 + 0.7 * smoothstep(z, -20.0, 40.0))
    armpit = smoothstep(np.abs(x), 95.0, 125.0) * smoothstep(z, 15.0, 55.0)
    muscle = muscle * (1.0 - sheets + armpit * (sheets - 0.85 * smoothstep(noise, 0.3, -0.2)))
    hu = mix(np.full_like(muscle, FAT_HU), MUSCLE_HU, muscle)
    skin = np.exp(-np.square((depth - 0.8) / np.float32(max(1.2, edge_mm))))
    return mix(hu, SKIN_HU, skin * np.float32(min(1.0, 1.6 / edge_mm)))


def chest_hu(shapes: Shapes, noise: Array, edge_mm: float) -> Array:
    """Mediastinal fat with the heart in its rim of fat; vessels and airways are painted on it later."""
    fat = np.float32(FAT_HU + 8.0) + 22.0 * np.clip(noise, -1.5, 1.5)
    heart = soft_step(shapes.heart + 1.0, edge_mm)
    # The groove between atria and ventricles holds fat.
    groove = 0.5 * np.exp(-np.square((shapes.heart - 5.0) / 3.0)) * smoothstep(noise, 0.5, 1.3)
    pleura = np.clip(1.0 - np.abs(shapes.lung + 1.0) / np.float32(max(1.5, edge_mm)), 0.0, 1.0)
    hu = mix(fat, BLOOD_HU, heart * (1.0 - groove))
    return mix(hu, 20.0, pleura * np.float32(min(1.0, 1.0 / edge_mm)))


def belly_hu(shapes: Shapes, x: Array, y: Array, z: Array, noise: Array, edge_mm: float) -> Array:
    """Liver, spleen and stomach in fat under a thin sheet of diaphragm."""
    under = -shapes.diaphragm
    hu = np.float32(FAT_HU) + 18.0 * noise
    gas = ball(x, y, z, (50.0, -42.0, -112.0), (24.0, 12.0, 18.0))
    organs = (
        (ball(x, y, z, (92.0, 44.0, -118.0), (34.0, 42.0, 50.0)), 50.0),
        (ball(x, y, z, (52.0, -16.0, -118.0), (40.0, 48.0, 38.0)), 28.0),
        (ball(x, y, z, (18.0, -40.0, -108.0), (58.0, 36.0, 34.0)), LIVER_HU),
        (ball(x, y, z, (-56.0, -6.0, -130.0), (92.0, 94.0, 88.0)), LIVER_HU),
    )
    for field, value in organs:
        hu = mix(hu, value, soft_step(np.minimum(field, under - 2.0), edge_mm))
    hu = mix(hu, MUSCLE_HU, soft_step(4.0 - np.abs(under - 1.5), edge_mm))
    return mix(hu, _GAS_HU, soft_step(np.minimum(gas, under - 12.0), edge_mm))


def great_vessels(grid: Grid, to_world: ToWorld) -> Array:
    """Share of each voxel filled by the heart's great vessels and the gullet."""
    return _laid(grid, to_world, list(_VESSELS.values()), 0.0)


def central_airways(grid: Grid, to_world: ToWorld) -> tuple[Array, Array]:
    """Trachea and main bronchi: shares (whole tube, its air)."""
    paths = list(_AIRWAYS.values())
    return _laid(grid, to_world, paths, 1.6), _laid(grid, to_world, paths, 0.0)


def _laid(grid: Grid, to_world: ToWorld, paths: list[_Knots], grow_mm: float) -> Array:
    from scipy.interpolate import make_interp_spline

    step = max(0.6 * min(grid.spacing), 0.8)
    pieces: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for knots in paths:
        table = np.array(knots, dtype=np.float64)
        smooth = make_interp_spline(np.arange(len(table)), table, k=min(3, len(table) - 1))
        fine = smooth(np.linspace(0, len(table) - 1, 10 * len(table)))
        pieces.append(tube_points(to_world(fine[:, :3]), fine[:, 3] + grow_mm, step))
    points, volume = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return lay_down(grid, points, volume)
