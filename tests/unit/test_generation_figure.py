"""The trajectory figure shows the right slice the right way up."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fourdvq.reports.figures import GAP, LEFT, TILE, TOP, choose_view, trajectory_figure


def tile(png: bytes, row: int, column: int) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    y, x = TOP + row * (TILE + GAP), LEFT + column * (TILE + GAP)
    return image[y : y + TILE, x : x + TILE]


def test_the_head_is_at_the_top_of_coronal_and_sagittal_slices():
    volume = torch.zeros(20, 20, 20)
    volume[15:] = 1.0  # towards the head
    png = trajectory_figure([volume], [volume], [0.0])
    for row in (2, 4):
        assert tile(png, row, 0)[:20].mean() > 200
        assert tile(png, row, 0)[-20:].mean() < 20


def test_the_front_is_at_the_top_and_the_patients_left_on_the_right_of_axial_slices():
    volume = torch.zeros(20, 20, 20)
    volume[:, :5, 15:] = 1.0  # front, left
    axial = tile(trajectory_figure([volume], [volume], [0.0]), 0, 0)
    assert axial[5:25, -25:-5].mean() > 200
    assert axial[-25:, :25].mean() < 20


def test_real_and_generated_stand_in_alternating_rows_and_a_missing_scan_is_empty():
    png = trajectory_figure([torch.zeros(8, 8, 8), torch.ones(8, 8, 8)], [torch.ones(8, 8, 8), None], [0.0, 2.5])
    middle = (slice(55, 70), slice(55, 70))
    assert tile(png, 2, 0)[middle].mean() == 255
    assert tile(png, 3, 0)[middle].mean() == 0
    assert 225 < tile(png, 2, 1)[middle].mean() < 250
    assert tile(png, 3, 1)[middle].mean() == 255


def test_slices_keep_their_proportions():
    png = trajectory_figure([torch.full((10, 20, 20), 0.5)], [None], [0.0], spacing=(1.0, 1.0, 1.0))
    grey = tile(png, 3, 0)
    assert (grey[:, TILE // 2] < 200).sum() == pytest.approx(TILE / 2, abs=2)
    assert (grey[TILE // 2] < 200).sum() == TILE


def test_the_close_up_goes_where_the_lung_changes():
    before, after = np.zeros((6, 20, 30)), np.zeros((6, 20, 30))
    after[3, 4:7, 21:24] = 1.0
    after[3, 15:, :5] = 1.0  # outside the lung
    lung = torch.zeros(6, 20, 30, dtype=torch.bool)
    lung[1:6, 2:12, 5:28] = True
    view = choose_view([before, after], lung)
    (top, left), (height, width) = view.corner, view.extent
    assert top <= 4 < 7 <= top + height
    assert left <= 21 < 24 <= left + width


def test_the_same_volumes_give_the_same_bytes():
    volume = torch.rand(8, 9, 10, generator=torch.Generator().manual_seed(0))
    assert trajectory_figure([volume], [None], [1.0]) == trajectory_figure([volume], [None], [1.0])


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="0 real"):
        trajectory_figure([], [], [])


def test_the_sagittal_plane_goes_through_the_lung_that_changes_more():
    lung = torch.zeros(6, 20, 30, dtype=torch.bool)
    lung[1:5, 5:15, 3:10] = True
    lung[1:5, 5:15, 20:27] = True
    before = np.zeros((6, 20, 30))
    for x in (5, 23):
        after = before.copy()
        after[2, 8:11, x] = 1.0
        assert abs(choose_view([before, after], lung).centre[2] - x) <= 1
