"""A small chest made of ellipsoids, for tests that need a plausible scan: body, two lungs with vessels, a trachea.

Positions are in mm around the middle of the grid, so the same patient can be sampled on any grid.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from fourdvq.data.volume import Volume

EXTENT_MM = (300.0, 380.0, 380.0)  # z, y, x


def chest(
    size: tuple[int, int, int] = (40, 48, 48),
    *,
    seed: int = 0,
    shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    scale: float = 1.0,
    noise: float = 15.0,
) -> tuple[Volume, Volume]:
    """Scan and lung mask; `shift_mm` (z, y, x) moves and `scale` shrinks the anatomy, not the grid."""
    spacing = tuple(e / n for e, n in zip(EXTENT_MM, size, strict=True))
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing, strict=True)]
    z, y, x = np.meshgrid(*[(a - s) / scale for a, s in zip(axes, shift_mm, strict=True)], indexing="ij")
    texture = _texture(z, y, x, seed)

    body = (y / 115) ** 2 + (x / 165) ** 2 < 1
    lung = np.zeros(size, dtype=bool)
    for side, half_width in ((-1, 58.0), (1, 52.0)):
        lung |= ((z - 5) / 115) ** 2 + (y / 75) ** 2 + ((x - side * 78) / half_width) ** 2 < 1
    trachea = ((y + 20) ** 2 + x**2 < 9**2) & (z > 20)
    hu = np.full(size, -1000.0)
    hu[body] = 40
    hu[lung] = -850 + 220 * texture[lung]
    hu[trachea] = -990
    hu += np.random.default_rng(seed + 1).normal(0, noise, size)
    place = (EXTENT_MM[2] / -2, EXTENT_MM[1] / -2, EXTENT_MM[0] / -2)
    scan = Volume(np.clip(np.rint(hu), -1024, 3071).astype(np.int16), spacing, place)  # type: ignore[arg-type]
    return scan, Volume((lung & ~trachea).astype(np.uint8), spacing, place)  # type: ignore[arg-type]


def _texture(z: np.ndarray, y: np.ndarray, x: np.ndarray, seed: int) -> np.ndarray:
    """Vessel-like blobs fixed in the patient, about 0 to 2, so that a registration has something to hold on to."""
    grid = np.random.default_rng(seed).normal(0, 1, (24, 30, 30))
    grid = ndimage.gaussian_filter(grid, 1.0, mode="wrap")
    at = np.stack([z / 14 + 12, y / 14 + 15, x / 14 + 15])
    blobs: np.ndarray = ndimage.map_coordinates(grid / grid.std(), at, order=1, mode="grid-wrap")
    return np.clip(blobs, 0, 2)
