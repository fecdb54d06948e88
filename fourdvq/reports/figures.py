"""The trajectory figure: a patient's real scans above the generated ones, over time, in three planes and a close-up.

Volumes are x01 (D, H, W) = (z, y, x) in LPS: axial slices are shown with the patient's front at the top and the left
side on the right, coronal and sagittal ones with the head at the top. The same volumes give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageDraw
    from torch import Tensor

TILE = 132  # pixels, the longer side of a slice
GAP, LEFT, TOP = 4, 96, 40
ZOOM_SHARE = 0.3  # of the slice's height and width
INK, PAPER, EMPTY, BOX = (34, 48, 60), (255, 255, 255), (236, 239, 242), (240, 180, 40)
PLANES = ("axial", "coronal", "sagittal")
UP_IS_HEAD = ("coronal", "sagittal")


@dataclass(frozen=True)
class View:
    """Where the planes cut: a voxel (z, y, x); the close-up's top left corner and size (y, x) in the axial slice."""

    centre: tuple[int, int, int]
    corner: tuple[int, int]
    extent: tuple[int, int]


def trajectory_figure(
    generated: Sequence[Tensor | None],
    real: Sequence[Tensor | None],
    years: Sequence[float],
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    lung: Tensor | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
) -> bytes:
    """PNG with one column per time and, for each plane and the close-up, a row of real and a row of generated slices.

    A time without a real (or a generated) scan leaves its place empty. `spacing` (z, y, x) in mm keeps proportions;
    `lung` (D, H, W) puts the axial and coronal planes through the lungs' middle and the sagittal one through the lung
    that changes more; `labels` stand beside the years, such as `given`.
    Raises ValueError if the lengths differ or nothing is there to draw.
    """
    if not len(generated) == len(real) == len(years) or not any(v is not None for v in [*generated, *real]):
        raise ValueError(f"{len(generated)} generated, {len(real)} real volumes and {len(years)} times")
    from PIL import Image, ImageDraw

    columns = [[None if v is None else v.numpy() for v in series] for series in (real, generated)]
    view = choose_view([v for series in columns for v in series if v is not None], lung)
    rows = [(plane, which) for plane in (*PLANES, "close-up") for which in ("real", "generated")]
    pitch = TILE + GAP
    canvas = Image.new("RGB", (LEFT + pitch * len(years) + GAP, TOP + pitch * len(rows) + GAP), PAPER)
    pen = ImageDraw.Draw(canvas)
    _write_heads(pen, years, labels, title)
    shown = next(v for series in columns for v in series if v is not None)
    for r, (plane, which) in enumerate(rows):
        words = f"{plane}\n{which}" + ("\nSYNTHETIC" if which == "generated" else "")
        pen.text((6, TOP + r * pitch + TILE // 2 - 20), words, fill=INK, font=_font(12))
        blank = Image.new("RGB", plane_tile(shown, plane, view, spacing, TILE).size, EMPTY)
        for c, volume in enumerate(columns[which == "generated"]):
            place = (LEFT + c * pitch, TOP + r * pitch)
            tile = blank if volume is None else plane_tile(volume, plane, view, spacing, TILE)
            canvas.paste(tile, (place[0] + (TILE - tile.width) // 2, place[1] + (TILE - tile.height) // 2))
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=False)
    return stream.getvalue()


def choose_view(volumes: Sequence[np.ndarray], lung: Tensor | None) -> View:
    """Planes through the middle of the lung (or of the volume); the close-up where the volumes differ most.

    The middle of both lungs lies between them: the sagittal plane goes through the one that changes more.
    """
    shape = volumes[0].shape
    inside = np.ones(shape, dtype=bool) if lung is None else lung.numpy().astype(bool)
    places = np.argwhere(inside) if inside.any() else np.argwhere(np.ones(shape, dtype=bool))
    z, y, x = (round(v) for v in places.mean(axis=0))
    extent = (max(1, round(shape[1] * ZOOM_SHARE)), max(1, round(shape[2] * ZOOM_SHARE)))
    change = sum(np.abs(v[z] - volumes[0][z]) for v in volumes[1:]) * inside[z] if len(volumes) > 1 else inside[z] * 0.0
    corner = _busiest(np.asarray(change, dtype=np.float64), extent)
    if corner is None:
        corner = (y - extent[0] // 2, x - extent[1] // 2)
    if lung is not None:
        x = _one_lung(inside, change, x)
    bounded = tuple(int(np.clip(a, 0, n - e)) for a, n, e in zip(corner, shape[1:], extent, strict=True))
    return View((z, y, x), (bounded[0], bounded[1]), extent)


def _one_lung(inside: np.ndarray, change: np.ndarray, middle: int) -> int:
    """The x of the middle of the lung on the side where `change` (H, W) is larger; without change, the larger lung."""
    across = np.asarray(change, dtype=np.float64).sum(axis=0) if np.any(change) else inside.sum(axis=(0, 1))
    side = slice(0, middle) if across[:middle].sum() > across[middle:].sum() else slice(middle, None)
    counts = inside.sum(axis=(0, 1))[side]
    if not counts.any():
        return middle
    return round(float((counts * np.arange(len(counts))).sum() / counts.sum())) + (side.start or 0)


def _busiest(change: np.ndarray, extent: tuple[int, int]) -> tuple[int, int] | None:
    """Top left corner of the window with the largest sum, by an integral image; None if nothing changes."""
    if not change.any():
        return None
    total = np.pad(change.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    h, w = extent
    sums = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
    row, column = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(row), int(column)


def plane_tile(
    volume: np.ndarray,
    plane: str,
    view: View,
    spacing: tuple[float, float, float],
    side: int,
    *,
    boxed: bool = True,
) -> Image.Image:
    """One slice (or the close-up) as a picture whose longer side has `side` pixels, in true proportions.

    `boxed` frames the close-up's place in the axial slice.
    """
    from PIL import Image, ImageDraw

    z, y, x = view.centre
    (top, left), (height, width) = view.corner, view.extent
    if plane == "coronal":
        grey, step = volume[:, y, :], (spacing[0], spacing[2])
    elif plane == "sagittal":
        grey, step = volume[:, :, x], (spacing[0], spacing[1])
    else:
        grey, step = volume[z], (spacing[1], spacing[2])
    if plane == "close-up":
        grey = grey[top : top + height, left : left + width]
    if plane in UP_IS_HEAD:
        grey = grey[::-1]
    size_mm = (grey.shape[1] * step[1], grey.shape[0] * step[0])
    scale = side / max(size_mm)
    size = (max(1, round(size_mm[0] * scale)), max(1, round(size_mm[1] * scale)))
    pixels = np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8)
    tile = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BILINEAR).convert("RGB")
    if plane == "axial" and boxed:
        per_row, per_column = size[1] / volume.shape[1], size[0] / volume.shape[2]
        box = (left * per_column, top * per_row, (left + width) * per_column - 1, (top + height) * per_row - 1)
        ImageDraw.Draw(tile).rectangle(tuple(round(v) for v in box), outline=BOX)
    return tile


def years_text(years: float) -> str:
    """`0.5 y`, `2 y`."""
    return f"{years:.2f}".rstrip("0").rstrip(".") + " y"


def _write_heads(pen: ImageDraw.ImageDraw, years: Sequence[float], labels: Sequence[str] | None, title: str) -> None:
    pen.text((6, 4), title, fill=INK, font=_font(13))
    for c, year in enumerate(years):
        text = years_text(year) + (f", {labels[c]}" if labels else "")
        pen.text((LEFT + c * (TILE + GAP), 22), text, fill=INK, font=_font(12))


def _font(size: int):  # type: ignore[no-untyped-def]
    from PIL import ImageFont

    return ImageFont.load_default(size)
