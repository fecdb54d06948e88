"""One patient's chest, built once: everything that does not change with time, on the patient's own reference grid.

Only lung tissue changes with the disease, so the rest is one array, and the lung is kept as lists over its voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourdvq.data.phantom.disease import DiseaseMap, diseased_hu, map_disease, severity_of
from fourdvq.data.phantom.fields import Array, Grid, lay_down, mix, smooth_noise, soft_inside, soft_step
from fourdvq.data.phantom.organs import AIR_HU, BLOOD_HU, belly_hu, central_airways, chest_hu, great_vessels, wall_hu
from fourdvq.data.phantom.skeleton import CARTILAGE_HU, CORTEX_HU, MARROW_HU, Skeleton, build_skeleton, spine_hu
from fourdvq.data.phantom.thorax import LUNG_TOP, SPINE_Y, Build, Shapes, draw_build, shapes_at, to_canonical, to_world
from fourdvq.data.phantom.trees import Tree, branch_points, grow

_SLAB = 8  # slices painted at a time; larger slabs leave the processor's cache
_ARTERY_TIPS, _VEIN_TIPS = 900, 700
_FISSURE_HU = 170.0


@dataclass(frozen=True)
class Anatomy:
    """The reference state: `around` (D, H, W) HU without lung tissue, and lists (N,) over the lung's voxels.

    `share` is how much of a voxel is lung; `vessel`, `wall` and `lumen` are shares of vessel, airway wall and airway.
    """

    grid: Grid
    around: Array
    index: NDArray[np.intp]
    share: Array
    vessel: Array
    wall: Array
    lumen: Array
    tissue: Array
    disease: DiseaseMap

    def hu(self, extent: float) -> Array:
        """HU (D, H, W), float32, when the share `extent` of the lung is ill."""
        lung = diseased_hu(self.tissue, self.disease, extent)
        lung = mix(mix(mix(lung, BLOOD_HU, self.vessel), 0.0, self.wall), AIR_HU, self.lumen)
        volume = self.around.copy()
        flat = volume.reshape(-1)
        flat[self.index] = mix(flat[self.index], lung, self.share)
        return volume

    def lung_share(self) -> Array:
        """Share of each voxel (D, H, W) that is lung, trachea and main bronchi excluded."""
        return self._spread(self.share)

    def severity(self, extent: float) -> Array:
        """Severity times the share of lung, (D, H, W) in [0, 1]; 0 outside the lung."""
        return self._spread(severity_of(extent, self.disease.rank) * self.share)

    def _spread(self, values: Array) -> Array:
        volume = np.zeros(int(np.prod(self.grid.size)), np.float32)
        volume[self.index] = values
        return volume.reshape(self.grid.size)


def build_anatomy(grid: Grid, seed: tuple[int, ...], *, female: bool) -> Anatomy:
    """Build a patient's chest from its seed; the same seed gives the same chest at every grid size."""
    shape_rng, noise_rng, tree_rng, disease_rng = (np.random.default_rng([*seed, part]) for part in range(4))
    build = draw_build(shape_rng, female=female)
    x, y, z = to_canonical(build, grid)
    around, lung, depth = _paint(build, grid, noise_rng, x, y, z)
    share = soft_inside(lung, 3.0 * max(grid.spacing))
    index = np.flatnonzero(share > 0.0)
    place = _Placement(build, grid)
    _paint_bones(around, build_skeleton(grid, place))
    _paint_spine(around, grid, x, y, z)
    _paint_tubes(around, grid, place)
    vessel, wall, lumen = _lung_trees(build, grid, tree_rng, place)
    x, y, z, depth = (field.ravel()[index] for field in (x, y, z, depth))
    height = np.clip((z + 110.0) / np.float32(LUNG_TOP + 110.0), 0.0, 1.0)
    back = np.clip((y + 80.0) / 160.0, 0.0, 1.0)
    return Anatomy(
        grid=grid,
        around=around,
        index=index,
        share=share.ravel()[index],
        vessel=vessel.ravel()[index],
        wall=wall.ravel()[index],
        lumen=lumen.ravel()[index],
        tissue=_healthy_hu(noise_rng, grid, index, x, y, z, back),
        disease=map_disease(
            disease_rng, grid, index, share=share.ravel()[index], depth_mm=depth, height=height, back=back
        ),
    )


