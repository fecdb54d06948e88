"""Masks of real public CT: found by thresholds, against the given ones; given ones, judged where the field is small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from fourdvq.data.volume import Volume, read_mask, read_volume, to_image
from fourdvq.preprocessing.grades import scan_codes
from fourdvq.preprocessing.profile import LimitsSpec, Profile, ProfileName, SegmentationSpec
from fourdvq.preprocessing.quality import scan_facts
from fourdvq.preprocessing.segmentation import field_cuts, lung_sides, provided_mask, threshold_mask
from fourdvq.preprocessing.target import on_target_grid

AIRWAY = 2  # type of a label of lm-64: value = region + 256 x type
RIGHT, LEFT = (12, 13, 14), (9, 10, 11)  # its regions: thirds of each lung
TURNED_MM = 3.0
PROFILE = Profile(ProfileName("test"))


@pytest.fixture(scope="module")
def chest(real_data) -> tuple[Volume, np.ndarray]:
    folder = real_data / "cip"
    return read_volume(folder / "ct-64.nrrd"), read_mask(folder / "wholeLung-64.nrrd").hu > 0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_the_profiles_threshold_agrees_with_the_given_mask_and_leaves_the_airway_out(chest, real_data):
    scan, given = chest
    found = threshold_mask(scan, air_hu=SegmentationSpec().air_hu)
    assert dice(found, given) >= 0.98
    airway = sitk.GetArrayFromImage(sitk.ReadImage(str(real_data / "cip" / "lm-64.nrrd"))) // 256 == AIRWAY
    assert airway.sum() * scan.voxel_ml > 38
    assert (found & airway).sum() * scan.voxel_ml <= 5


@pytest.mark.parametrize("air_hu", [-500.0, -450.0, -360.0, -320.0])
def test_the_choice_of_the_threshold_hardly_matters(chest, air_hu):
    scan, given = chest
    assert dice(threshold_mask(scan, air_hu=air_hu), given) >= 0.97


@pytest.mark.parametrize(
    "degrees", [(0, 0, 0), (0, 12, 0), (0, 18, 0), (0, 22, 0), (10, 15, 20), (0, 0, 25), (25, 0, 0)]
)
def test_right_and_left_are_those_of_the_labels_however_the_grid_is_turned(chest, real_data, degrees):
    scan, given = chest
    regions = sitk.GetArrayFromImage(sitk.ReadImage(str(real_data / "cip" / "lm-64.nrrd"))) % 256
    right, left = (on_turned_grid(scan, np.isin(regions, side), degrees) for side in (RIGHT, LEFT))
    found = lung_sides(on_turned_grid(scan, given, degrees), (TURNED_MM,) * 3)
    assert found.two
    true_ml = [side.sum() * TURNED_MM**3 / 1000 for side in (right, left)]
    assert (found.right_ml, found.left_ml) == pytest.approx(true_ml, rel=0.02)
    assert not lung_sides(right, (TURNED_MM,) * 3).two
    assert not lung_sides(left, (TURNED_MM,) * 3).two


def on_turned_grid(scan: Volume, mask: np.ndarray, degrees: tuple[int, int, int]) -> np.ndarray:
    """The mask on a grid around the same middle whose axes are turned about x, y and z."""
    image = to_image(replace(scan, hu=mask.astype(np.int16)))
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*np.deg2rad(degrees).tolist())
    middle = np.array(image.TransformContinuousIndexToPhysicalPoint([n / 2 for n in image.GetSize()]))
    direction = np.array(turn.GetMatrix()).reshape(3, 3)
    size = 140
    origin = middle - direction @ np.full(3, (size - 1) * TURNED_MM / 2)
    grid = ([size] * 3, sitk.Transform(), sitk.sitkLinear, origin.tolist(), [TURNED_MM] * 3, turn.GetMatrix())
    return sitk.GetArrayFromImage(sitk.Resample(image, *grid, 0.0, sitk.sitkFloat32)) >= 0.5


def test_two_stray_voxels_on_the_table_leave_the_grid_of_a_given_mask_as_it_is(chest):
    scan, given = chest
    wide = [(0, 0), *[((500 - n * s) / s / 2,) * 2 for n, s in zip(given.shape[1:], scan.spacing[1:], strict=True)]]
    around = np.array(wide).astype(int)
    field = Volume(np.pad(scan.hu, around, constant_values=-1000), scan.spacing)
    mask = np.pad(given, around)
    stray = mask.copy()
    stray[5, -4, [30, 31]] = True
    grids = [
        on_target_grid(field, provided_mask(field, Volume(m.astype(np.uint8), scan.spacing)), PROFILE).grid
        for m in (mask, stray)
    ]
    assert grids[0] == grids[1]


def test_the_whole_chest_is_not_cut_and_every_half_of_it_is(chest):
    scan, given = chest
    assert field_cuts(scan, given) == field_cuts(scan, threshold_mask(scan)) == ()
    depth, height, _ = scan.hu.shape
    halves = {
        "bottom": np.s_[depth // 2 :],
        "top": np.s_[: depth // 2],
        "front": np.s_[:, height // 2 :],
        "back": np.s_[:, : height // 2],
    }
    for side, part in halves.items():
        half = Volume(np.ascontiguousarray(scan.hu[part]), scan.spacing)
        assert side in field_cuts(half, np.ascontiguousarray(given[part]))


def cropped(scan: Volume, given: np.ndarray, voxels: int) -> tuple[Volume, np.ndarray]:
    """The chest without its outer voxels to the front, back and sides."""
    part = np.s_[:, voxels:-voxels, voxels:-voxels]
    return replace(scan, hu=np.ascontiguousarray(scan.hu[part])), np.ascontiguousarray(given[part])


@pytest.mark.parametrize("voxels", [1, 2])
def test_a_body_that_touches_the_edge_of_the_field_does_not_put_a_good_mask_in_doubt(chest, voxels):
    scan, given = cropped(*chest, voxels)
    facts = scan_facts(scan, given, thickness_mm=1.0)
    assert facts.leak_percent == 0.0
    assert scan_codes(facts, LimitsSpec(), method="provided") == []


@pytest.mark.parametrize("voxels", [3, 4, 5, 6, 8])
def test_a_cut_lung_is_refused_for_its_cut_and_not_for_its_intercept(chest, voxels):
    scan, given = cropped(*chest, voxels)
    codes = scan_codes(scan_facts(scan, given, thickness_mm=1.0), LimitsSpec(), method="provided")
    assert codes == ["E_FOV"]


def test_a_wrong_intercept_is_seen_where_the_field_cuts_the_lung_too(chest):
    scan, given = cropped(*chest, 3)
    wrong = replace(scan, hu=scan.hu + np.int16(60))
    assert "E_HU" in scan_codes(scan_facts(wrong, given, thickness_mm=1.0), LimitsSpec(), method="provided")


@pytest.mark.parametrize("radius_mm", [40.0, 48.0, 56.0])
def test_gas_of_the_stomach_is_not_taken_for_a_lung_where_the_two_lungs_touch(chest, radius_mm):
    """The lungs of ct-64 are one space after thresholds, so a second large space is not the other lung."""
    scan, given = with_abdomen(*chest)
    z, y, x = np.meshgrid(*[np.arange(n) * s for n, s in zip(scan.hu.shape, scan.spacing, strict=True)], indexing="ij")
    at = np.argwhere(given[:, :, given.shape[2] // 2 :]).mean(axis=0) * scan.spacing
    left_mm = at[2] + given.shape[2] // 2 * scan.spacing[2]
    gas = (z - 110 + radius_mm) ** 2 + (y - at[1]) ** 2 + (x - left_mm) ** 2 < radius_mm**2
    gas &= ~ndimage.binary_dilation(given, iterations=2)
    assert gas.sum() * scan.voxel_ml > 200
    found = threshold_mask(replace(scan, hu=np.where(gas, np.int16(-980), scan.hu)))
    assert not (found & gas).any()
    assert dice(found, given) > 0.97


def with_abdomen(scan: Volume, given: np.ndarray, mm: float = 100.0) -> tuple[Volume, np.ndarray]:
    """The chest with its lowest body outline of soft tissue going on downwards."""
    more = round(mm / scan.spacing[0])
    body = np.stack([ndimage.binary_fill_holes(scan.hu[2] > -400)] * more)
    below = np.where(body, np.int16(40), np.int16(-1000))
    return replace(scan, hu=np.concatenate([below, scan.hu])), np.pad(given, ((more, 0), (0, 0), (0, 0)))


def test_a_crop_that_opens_the_lung_keeps_it_and_says_where(real_data):
    """The public follow-up shows one lung up to the left edge of the image; a closed body was never in view."""
    folder = real_data / "elastix"
    scan = read_volume(folder / "3DCT_lung_followup_on_baseline_grid.mha")
    given = read_mask(folder / "3DCT_lung_baseline_mask.mha").hu > 0
    found = threshold_mask(scan)
    assert dice(found, given) > 0.95
    assert field_cuts(scan, found) == field_cuts(scan, given) == ("left",)


def test_the_pelvis_keeps_less_gas_than_a_lung_would_be(real_data):
    scan = read_volume(real_data / "ts" / "example_ct.nii.gz")
    assert threshold_mask(scan).sum() * scan.voxel_ml < 1000
