"""The picture a person judges a scan by: the mask's outline, and for a pair the alignment before and after.

Baseline is blue and follow-up yellow, so that aligned tissue turns grey (as in the paper's quality control). All
outside the mask is dimmed. Drawn with numpy and Pillow alone: a plotting library would cost more than the registration.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

PANEL = 176  # pixels of the longer side
GAP = 4
WINDOW_HU = (-1000.0, 0.0)
DIM = 0.35
OUTLINE = (255, 96, 64)
AXIAL_AT = (0.25, 0.5, 0.75)  # of the mask's extent along z


@dataclass(frozen=True)
class PairView:
    """A follow-up on the target grid, HU (D, H, W): centroids only, registered, and final; |u| and log J if any."""

    before: np.ndarray
    after: np.ndarray
    final: np.ndarray
    length_mm: np.ndarray | None = None
    log_j: np.ndarray | None = None


def scan_picture(hu: np.ndarray, mask: np.ndarray, spacing: tuple[float, float, float]) -> bytes:
    """PNG of one scan (D, H, W): three axial slices and a coronal one, each with the outline of the mask."""
    return _png([_outlined_row(hu, mask, spacing)])


def pair_picture(baseline: np.ndarray, view: PairView, mask: np.ndarray, spacing: tuple[float, float, float]) -> bytes:
    """PNG of a pair: the final scan outlined; before, after and final merged, axial and coronal; |u|, log J, HU."""
    z, y = _middle(mask, 0), _middle(mask, 1)
    merged = [_merge(baseline, follow_up, mask) for follow_up in (view.before, view.after, view.final)]
    rows = [_outlined_row(view.final, mask, spacing)]
    rows.append([_panel(m[z], spacing[1:]) for m in merged] + [_histogram(baseline[mask], view.final[mask])])
    maps = []
    if view.length_mm is not None and view.log_j is not None:
        maps = [_panel(_heat(view.length_mm[z], 0, 15) * _dim(mask[z]), spacing[1:])]
    rows.append([_panel(m[::-1, y], (spacing[0], spacing[2])) for m in merged] + maps)
    if view.log_j is not None:
        log_j = _heat(view.log_j[::-1, y], -1, 1) * _dim(mask[::-1, y])
        rows[0].append(_panel(log_j, (spacing[0], spacing[2])))
    return _png(rows)


def _outlined_row(hu: np.ndarray, mask: np.ndarray, spacing: tuple[float, float, float]) -> list[np.ndarray]:
    inside = np.flatnonzero(mask.any(axis=(1, 2)))
    cuts = [int(inside[0] + f * (inside[-1] - inside[0])) for f in reversed(AXIAL_AT)] if inside.size else [0]
    row = [_outlined(hu[z], mask[z], spacing[1:]) for z in cuts]
    y = _middle(mask, 1)
    return [*row, _outlined(hu[::-1, y], mask[::-1, y], (spacing[0], spacing[2]))]


def _middle(mask: np.ndarray, axis: int) -> int:
    inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
    return int(inside[inside.size // 2]) if inside.size else mask.shape[axis] // 2


def _outlined(hu: np.ndarray, mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    grey = _panel(np.repeat(_grey(hu)[..., None], 3, axis=-1), spacing)
    size = (grey.shape[1], grey.shape[0])
    large = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0
    edge = large & ~ndimage.binary_erosion(large)
    grey[edge] = OUTLINE
    return grey


def _merge(baseline: np.ndarray, follow_up: np.ndarray, mask: np.ndarray) -> np.ndarray:
    b, f = _grey(baseline), _grey(follow_up)
    merged: np.ndarray = np.stack([f, f, b], axis=-1) * _dim(mask)
    return merged


def _dim(mask: np.ndarray) -> np.ndarray:
    factor: np.ndarray = np.where(mask, 1.0, DIM)[..., None]
    return factor


def _grey(hu: np.ndarray) -> np.ndarray:
    """HU as 0 to 255 float in the lung window."""
    low, high = WINDOW_HU
    grey: np.ndarray = np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) * 255
    return grey


def _heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Blue to white to red, 0 to 255."""
    t = np.clip((values.astype(np.float32) - low) / (high - low), 0, 1)
    rgb: np.ndarray = np.stack([np.minimum(1, 2 * t), 1 - np.abs(2 * t - 1), np.minimum(1, 2 - 2 * t)], axis=-1)
    return 255 * rgb


def _panel(rgb: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """An RGB slice, resized so that millimetres are square and the longer side has PANEL pixels."""
    height, width = rgb.shape[0] * spacing[0], rgb.shape[1] * spacing[1]
    scale = PANEL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
    return np.array(image.resize(size, Image.Resampling.BILINEAR))


def _histogram(baseline: np.ndarray, follow_up: np.ndarray) -> np.ndarray:
    """Shares of HU inside the mask: baseline blue, follow-up yellow, from -1024 to 200 HU."""
    canvas = np.zeros((PANEL // 2, PANEL, 3), dtype=np.uint8)
    for values, colour in ((baseline, (80, 80, 255)), (follow_up, (230, 230, 0))):
        counts, _ = np.histogram(values, bins=PANEL, range=(-1024, 200))
        heights = np.sqrt(counts / max(1, counts.max())) * (canvas.shape[0] - 1)
        rows = canvas.shape[0] - 1 - heights.astype(int)
        for column in range(PANEL):
            canvas[rows[column], column] = colour
    return canvas


def _png(rows: Sequence[Sequence[np.ndarray]]) -> bytes:
    height = sum(max(p.shape[0] for p in row) + GAP for row in rows) + GAP
    width = max(sum(p.shape[1] + GAP for p in row) for row in rows) + GAP
    canvas = np.full((height, width, 3), 24, dtype=np.uint8)
    top = GAP
    for row in rows:
        left = GAP
        for panel in row:
            canvas[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
            left += panel.shape[1] + GAP
        top += max(p.shape[0] for p in row) + GAP
    stream = io.BytesIO()
    Image.fromarray(canvas).save(stream, format="PNG", compress_level=3)
    return stream.getvalue()