@dataclass(frozen=True)
class _Placement:
    """Canonical points to the patient's mm, as a callable."""

    build: Build
    grid: Grid

    def __call__(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        return to_world(self.build, self.grid, points)


def _paint(
    build: Build, grid: Grid, rng: np.random.Generator, x: Array, y: Array, z: Array
) -> tuple[Array, Array, Array]:
    """HU without lung, bones and tubes; the lung field; and the depth under chest wall and diaphragm, all (D, H, W)."""
    edge = max(1.0, 0.7 * float(np.prod(grid.spacing)) ** (1 / 3))
    noise = smooth_noise(rng, grid, 15.0)
    hu, lung, depth, skin = (np.empty(grid.size, np.float32) for _ in range(4))
    for start in range(0, grid.size[0], _SLAB):
        part = slice(start, start + _SLAB)
        shapes = shapes_at(build, x[part], y[part], z[part])
        hu[part] = _soft_tissue(build, shapes, x[part], y[part], z[part], noise[part], edge)
        lung[part], skin[part] = shapes.lung, shapes.skin
        depth[part] = np.minimum(shapes.cavity * (1.0 + 0.4 * np.abs(x[part]) / 130.0), 1.3 * shapes.diaphragm)
    hu = np.float32(AIR_HU) + (hu - np.float32(AIR_HU)) * soft_inside(skin, 3.0 * max(grid.spacing))
    return hu, lung, depth


def _soft_tissue(build: Build, shapes: Shapes, x: Array, y: Array, z: Array, noise: Array, edge: float) -> Array:
    hu = wall_hu(build, shapes, x, z, noise, edge)
    inside = soft_step(shapes.cavity + 1.0, edge)
    core = chest_hu(shapes, noise, edge)
    if float(z.min()) < 0.0:
        under = soft_step(-shapes.diaphragm, edge) * (1.0 - np.clip(shapes.heart, 0.0, 1.0))
        core = mix(core, belly_hu(shapes, x, y, z, noise, edge), under)
    return mix(hu, core, inside)


def _paint_bones(hu: Array, bones: Skeleton) -> None:
    hu += (np.float32(CARTILAGE_HU) - hu) * bones.cartilage
    hu += (np.float32(CORTEX_HU) - hu) * bones.bone
    hu += np.float32(MARROW_HU - CORTEX_HU) * np.minimum(bones.marrow, bones.bone)


def _paint_spine(hu: Array, grid: Grid, x: Array, y: Array, z: Array) -> None:
    """The spine is painted in its own box, a tenth of the field of view."""
    near = (np.abs(x) < 48.0) & (y > SPINE_Y - 22.0) & (y < SPINE_Y + 62.0)
    rows = np.flatnonzero(near.any(axis=(0, 2)))
    columns = np.flatnonzero(near.any(axis=(0, 1)))
    box = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    edge = max(1.0, 0.7 * float(np.prod(grid.spacing)) ** (1 / 3))
    bone, share = spine_hu(x[box], y[box], z[box], edge)
    # The thorns of a thin patient must not stick out of the skin.
    hu[box] = mix(hu[box], bone, share * (hu[box] > -300.0))


def _paint_tubes(hu: Array, grid: Grid, place: _Placement) -> None:
    hu += (np.float32(BLOOD_HU) - hu) * great_vessels(grid, place)
    tube, air = central_airways(grid, place)
    hu += (np.float32(30.0) - hu) * tube
    hu += (np.float32(AIR_HU) - hu) * air


def _lung_trees(build: Build, grid: Grid, rng: np.random.Generator, place: _Placement) -> tuple[Array, Array, Array]:
    """Shares (D, H, W) of vessels, airway walls and airway air inside the lungs."""
    voxel = float(np.prod(grid.spacing)) ** (1 / 3)
    thinnest, step = 0.16 * voxel, max(0.5 * min(grid.spacing), 0.5)
    arteries: list[Tree] = []
    veins: list[Tree] = []
    for side in (-1.0, 1.0):
        targets = _targets(build, rng, side)
        hilum = (side * 38.0, 14.0, 24.0)
        arteries.append(
            grow(hilum, (side, 0.1, -0.6), targets[:_ARTERY_TIPS], radius=7.0, power=0.38, thinnest=thinnest)
        )
        atrium = (side * 24.0, 8.0, -2.0)
        veins.append(grow(atrium, (side, -0.2, 0.1), targets[_ARTERY_TIPS:], radius=6.0, power=0.38, thinnest=thinnest))
    beside = np.array([0.0, 7.0, -3.0])
    airways = [tree.moved(-beside, 0.72, at_least=0.8) for tree in arteries]
    vessels = [tree.moved(0.4 * beside, 1.0) for tree in arteries] + veins
    return (
        _laid(grid, place, vessels, step),
        _laid(grid, place, airways, step, widen=1.22),
        _laid(grid, place, airways, step),
    )


def _laid(grid: Grid, place: _Placement, trees: list[Tree], step: float, *, widen: float = 1.0) -> Array:
    pieces = [branch_points(tree.mapped(place), step, widen=widen) for tree in trees if len(tree.start)]
    points, volume = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return lay_down(grid, points, volume)


def _targets(build: Build, rng: np.random.Generator, side: float) -> NDArray[np.float64]:
    """Points inside one lung that its vessels must reach, a few mm from the pleura; independent of the grid."""
    wanted = _ARTERY_TIPS + _VEIN_TIPS
    points = rng.random((9 * wanted, 3)) * [132.0, 190.0, 250.0] + [0.0, -95.0, -132.0]
    points[:, 0] *= side
    x, y, z = points.T.astype(np.float32)
    inside = points[shapes_at(build, x, y, z).lung > 4.0]
    return inside[:wanted]


def _healthy_hu(
    rng: np.random.Generator, grid: Grid, index: NDArray[np.intp], x: Array, y: Array, z: Array, back: Array
) -> Array:
    """Lung tissue without disease: denser at the back, slightly mottled, with the oblique fissures as faint lines."""
    level = float(rng.normal(-893.0, 8.0))
    mottled = 9.0 * smooth_noise(rng, grid, 20.0).ravel()[index] + 8.0 * smooth_noise(rng, grid, 5.0).ravel()[index]
    hu = np.float32(level) + 42.0 * (back - 0.5) + mottled
    blur = max(0.9, 0.5 * float(np.prod(grid.spacing)) ** (1 / 3))
    wave = 5.0 * np.sin(x / 28.0) + 3.0 * np.sin(y / 19.0)
    oblique = (z + 18.0 - 1.05 * y + wave) * 0.69
    horizontal = np.where((x < 0) & (oblique > 0), np.float32(1.0), np.float32(0.0))
    flat = z - 6.0 - 0.10 * np.abs(x) + wave
    lines = np.exp(-np.square(oblique / blur)) + horizontal * np.exp(-np.square(flat / blur))
    return np.asarray(hu + _FISSURE_HU * 0.7 / blur * np.minimum(lines, 1.0), dtype=np.float32)
