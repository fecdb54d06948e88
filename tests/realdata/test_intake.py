"""Real public CT goes through the rules that real hospitals get: what breaks them is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from dicom_factory import write_series
from fourdvq.data.burnt_text import has_burnt_text
from fourdvq.data.choice import best_series
from fourdvq.data.dicom import scan_folder
from fourdvq.data.series import load_series
from fourdvq.data.volume import Volume, from_image, read_mask, read_volume, to_image, write_nifti
from fourdvq.preprocessing.pipeline import ScanInput, prepare_patient
from fourdvq.preprocessing.profile import RegistrationSpec, load_profile
from fourdvq.preprocessing.registration.align import overlap, working_pair
from fourdvq.preprocessing.segmentation import lung_sides, threshold_mask

PROFILES = Path(__file__).parents[2] / "configs" / "preprocessing"
PAPER = load_profile(PROFILES / "paper-v1-threshold.yaml")
NAME = "0123456789ab"


def prepared(scans: list[ScanInput], out: Path, profile: str = "paper-v1-threshold"):
    return prepare_patient(scans, load_profile(PROFILES / f"{profile}.yaml"), out, pseudonym=NAME).scans


@pytest.fixture
def pair(real_data, tmp_path) -> list[ScanInput]:
    """The elastix pair; the baseline's mask is brought to the baseline's own coarser grid."""
    folder = real_data / "elastix"
    scan = read_volume(folder / "3DCT_lung_baseline_small.mha")
    mask = sitk.Cast(to_image(read_mask(folder / "3DCT_lung_baseline_mask.mha")), sitk.sitkFloat32)
    moved = sitk.GetArrayFromImage(sitk.Resample(mask, to_image(scan), sitk.Transform(), sitk.sitkLinear, 0.0)) >= 0.5
    write_nifti(Volume(moved.astype(np.uint8), scan.spacing, scan.origin), tmp_path / "base_lung.nii.gz")
    return [
        ScanInput(0, 0, folder / "3DCT_lung_baseline_small.mha", tmp_path / "base_lung.nii.gz"),
        ScanInput(1, 300, folder / "followup_reconstructed.nii.gz", folder / "3DCT_lung_followup_mask.mha"),
    ]


def test_the_public_pair_is_aligned_under_its_own_profile(pair, tmp_path):
    base, follow_up = prepared(pair, tmp_path / "prep", "realdata-test")
    assert base.content_sha256
    assert {"W_MASK_FOV", "W_MASK_ONELUNG", "W_THICK"} <= set(base.codes)
    numbers = follow_up.qc["pair"]
    assert follow_up.grade == "PASS"
    assert numbers["dice"] > 0.97
    assert numbers["ncc"] > 0.90
    assert numbers["fold_percent"] < 0.1
    hu = np.load(tmp_path / "prep" / NAME / "1" / "hu.npy")
    assert hu.shape == (32, 64, 64)


def test_the_public_pair_is_refused_under_the_default_profile(pair, tmp_path):
    assert [s.status for s in prepared(pair, tmp_path)] == ["refused", "refused"]


def test_the_dicom_slab_is_read_in_place_and_refused_for_its_coverage(real_data, tmp_path):
    folder = real_data / "dicom"
    assert scan_folder(folder).skipped == {}
    series = load_series(best_series(folder), None)
    assert series.volume.hu.shape == (16, 512, 512)
    assert series.volume.spacing == pytest.approx((2.5, 0.703125, 0.703125))
    assert series.volume.origin[2] == -132.5
    assert (series.volume.hu.min(), series.volume.hu.max()) == (-1024, 3071)
    assert series.warnings == ("W_CONTRAST",)
    (scan,) = prepared([ScanInput(0, 0, folder, kind="dicom")], tmp_path)
    assert (scan.status, scan.code) == ("refused", "E_FOV")


def test_the_pelvis_is_refused_although_bowel_gas_looks_like_lung(real_data, tmp_path):
    (scan,) = prepared([ScanInput(0, 0, real_data / "ts" / "example_ct.nii.gz")], tmp_path)
    assert (scan.status, scan.code) == ("refused", "E_NOLUNG")
    assert 200 < scan.qc["scan"]["lung_ml"] < 1000


def test_the_threshold_mask_agrees_with_the_given_one(real_data):
    scan = read_volume(real_data / "cip" / "ct-64.nrrd")
    given = read_mask(real_data / "cip" / "wholeLung-64.nrrd").hu > 0
    found = threshold_mask(scan)
    assert 2 * (found & given).sum() / (found.sum() + given.sum()) > 0.98
    regions = sitk.GetArrayFromImage(sitk.ReadImage(str(real_data / "cip" / "lm-64.nrrd"))) % 256
    sides = lung_sides(given, scan.spacing)
    assert sides.left_ml == pytest.approx(np.isin(regions, (9, 10, 11)).sum() * scan.voxel_ml, rel=0.02)
    assert sides.right_ml == pytest.approx(np.isin(regions, (12, 13, 14)).sum() * scan.voxel_ml, rel=0.02)


def test_a_whole_chest_written_as_dicom_passes_the_default_profile(real_data, tmp_path):
    """ct-64 at four times its voxels is a chest of usual size: 316 slices of 1 mm."""
    coarse = to_image(read_volume(real_data / "cip" / "ct-64.nrrd"))
    fine = sitk.Expand(coarse, [4, 4, 4], sitk.sitkLinear)
    write_series(tmp_path / "ct", from_image(fine))
    (scan,) = prepared([ScanInput(0, 0, tmp_path / "ct", kind="dicom")], tmp_path / "prep")
    assert (scan.status, scan.code) == ("review", "V_MASK")
    assert scan.qc["scan"]["lung_ml"] == pytest.approx(4554, rel=0.05)
    assert np.load(tmp_path / "prep" / NAME / "0" / "hu.npy").shape == (96, 256, 256)


def test_the_published_affine_file_has_our_direction(real_data):
    """Points of the baseline go to the follow-up: Dice of the masks rises from .70 to .95, and falls if inverted."""
    folder = real_data / "elastix"
    fixed = read_volume(folder / "3DCT_lung_followup_on_baseline_grid.mha")
    fixed_mask = read_mask(folder / "3DCT_lung_baseline_mask.mha").hu > 0
    moving = read_volume(folder / "followup_reconstructed.nii.gz")
    moving_mask = read_mask(folder / "3DCT_lung_followup_mask.mha").hu > 0
    text = (folder / "transformparameters.3DCT_lung.affine.txt").read_text()
    lines = {line[1:].split()[0]: line.strip("()").split()[1:] for line in text.splitlines() if line.startswith("(")}
    transform = sitk.AffineTransform(3)
    numbers = [float(v) for v in lines["TransformParameters"]]
    transform.SetMatrix(numbers[:9])
    transform.SetTranslation(numbers[9:])
    transform.SetCenter([float(v) for v in lines["CenterOfRotationPoint"]])
    pair = working_pair(fixed, fixed_mask, moving, moving_mask, RegistrationSpec(spacing_mm=2.5))
    unaligned, aligned = overlap(pair, sitk.Transform()), overlap(pair, transform)
    assert unaligned.dice == pytest.approx(0.708, abs=0.01)
    assert aligned.dice == pytest.approx(0.952, abs=0.01)
    assert aligned.ncc == pytest.approx(0.56, abs=0.05)
    assert overlap(pair, transform.GetInverse()).dice < 0.6


def test_real_scans_hold_no_letters(real_data):
    series = load_series(best_series(real_data / "dicom"))
    assert not has_burnt_text(series.volume.hu)
    for path in (real_data / "cip" / "ct-64.nrrd", real_data / "elastix" / "followup_reconstructed.nii.gz"):
        assert not has_burnt_text(from_image(sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkInt16)).hu)
