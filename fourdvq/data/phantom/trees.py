"""Vessels and airways of the lungs: trees that divide the space they supply.

A branch grows towards the middle of the points it must supply, then the points are divided across its direction and
each half gets a daughter; a branch that supplies n points has a radius that grows with a power of n. The same points
give the same tree at every voxel size; branches far thinner than a voxel are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourdvq.data.phantom.fields import disc_points, frames

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tree:
    """Curved branches: start, bend and end points (N, 3) in canonical mm, radius at both ends (N,)."""

    start: Floats
    bend: Floats
    end: Floats
    radius_start: Floats
    radius_end: Floats

    def mapped(self, to_world: Callable[[Floats], Floats]) -> Tree:
        """The tree with its points placed in the patient."""
        start, bend, end = (to_world(v) for v in (self.start, self.bend, self.end))
        return Tree(start, bend, end, self.radius_start, self.radius_end)

    def moved(self, offset: Floats, scale_radius: float, *, at_least: float = 0.0) -> Tree:
        """The tree running beside itself, with radii scaled; branches thinner than `at_least` are dropped."""
        keep = self.radius_start * scale_radius >= at_least
        shift = offset * np.minimum(self.radius_start, 5.0)[:, None] / 5.0
        parts = (self.start + shift, self.bend + shift, self.end + shift)
        radii = (self.radius_start * scale_radius, self.radius_end * scale_radius)
        return Tree(*(v[keep] for v in (*parts, *radii)))


def grow(
    root: tuple[float, float, float],
    heading: tuple[float, float, float],
    targets: Floats,
    *,
    radius: float,
    power: float = 0.42,
    thinnest: float = 0.0,
) -> Tree:
    """Grow a tree from `root` to all `targets` (N, 3); `radius` is that of the trunk, in mm."""
    rows: list[tuple[Floats, Floats, Floats, float, float]] = []
    total = len(targets)
    first = np.asarray(heading, np.float64)
    stack = [(np.asarray(root, np.float64), first / np.linalg.norm(first), targets, radius)]
    while stack:
        node, direction, points, own = stack.pop()
        middle = points.mean(axis=0)
        reach = middle - node
        end = node + reach * (1.0 if len(points) == 1 else 0.42)
        length = float(np.linalg.norm(end - node))
        # A daughter leaves in a direction between its mother's and that of its own goal, so branches bend smoothly.
        bend = node + 0.45 * length * _unit(0.55 * direction + 0.45 * _unit(reach))
        daughter = radius * (max(len(points) / 2, 1.0) / total) ** power
        rows.append((node, bend, end, own, max(daughter, 0.7 * own) if len(points) > 1 else 0.5 * own))
        if len(points) == 1 or daughter < thinnest:
            continue
        heading_out = _unit(end - bend)
        side = _widest_across(points - middle, heading_out)
        order = np.argsort((points - middle) @ side)
        half = len(points) // 2
        for part in (points[order[:half]], points[order[half:]]):
            stack.append((end, heading_out, part, radius * (len(part) / total) ** power))
    columns = list(zip(*rows, strict=True))
    return Tree(*(np.array(column) for column in columns))


def branch_points(tree: Tree, step: float, *, widen: float = 1.0) -> tuple[Floats, Floats]:
    """Fill the branches with points of a known volume (mm^3); `widen` multiplies the radius (airway with its wall)."""
    length = np.linalg.norm(tree.bend - tree.start, axis=1) + np.linalg.norm(tree.end - tree.bend, axis=1)
    count = np.maximum(2, np.ceil(length / step)).astype(np.int64)
    owner = np.repeat(np.arange(len(count)), count)
    t = ((np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + 0.5) / count[owner])[:, None]
    p, q, r = tree.start[owner], tree.bend[owner], tree.end[owner]
    centres = (1 - t) ** 2 * p + 2 * t * (1 - t) * q + t**2 * r
    normal, binormal = frames((1 - t) * (q - p) + t * (r - q))
    radius = widen * ((1 - t) * tree.radius_start[owner, None] + t * tree.radius_end[owner, None])
    return disc_points(centres, normal * radius, binormal * radius, (length / count)[owner], step)


def _unit(vector: Floats) -> Floats:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


def _widest_across(offsets: Floats, direction: Floats) -> Floats:
    """The direction across `direction` in which the points spread most."""
    across = offsets - np.outer(offsets @ direction, direction)
    spread = across.T @ across
    side = spread[np.argmax(np.diag(spread))]
    # Two steps of the power method are enough to tell the long side from the short one.
    side = spread @ (spread @ side)
    return _unit(side) if np.any(side) else np.roll(direction, 1)
