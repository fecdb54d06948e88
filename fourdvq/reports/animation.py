"""A trajectory as a moving picture: a frame per time, coronal beside axial, each marked SYNTHETIC in its pixels.

A GIF, which every viewer shows and which keeps 256 grey levels as they are. The mark is in the picture itself because a
file's name and metadata are lost when it is copied into a slide.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fourdvq.reports.figures import choose_view, plane_tile, years_text

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SIDE = 320  # pixels, the longer side of a plane
FRAME_MS, LAST_MS = 900, 2000
MARK = "SYNTHETIC  research only"
_GAP, _HEAD, _FOOT = 6, 26, 26


def trajectory_animation(
    volumes: Sequence[Tensor],
    years: Sequence[float],
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    lung: Tensor | None = None,
    labels: Sequence[str] | None = None,
) -> bytes:
    """An endless GIF of volumes x01 (D, H, W) in the order of their `years`; the same input gives the same bytes.

    `labels` stand beside the years, such as `extrapolated`. Raises ValueError if the lengths differ or none is there.
    """
    if not volumes or not len(volumes) == len(years) == len(labels or years):
        raise ValueError(f"{len(volumes)} volumes and {len(years)} times")
    order = sorted(range(len(years)), key=lambda i: years[i])
    arrays = [volumes[i].numpy() for i in order]
    view = choose_view(arrays, lung)
    frames = []
    for place, i in enumerate(order):
        pictures = [
            plane_tile(arrays[place], plane, view, spacing, SIDE, boxed=False) for plane in ("coronal", "axial")
        ]
        head = years_text(years[i]) + (f", {labels[i]}" if labels else "")
        frames.append(_frame(pictures, head, (place + 1) / len(order)))
    stream = io.BytesIO()
    frames[0].save(
        stream,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[FRAME_MS] * (len(frames) - 1) + [LAST_MS],
        loop=0,
        # Two equal frames stay two: the time drawn on them differs.
        optimize=False,
    )
    return stream.getvalue()


def _frame(pictures: Sequence[Image.Image], head: str, done: float) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    width = sum(p.width for p in pictures) + _GAP * (len(pictures) + 1)
    height = _HEAD + max(p.height for p in pictures) + _FOOT
    frame = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(frame)
    x = _GAP
    for picture in pictures:
        frame.paste(picture.convert("L"), (x, _HEAD + (height - _HEAD - _FOOT - picture.height) // 2))
        x += picture.width + _GAP
    pen.text((_GAP, 5), head, fill=255, font=ImageFont.load_default(15))
    pen.text((_GAP, height - _FOOT + 4), MARK, fill=255, font=ImageFont.load_default(15))
    # How far along the trajectory this frame is.
    pen.rectangle((0, height - 3, max(1, round(done * width)) - 1, height - 1), fill=200)
    return frame
