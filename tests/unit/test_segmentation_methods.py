"""One method masks a whole cohort: no other one's scans are taken over, read together, or made where it fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client_calls import call
from fourdvq.data.datasets import open_prepared
from fourdvq.data.prepared import write_splits
from fourdvq.data.review import approve
from fourdvq.data.volume import Volume, read_mask, write_nifti
from fourdvq.errors import CohortError
from fourdvq.preprocessing.pipeline import PatientResult, ScanInput, prepare_patient, write_manifest
from fourdvq.preprocessing.profile import Profile, SegmentationSpec, load_profile
from r231_cases import two_bands, two_lungs, weights_file
from site_cases import hospital, new_site, tiny_profile

NAMES = ("0123456789ab", "ba9876543210")
TINY = load_profile(Path(__file__).parents[2] / "configs" / "preprocessing" / "tiny.yaml")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A scan, its mask, and the weights of a network that can mask it."""
    folder = tmp_path_factory.mktemp("source")
    scan, lungs = two_lungs(noise=12.0)
    write_nifti(scan, folder / "scan.nii.gz")
    write_nifti(Volume(lungs.astype(np.uint8), scan.spacing, scan.origin), folder / "scan_lung.nii.gz")
    weights_file(folder / "unet_r231.pth", two_bands())
    return folder


def profile_of(method: str, source: Path, **more: object) -> Profile:
    from fourdvq.data.files import file_sha256

    sha256 = file_sha256(source / "unet_r231.pth") if method == "lungmask_r231" else ""
    return replace(TINY, segmentation=SegmentationSpec(method=method, weights_sha256=sha256, **more))  # type: ignore[arg-type]


def prepared(source: Path, out: Path, profile: Profile, name: str = NAMES[0]) -> PatientResult:
    scan = ScanInput(0, 0, source / "scan.nii.gz", source / "scan_lung.nii.gz")
    return prepare_patient([scan], profile, out, pseudonym=name, weights=source / "unet_r231.pth")


def test_all_three_methods_find_the_lungs_and_none_takes_over_the_scans_of_another(source, tmp_path):
    for method in ("provided", "threshold", "lungmask_r231"):
        profile = profile_of(method, source)
        (first,) = prepared(source, tmp_path, profile).scans
        assert not first.reused
        assert first.qc["scan"]["lung_ml"] == pytest.approx(3750, rel=0.05)
        assert ("V_MASK" in first.codes) == (method == "threshold")
        (again,) = prepared(source, tmp_path, profile).scans
        assert again.reused


def test_stray_voxels_of_a_given_mask_are_told_of_and_do_not_widen_the_grid(source, tmp_path):
    profile, made = profile_of("provided", source), {}
    given = read_mask(source / "scan_lung.nii.gz")
    for name, more in (("clean", False), ("stray", True)):
        hu = given.hu.copy()
        hu[0, -1, :2] |= more
        write_nifti(replace(given, hu=hu), tmp_path / f"{name}.nii.gz")
        scan = ScanInput(0, 0, source / "scan.nii.gz", tmp_path / f"{name}.nii.gz")
        (made[name],) = prepare_patient([scan], profile, tmp_path / name, pseudonym=NAMES[0]).scans
    assert ("W_MASK_STRAY" in made["clean"].codes, "W_MASK_STRAY" in made["stray"].codes) == (False, True)
    assert made["clean"].content_sha256 == made["stray"].content_sha256


def test_another_threshold_or_a_coarser_step_is_another_preparation(source, tmp_path):
    for one, other in (
        (profile_of("threshold", source), profile_of("threshold", source, air_hu=-350.0)),
        (profile_of("lungmask_r231", source), profile_of("lungmask_r231", source, step_mm=40.0)),
    ):
        assert one.sha256 != other.sha256
        prepared(source, tmp_path, one)
        assert not prepared(source, tmp_path, other).scans[0].reused


def test_training_reads_no_cohort_that_two_methods_made(source, tmp_path):
    for name, method in zip(NAMES, ("provided", "threshold"), strict=True):
        prepared(source, tmp_path, profile_of(method, source), name)
    write_manifest(tmp_path)
    write_splits(tmp_path, dict.fromkeys(NAMES, "train"))
    assert approve(tmp_path, None, reviewer="test", time="2026-01-01T00:00:00Z") == 2
    with pytest.raises(CohortError, match=r"E_PROFILE.*2 profiles"):
        open_prepared(tmp_path)
    prepared(source, tmp_path, profile_of("provided", source), NAMES[1])
    write_manifest(tmp_path)
    assert [p.pseudonym for p in open_prepared(tmp_path).patients] == [NAMES[0]]  # the other decision has lapsed


def test_where_the_network_sees_no_lung_the_scan_is_refused_and_thresholds_do_not_step_in(source, tmp_path):
    blind = {name: torch.zeros_like(t) for name, t in two_bands().items()}
    for name, tensor in blind.items():
        if name.endswith("running_var"):
            tensor.fill_(1.0)
    blind["last.bias"][0] = 1.0
    sha256 = weights_file(tmp_path / "blind.pth", blind)
    profile = replace(TINY, segmentation=SegmentationSpec(method="lungmask_r231", weights_sha256=sha256))
    scan = ScanInput(0, 0, source / "scan.nii.gz", source / "scan_lung.nii.gz")
    (found,) = prepare_patient(
        [scan], profile, tmp_path / "prep", pseudonym=NAMES[0], weights=tmp_path / "blind.pth"
    ).scans
    assert (found.status, found.code) == ("refused", "E_NOLUNG")
    assert found.qc["scan"]["lung_ml"] == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_preprocess_without_the_weights_stops_before_any_scan(tmp_path, workers):
    network = {"method": "lungmask_r231", "weights_sha256": "a" * 64}
    data = hospital(tmp_path / "data", patients=("LEU-1", "LEU-2"), scans=1)
    site = new_site(tmp_path / "site", data, profile={**tiny_profile(), "segmentation": network})
    before = sorted(p for p in (site / "prep").rglob("*"))
    code, error, _ = call(site, "preprocess", "--workers", workers)
    assert (code, error["code"]) == (1, "E_WEIGHTS")
    assert "fetch-weights" in error["fix"]
    assert sorted(p for p in (site / "prep").rglob("*")) == before
