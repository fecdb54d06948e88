"""Masks of real public CT: found by thresholds, against the given ones; given ones, judged where the field is small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from fourdvq.data.volume import Volume, read_mask, read_volume
from fourdvq.preprocessing.grades import scan_codes
from fourdvq.preprocessing.profile import LimitsSpec, SegmentationSpec
from fourdvq.preprocessing.quality import scan_facts
from fourdvq.preprocessing.segmentation import field_cuts, threshold_mask

AIRWAY = 2  # type of a label of lm-64: value = region + 256 x type


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
