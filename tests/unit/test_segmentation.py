"""The threshold mask finds the lungs of a synthetic chest, without its trachea, and nothing where there is no lung."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from fourdvq.data import phantom
from fourdvq.data.volume import Volume
from fourdvq.errors import VolumeError
from fourdvq.preprocessing.profile import SegmentationSpec
from fourdvq.preprocessing.segmentation import (
    LungSides,
    field_cuts,
    left_out,
    lung_sides,
    provided_mask,
    segmenter,
    threshold_mask,
)
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


@pytest.fixture(scope="module")
def scan_with_gas() -> tuple[Volume, np.ndarray, np.ndarray]:
    """A chest with 100 mm of abdomen, its lungs, and 700 ml of gas under the left one."""
    scan, mask = chest((75, 96, 96))
    below = round(100 / scan.spacing[0])
    hu = np.pad(scan.hu, ((below, 0), (0, 0), (0, 0)), mode="edge")
    lung = np.pad(mask.hu > 0, ((below, 0), (0, 0), (0, 0)))
    place = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(hu.shape, scan.spacing, strict=True)]
    z, y, x = np.meshgrid(*place, indexing="ij")
    dome = place[0][np.flatnonzero(lung.any(axis=(1, 2)))[0]]
    gas = (z - dome + 45) ** 2 + y**2 + (x - 80) ** 2 < 55**2
    gas &= ~ndimage.binary_dilation(lung, iterations=2)
    hu[gas] = -980
    return replace(scan, hu=hu), lung, gas


def is_left(mask: np.ndarray) -> np.ndarray:
    return mask & (np.arange(mask.shape[2]) >= mask.shape[2] // 2)


def test_gas_under_the_diaphragm_is_not_the_other_lung_of_a_patient_who_has_one(scan_with_gas):
    scan, lung, gas = scan_with_gas
    assert gas.sum() * scan.voxel_ml > 500
    found = threshold_mask(replace(scan, hu=np.where(is_left(lung), np.int16(30), scan.hu)))
    assert not (found & gas).any()
    assert overlap(found, lung & ~is_left(lung)) > 0.97
    assert not lung_sides(found, scan.spacing).two


@pytest.mark.parametrize("share", [0.0, 0.35, 0.6])
def test_a_lung_above_a_raised_diaphragm_is_kept_and_the_gas_below_it_is_not(scan_with_gas, share):
    scan, lung, gas = scan_with_gas
    slices = np.flatnonzero(lung.any(axis=(1, 2)))
    up_to = slices[0] + round(share * slices.size)
    raised = is_left(lung) & (np.arange(len(lung))[:, None, None] < up_to)
    found = threshold_mask(replace(scan, hu=np.where(raised, np.int16(40), scan.hu)))
    assert not (found & gas).any()
    assert overlap(found, lung & ~raised) > 0.97


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


@pytest.mark.parametrize("plane", [(0, 2), (1, 2)])
@pytest.mark.parametrize("degrees", [-30, -20, 20, 30])
def test_a_tilted_or_turned_patient_has_the_same_two_lungs(scan_and_truth, plane, degrees):
    scan, truth = scan_and_truth
    upright = lung_sides(truth, scan.spacing)
    turned = lung_sides(ndimage.rotate(truth, degrees, plane, order=0), scan.spacing)  # voxels of 4 mm on all axes
    assert turned.two
    assert (turned.right_ml, turned.left_ml) == pytest.approx((upright.right_ml, upright.left_ml), rel=0.02)
    one = truth & (np.arange(truth.shape[2]) < truth.shape[2] // 2)
    assert not lung_sides(ndimage.rotate(one, degrees, plane, order=0), scan.spacing).two


def test_a_provided_mask_must_be_there_and_on_the_scans_grid(scan_and_truth):
    scan, truth = scan_and_truth
    given = Volume(truth.astype(np.uint8), scan.spacing, scan.origin)
    np.testing.assert_array_equal(provided_mask(scan, given), truth)
    for wrong in (None, replace(given, origin=(0.0, 0.0, 0.0))):
        with pytest.raises(VolumeError, match="E_MASK"):
            provided_mask(scan, wrong)


def test_stray_voxels_are_left_out_of_a_provided_mask_and_pieces_of_lung_are_kept(scan_and_truth):
    scan, truth = scan_and_truth
    piece, stray = np.zeros_like(truth), np.zeros_like(truth)
    piece[38:42, 46:50, 46:50] = True  # between the lungs
    stray[2, 90, [5, 6]] = True
    truth = truth & ~ndimage.binary_dilation(piece, iterations=3)
    given = Volume((truth | piece | stray).astype(np.uint8), scan.spacing, scan.origin)
    found = provided_mask(scan, given)
    np.testing.assert_array_equal(found, truth | piece)
    assert left_out(given, found)
    assert not left_out(replace(given, hu=found.astype(np.uint8)), found)
    none = replace(given, hu=np.zeros_like(given.hu))
    assert not provided_mask(scan, none).any()


def test_the_profiles_threshold_is_the_one_that_is_used(scan_and_truth):
    scan, _ = scan_and_truth
    loose, tight = (segmenter(SegmentationSpec(air_hu=hu))(scan, None) for hu in (-320.0, -700.0))
    np.testing.assert_array_equal(loose, threshold_mask(scan, air_hu=-320.0))
    assert loose.sum() > tight.sum() > 0
    assert not (tight & ~loose).sum() > 0.01 * tight.sum()


@pytest.mark.parametrize("extent", [0.25, 0.5])
def test_fibrosis_under_the_pleura_stays_in_the_mask(extent):
    """Most patients of the phantom have a quarter of the lung ill, and hardly one more than half."""
    patient = phantom.draw_patients(1, 7, size=(48, 96, 96))[0]
    scan = phantom.scan(patient, replace(patient.visits[-1], extent=extent))
    assert overlap(threshold_mask(scan.volume), scan.lung) >= 0.95


# --- the field of view -------------------------------------------------------------------------------------------


def behind_circle(scan: Volume, radius_mm: float, right_mm: float = 0.0) -> tuple[Volume, np.ndarray]:
    """The scan with padding outside a circle whose middle lies `right_mm` to the patient's right, and the padding."""
    _, height, width = scan.hu.shape
    y = (np.arange(height) - (height - 1) / 2) * scan.spacing[1]
    x = (np.arange(width) - (width - 1) / 2) * scan.spacing[2] + right_mm
    outside = np.add.outer(y**2, x**2) > radius_mm**2
    hu = scan.hu.copy()
    hu[:, outside] = -1024  # -2048 and -3024 come as this: readers clamp
    return replace(scan, hu=hu), np.broadcast_to(outside, hu.shape)


