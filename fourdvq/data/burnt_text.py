"""Letters burnt into the pixels: small saturated shapes of one height in a row, near a corner of the image.

A tag that says so is often missing, and text in the pixels may name the patient. Bone and metal are saturated too, but
their pieces differ in height and do not stand on one line.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

SATURATED_HU = 1500
MIN_LETTERS = 4
_CORNER = (0.25, 0.4)  # share of rows and of columns
_LETTER_ROWS = (5, 40)
_HEIGHT_SPREAD = 0.25


def has_burnt_text(hu: np.ndarray) -> bool:
    """Whether any slice of HU (D, H, W), in the scanner's own order of rows and columns, holds a line of letters."""
    _, rows, columns = hu.shape
    high, wide = max(1, int(rows * _CORNER[0])), max(1, int(columns * _CORNER[1]))
    for down in (slice(0, high), slice(rows - high, rows)):
        for across in (slice(0, wide), slice(columns - wide, columns)):
            bright = hu[:, down, across] >= SATURATED_HU
            counts = bright.sum(axis=(1, 2))
            # Fewer pixels than four letters have, or more than text would cover, is no line of letters.
            likely = np.flatnonzero((counts >= 5 * MIN_LETTERS) & (counts <= bright[0].size // 3))
            if any(_line_of_letters(bright[i]) for i in likely):
                return True
    return False


def _line_of_letters(bright: np.ndarray) -> bool:
    labels, count = ndimage.label(bright, structure=np.ones((3, 3)))
    if count < MIN_LETTERS:
        return False
    areas = np.bincount(labels.ravel())[1:]
    letters = []
    for place, area in zip(ndimage.find_objects(labels), areas, strict=True):
        height, width = (s.stop - s.start for s in place)
        fill = area / (height * width)
        sized = _LETTER_ROWS[0] <= height <= _LETTER_ROWS[1] and width <= 1.5 * height
        # A stroke or an outline: an I fills its box, a round calcification or a clip does not stand in a row.
        if sized and (fill < 0.8 or width <= 0.4 * height):
            letters.append((place[0].start, place[0].stop, place[1].start, place[1].stop))
    return any(_row_with(letter, letters) for letter in letters)


def _row_with(first: tuple[int, ...], letters: Sequence[tuple[int, ...]]) -> bool:
    """Whether enough letters share the first one's height and line, each near the one before it."""
    top, bottom = first[:2]
    height = bottom - top
    alike = [
        x
        for x in letters
        if abs((x[1] - x[0]) - height) <= _HEIGHT_SPREAD * height and abs(x[1] - bottom) <= max(1, 0.2 * height)
    ]
    alike.sort(key=lambda x: x[2])
    run = longest = 1
    for left, right in itertools.pairwise(alike):
        run = run + 1 if right[2] - left[3] <= 1.5 * height else 1
        longest = max(longest, run)
    return longest >= MIN_LETTERS
