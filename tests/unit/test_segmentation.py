"""The threshold mask finds the lungs of a synthetic chest, without its trachea, and nothing where there is no lung."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fourdvq.data.volume import Volume
from fourdvq.errors import VolumeError
from fourdvq.preprocessing.segmentation import LungSides, lung_sides, provided_mask, threshold_mask
from synthetic_lungs import chest


@pytest.fixture(scope="module")
def scan_and_truth() -> tuple[Volume, np.ndarray]:
    scan, mask = chest((75, 96, 96))
    return scan, mask.hu > 0


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_the_mask_is_the_lungs_and_not_the_trachea(scan_and_truth):
    scan, truth = scan_and_truth
    found = threshold_mask(scan)
    assert overlap(found, truth) > 0.97
    y, x = scan.hu.shape[1] // 2, scan.hu.shape[2] // 2
    assert scan.hu[65, y - 5, x] < -900  # the trachea is there
    assert not found[50:, y - 5, x].any()


def test_a_trachea_that_opens_into_the_lung_does_not_take_the_lung_with_it(scan_and_truth):
    scan, truth = scan_and_truth
    hu = np.array(scan.hu)
    y, x = scan.hu.shape[1] // 2 - 5, scan.hu.shape[2] // 2
    hu[42:45, y - 1 : y + 2, x - 20 : x + 20] = -990  # both main bronchi
    found = threshold_mask(replace(scan, hu=hu))
    assert overlap(found, truth) > 0.96
    assert not found[50:, y, x].any()


def test_small_gas_and_no_gas_give_an_empty_mask():
    hu = np.full((40, 48, 48), -1000, dtype=np.int16)
    z, y, x = np.meshgrid(*[np.arange(n) - n / 2 for n in hu.shape], indexing="ij")
    hu[(y / 18) ** 2 + (x / 22) ** 2 < 1] = 40
    scan = Volume(hu, (5.0, 5.0, 5.0))
    assert not threshold_mask(scan).any()
    hu[z**2 + y**2 + x**2 < 6**2] = -980  # 113 ml
    assert not threshold_mask(scan).any()


def test_left_and_right_are_split_where_the_profile_dips(scan_and_truth):
    scan, truth = scan_and_truth
    sides = lung_sides(truth, scan.spacing)
    middle = truth.shape[2] // 2
    assert sides.two
    assert sides.right_ml == pytest.approx(truth[:, :, :middle].sum() * scan.voxel_ml, rel=1e-6)
    assert sides.left_ml == pytest.approx(truth[:, :, middle:].sum() * scan.voxel_ml, rel=1e-6)
    one = truth.copy()
    one[:, :, middle:] = False
    assert not lung_sides(one, scan.spacing).two
    assert lung_sides(np.zeros_like(one), scan.spacing) == LungSides(0.0, 0.0, two=False)


def test_a_provided_mask_must_be_there_and_on_the_scans_grid(scan_and_truth):
    scan, truth = scan_and_truth
    given = Volume(truth.astype(np.uint8), scan.spacing, scan.origin)
    np.testing.assert_array_equal(provided_mask(scan, given), truth)
    for wrong in (None, replace(given, origin=(0.0, 0.0, 0.0))):
        with pytest.raises(VolumeError, match="E_MASK"):
            provided_mask(scan, wrong)
