"""Where each point of a patient lies in each scan: the breath, the slow loss of lung volume, and the table.

Reference points q go to scan points F(q) = R(q + u(q)), u smooth and R a small turn and shift. Scans are made by
looking back, q = B(p) = F^-1(p). Both directions are kept as nodes over the field of view, so every size sees the same
motion. The true displacement of a follow-up is u_k(p) = F_k(B_0(p)) - p for points p of the baseline scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline

from fourdvq.data.phantom.fields import Grid
from fourdvq.data.phantom.patients import PhantomPatient, PhantomVisit

NODES = (16, 20, 20)  # (z, y, x) nodes of stored motion: one per 18 mm
_LOSS_MM = 26.0  # lift of the diaphragm if the whole lung fell ill
_SMALL_NODES = (6, 6, 6)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Motion:
    """F of one scan: parameters in mm; `jitter` (3, 6, 6, 6) is the smooth part that has no name."""

    grid: Grid
    lift_mm: float
    forward_mm: float
    shift_mm: Floats
    turn: Floats
    jitter: Floats

    def displaced(self, q: Floats) -> Floats:
        """q + u(q) for points (N, 3) in mm."""
        return q + self._smooth(q)

    def forward(self, q: Floats) -> Floats:
        """F(q): reference points (N, 3) to scan points."""
        return self.displaced(q) @ self.turn.T + self.shift_mm

    def backward(self, p: Floats) -> Floats:
        """B(p): scan points (N, 3) to reference points, by fixed-point iteration; u is a contraction."""
        start = (p - self.shift_mm) @ self.turn
        q = start
        for _ in range(7):
            q = start - self._smooth(q)
        return q

    def _smooth(self, q: Floats) -> Floats:
        """u(q): largest at the diaphragm, none at the apex, little at the spine and in the body wall."""
        x, y, z = q.T
        unit = np.clip((105.0 - z) / 165.0, 0.0, 1.0)
        along = unit * unit * (3.0 - 2.0 * unit)
        spine = 1.0 - 0.8 * np.exp(-np.square(x / 40.0) - np.square((y - 75.0) / 38.0))
        ring = np.clip((np.hypot(x / 128.0, y / 90.0) - 0.8) / 0.6, 0.0, 1.0)
        inside = spine * (1.0 - 0.75 * ring * ring * (3.0 - 2.0 * ring))
        front = np.clip((70.0 - y) / 150.0, 0.0, 1.0)
        moved = _spline(self.jitter, self.grid, q)
        moved[:, 2] += self.lift_mm * along * inside
        moved[:, 1] += self.forward_mm * front * front * (0.3 + 0.7 * along)
        return moved


def motion_of(patient: PhantomPatient, visit: PhantomVisit, grid: Grid) -> Motion:
    """F of a visit; the patient's later scans also lose lung volume as the true extent grows."""
    index = int(visit.scan_id.removeprefix("CT"))
    rng = np.random.default_rng(patient.stream(2000, index))
    lost = _LOSS_MM * (visit.extent - patient.extent_at_start)
    turn = np.deg2rad(visit.turn_deg)
    c, s = np.cos(turn), np.sin(turn)
    return Motion(
        grid=grid,
        lift_mm=visit.breath_mm + lost,
        forward_mm=0.35 * visit.breath_mm,
        shift_mm=np.array(visit.shift_mm),
        turn=np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]),
        jitter=rng.standard_normal((3, *_SMALL_NODES)) * np.array([0.9, 0.9, 1.3])[:, None, None, None],
    )


def node_points(grid: Grid) -> Floats:
    """The nodes (N, 3) in mm; N = product of NODES, z slowest."""
    ax = [np.linspace(grid.low[i], grid.low[i] + grid.extent[i], n) for i, n in zip((2, 1, 0), NODES, strict=True)]
    z, y, x = np.meshgrid(*ax, indexing="ij")
    return np.stack([x.ravel(), y.ravel(), z.ravel()], axis=1)


def backward_nodes(motion: Motion, grid: Grid) -> Floats:
    """B(p) - p at the nodes, (3, *NODES), components x, y, z in mm."""
    points = node_points(grid)
    return (motion.backward(points) - points).T.reshape(3, *NODES)


def displacement_nodes(baseline: Motion, follow_up: Motion, grid: Grid) -> Floats:
    """F_k(B_0(p)) - p at the nodes, (3, *NODES): baseline points to follow-up points, mm."""
    points = node_points(grid)
    return (follow_up.forward(baseline.backward(points)) - points).T.reshape(3, *NODES)


def _spline(nodes: Floats, grid: Grid, points: Floats) -> Floats:
    """Cubic splines through nodes (C, d, h, w) that span the field of view, at any points (N, 3): (N, C)."""
    weights = []
    for axis, count in zip((2, 1, 0), nodes.shape[1:], strict=True):
        at = np.clip((points[:, axis] - grid.low[axis]) / grid.extent[axis], 0.0, 1.0) * (count - 1)
        weights.append(_basis(count)(at))
    wz, wy, wx = weights
    product = wz[:, :, None, None] * (wy[:, None, :, None] * wx[:, None, None, :])
    return product.reshape(len(points), -1) @ nodes.reshape(len(nodes), -1).T


@lru_cache(maxsize=8)
def _basis(count: int) -> Callable[[Floats], Floats]:
    """All `count` cardinal splines at once, as a function of the place in nodes."""
    splines: Callable[[Floats], Floats] = make_interp_spline(np.arange(count), np.eye(count), k=3)
    return splines
