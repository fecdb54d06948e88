"""What a person sees: outlines where the mask ends, colours that mean what the legend says, captions that fit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fourdvq.preprocessing.canvas import ACCENT, PANEL, text_panel
from fourdvq.preprocessing.pictures import PairView, pair_picture, scan_picture
from synthetic_lungs import chest

SPACING = (7.5, 7.9, 7.9)


@pytest.fixture(scope="module")
def lungs() -> tuple[np.ndarray, np.ndarray]:
    scan, mask = chest((40, 48, 48))
    return scan.hu, mask.hu > 0


def opened(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


def test_png_and_jpeg_show_the_same_and_the_jpeg_is_for_many(lungs):
    png, jpeg = scan_picture(*lungs, SPACING, title="scan 0, baseline")
    assert opened(png).shape == opened(jpeg).shape
    assert np.abs(opened(png) - opened(jpeg)).mean() < 4
    assert len(jpeg) < 100_000


def test_the_outline_is_drawn_where_the_lung_ends(lungs):
    hu, mask = lungs
    with_lung = (opened(scan_picture(hu, mask, SPACING)[0]) == ACCENT).all(axis=-1).sum()
    small = mask.copy()
    small[:, :, 24:] = False
    assert 500 < (opened(scan_picture(hu, small, SPACING)[0]) == ACCENT).all(axis=-1).sum() < 0.75 * with_lung


def test_maps_of_movement_and_volume_come_with_a_field_only(lungs):
    hu, mask = lungs
    plain = pair_picture(hu, PairView(hu, hu, hu), mask, SPACING)[0]
    length = np.full(hu.shape, 7.0)
    mapped = pair_picture(hu, PairView(hu, hu, hu, length, np.full(hu.shape, -np.log(2))), mask, SPACING)[0]
    assert opened(mapped).shape[0] > opened(plain).shape[0] + PANEL // 2
    row = opened(mapped)[opened(plain).shape[0] :]
    half = row[: PANEL // 2, 10 + 2 * (PANEL + 10) :]  # the maps of volume: shrunk to half everywhere
    coloured = half[np.ptp(half, axis=-1) > 60]
    assert (coloured[:, 2] > coloured[:, 0]).mean() > 0.95


def test_equal_scans_merge_to_grey_and_a_lost_follow_up_to_blue(lungs):
    hu, mask = lungs
    air = np.full_like(hu, -1000)
    for other, blue in ((hu, False), (air, True)):
        picture = opened(pair_picture(hu, PairView(other, other, other), mask, SPACING)[0])
        third = picture[len(picture) // 3 : 2 * len(picture) // 3, 10 : 10 + PANEL]
        bluish = (third[..., 2] > third[..., 0] + 30).mean()
        assert (bluish > 0.05) == blue


def test_long_lines_are_wrapped_and_none_leaves_its_panel():
    one = text_panel([("V_REG", None)]).image
    long = text_panel([(" ".join(["W_MASK_ONELUNG"] * 6), None)]).image
    assert long.shape[0] > 2 * one.shape[0]
    assert (long[:, -3:] == long[0, 0]).all()
