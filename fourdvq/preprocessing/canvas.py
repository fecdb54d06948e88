"""Captions, panels, colour scales and a histogram on one dark page, as PNG and as a smaller JPEG for contact sheets."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL = 248  # pixels of a panel's longer side
ACCENT = (255, 110, 60)
_GAP = 10
_LINE = 18  # height of a line of text
_BACK, _TEXT, _FAINT = (20, 20, 22), (236, 236, 236), (150, 150, 150)
_JPEG_QUALITY = 72  # 100 kB a pair: a sheet of 700 scans stays near 100 MB

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Scale:
    """A colour scale below a panel: ticks as (place from 0 to 1, text), and the colours of 0 to 1."""

    ticks: tuple[tuple[float, str], ...]
    colours: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Panel:
    """An RGB picture uint8 (H, W, 3) with a caption above; `sides` are letters for its left and right edge."""

    caption: str
    image: np.ndarray
    scale: Scale | None = None
    sides: str = ""


def canvas(title: str, rows: Sequence[Sequence[Panel]]) -> tuple[bytes, bytes]:
    """(PNG, JPEG) of the rows below each other; panels stand in columns of equal width."""
    columns = max(len(row) for row in rows)
    heights = [_row_height(row) for row in rows]
    size = (columns * (PANEL + _GAP) + _GAP, _GAP + _LINE + 6 + sum(heights))
    page = Image.new("RGB", size, _BACK)
    draw = ImageDraw.Draw(page)
    draw.text((_GAP, _GAP - 2), title, _TEXT, font=_font(16))
    top = _GAP + _LINE + 6
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            _place(page, draw, panel, _GAP + column * (PANEL + _GAP), top)
        top += height
    return _saved(page, format="PNG", compress_level=6), _saved(page, format="JPEG", quality=_JPEG_QUALITY)


def histogram(series: Sequence[tuple[np.ndarray, Colour]], span: tuple[float, float], caption: str) -> Panel:
    """Shares of values over `span` as lines, each series to its own maximum, with ticks of the axis below."""
    width, height = PANEL, PANEL * 5 // 8
    page = Image.new("RGB", (width, height + _LINE), (32, 32, 36))
    draw = ImageDraw.Draw(page)
    for value in range(-1000, int(span[1]) + 1, 200):
        x = (value - span[0]) / (span[1] - span[0]) * (width - 1)
        draw.line((x, 0, x, height), fill=(58, 58, 64))
        if value % 400 == -1000 % 400:
            draw.text((min(max(x, 18), width - 18), height + 9), str(value), _FAINT, font=_font(11), anchor="mm")
    for drawn, (values, colour) in enumerate(series):
        counts, _ = np.histogram(values, bins=width // 2, range=span)
        shares = counts / max(1, counts.max())
        line = [(2 * i, float((1 - s) * (height - 6) + 3)) for i, s in enumerate(shares)]
        draw.line(line, fill=colour, width=2 if drawn else 4)  # the first stays to be seen below an equal second
    return Panel(caption, np.array(page))


def text_panel(lines: Sequence[tuple[str, Colour | None]]) -> Panel:
    """Lines of text, those with a colour behind a swatch of it; long lines are wrapped at their spaces."""
    lines = [(part, colour) for text, colour in lines for part in (_wrapped(text) if colour is None else [text])]
    page = Image.new("RGB", (PANEL, _LINE * max(1, len(lines)) + 4), _BACK)
    draw = ImageDraw.Draw(page)
    for i, (text, colour) in enumerate(lines):
        y = 2 + i * _LINE
        if colour is not None:
            draw.rectangle((2, y + 3, 14, y + 14), fill=colour)
        draw.text((20 if colour is not None else 2, y + 1), text, _TEXT, font=_font(13))
    return Panel("", np.array(page))


def _wrapped(text: str) -> list[str]:
    font, lines = _font(13), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= PANEL - 4:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _row_height(row: Sequence[Panel]) -> int:
    below = _LINE + 16 if any(panel.scale for panel in row) else 0
    return _LINE + max(panel.image.shape[0] for panel in row) + below + _GAP


def _place(page: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, left: int, top: int) -> None:
    draw.text((left, top), panel.caption, _TEXT, font=_font(13))
    height, width = panel.image.shape[:2]
    left += (PANEL - width) // 2
    page.paste(Image.fromarray(panel.image), (left, top + _LINE))
    middle = top + _LINE + height // 2
    for letter, x in zip(panel.sides, (left + 8, left + width - 8), strict=False):
        draw.text((x, middle), letter, _TEXT, font=_font(12), anchor="mm", stroke_width=1, stroke_fill=(0, 0, 0))
    if panel.scale is not None:
        _draw_scale(page, draw, panel.scale, (left, top + _LINE + height + 5, width))


def _draw_scale(page: Image.Image, draw: ImageDraw.ImageDraw, scale: Scale, place: tuple[int, int, int]) -> None:
    left, top, width = place
    bar = np.repeat(scale.colours(np.linspace(0, 1, width))[None], 9, axis=0).astype(np.uint8)
    page.paste(Image.fromarray(bar), (left, top))
    for at, text in scale.ticks:
        x = left + at * (width - 1)
        anchor = "lm" if at == 0 else "rm" if at == 1 else "mm"
        draw.text((x, top + 18), text, _TEXT, font=_font(12), anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _saved(page: Image.Image, **how: object) -> bytes:
    stream = io.BytesIO()
    page.save(stream, **how)  # type: ignore[arg-type]
    return stream.getvalue()