def cropped(volume: np.ndarray, side: str) -> np.ndarray:
    depth, height, width = volume.shape
    cuts: dict[str, slice | tuple[slice, ...]] = {
        "bottom": np.s_[depth // 4 :],
        "top": np.s_[: 3 * depth // 4],
        "front": np.s_[:, height // 2 - 10 :],
        "back": np.s_[:, : height // 2 + 10],
        "right": np.s_[:, :, width // 2 - 24 :],
        "left": np.s_[:, :, : width // 2 + 24],
    }
    return np.ascontiguousarray(volume[cuts[side]])


def test_a_whole_chest_is_not_cut_with_or_without_a_circle_around_it(scan_and_truth):
    scan, truth = scan_and_truth
    found = threshold_mask(scan)
    for radius in (None, 185.0, 155.0):  # the body reaches 165 mm to the sides, the lungs 136
        seen = scan if radius is None else behind_circle(scan, radius)[0]
        mask = threshold_mask(seen)
        assert field_cuts(seen, mask) == field_cuts(seen, truth) == ()
        assert overlap(mask, found) > 0.995


@pytest.mark.parametrize("side", ["bottom", "top", "front", "back", "right", "left"])
def test_a_lung_that_the_image_cuts_is_found_and_its_side_named(scan_and_truth, side):
    scan, truth = scan_and_truth
    seen, lung = replace(scan, hu=cropped(scan.hu, side)), cropped(truth, side)
    assert field_cuts(seen, lung) == (side,)
    mask = threshold_mask(seen)
    assert side in field_cuts(seen, mask)
    assert overlap(mask, lung) > 0.95


@pytest.mark.parametrize(("right_mm", "side"), [(35.0, "left"), (-35.0, "right")])
def test_a_lung_that_the_reconstruction_circle_cuts_stays_in_the_mask_and_its_side_is_named(
    scan_and_truth, right_mm, side
):
    scan, truth = scan_and_truth
    seen, outside = behind_circle(scan, 155.0, right_mm)
    lost_ml = float((truth & outside).sum()) * scan.voxel_ml
    assert 20 < lost_ml < 300
    assert field_cuts(seen, truth & ~outside) == (side,)
    mask = threshold_mask(seen)
    assert field_cuts(seen, mask) == (side,)
    assert overlap(mask, truth & ~outside) > 0.96


def test_lung_that_a_mask_lost_at_the_edge_is_noticed_from_the_slices_beside_it(scan_and_truth):
    scan, truth = scan_and_truth
    seen, outside = behind_circle(scan, 155.0, 35.0)
    lung = truth & ~outside
    open_slices = (truth & outside).any(axis=(1, 2))
    left = np.arange(lung.shape[2]) >= lung.shape[2] // 2
    lung[np.ix_(open_slices, np.ones(lung.shape[1], dtype=bool), left)] = False
    assert field_cuts(seen, lung) == ("left",)


def test_an_empty_mask_has_no_cut(scan_and_truth):
    scan, truth = scan_and_truth
    assert field_cuts(scan, np.zeros_like(truth)) == ()
