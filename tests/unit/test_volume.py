"""Image files become Hounsfield volumes in LPS, or a refusal with a code."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fourdvq.data.limits import ReaderLimits
from fourdvq.data.volume import Volume, from_image, read_mask, read_volume, require_same_grid, write_nifti
from fourdvq.data.volume import to_image as as_image
from fourdvq.errors import VolumeError
from synthetic_lungs import chest


@pytest.fixture(scope="module")
def scan() -> Volume:
    return chest((12, 20, 24))[0]


def refusal(path: Path, **limits) -> str:
    with pytest.raises(VolumeError) as caught:
        read_volume(path, readers=ReaderLimits(**limits))
    assert caught.value.where == str(path)
    return caught.value.code


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd", "scan van José (1).nii.gz"])
def test_a_volume_comes_back_as_it_was_written(scan, tmp_path, name):
    path = tmp_path / name
    if ".nii" in name:
        write_nifti(scan, path)
    else:
        sitk.WriteImage(as_image(scan), str(path))
    back = read_volume(path)
    np.testing.assert_array_equal(back.hu, scan.hu)
    np.testing.assert_allclose(back.spacing, scan.spacing, rtol=1e-6)
    np.testing.assert_allclose(back.origin, scan.origin, rtol=1e-6)
    assert back.direction == scan.direction
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_every_orientation_is_turned_to_lps_without_moving_the_patient(scan, tmp_path):
    mark = np.array(scan.hu)
    mark[2, 3, 4] = 3000
    image = as_image(Volume(mark, scan.spacing, scan.origin))
    for orientation in ("RAS", "LPI", "SAR", "PIR"):
        path = tmp_path / f"{orientation}.nii.gz"
        sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(path))
        back = read_volume(path)
        assert tuple(np.argwhere(back.hu == 3000)[0]) == (2, 3, 4)
        np.testing.assert_allclose(back.origin, scan.origin, atol=1e-3)


def test_padding_below_air_is_clamped(scan, tmp_path):
    values = scan.hu.astype(np.float32)
    values[0] = -3024
    sitk.WriteImage(as_image(Volume(values, scan.spacing)), str(tmp_path / "a.nii.gz"))
    back = read_volume(tmp_path / "a.nii.gz")
    assert back.hu.dtype == np.int16
    assert back.hu.min() == -1024


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd"])
def test_a_file_that_was_cut_short_is_refused(scan, tmp_path, name):
    path = tmp_path / name
    sitk.WriteImage(as_image(scan), str(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(path) == "E_CORRUPT"


def test_an_empty_file_and_a_text_file_are_refused(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"")
    (tmp_path / "b.nii").write_text("not an image, but long enough to hold a header " * 20)
    assert refusal(tmp_path / "a.nii.gz") == "E_CORRUPT"
    assert refusal(tmp_path / "b.nii") == "E_CORRUPT"


def test_a_missing_file_an_archive_and_another_kind_of_file_are_refused(tmp_path):
    assert refusal(tmp_path / "gone.nii.gz") == "E_FILE"
    (tmp_path / "scans.zip").write_bytes(b"PK")
    assert refusal(tmp_path / "scans.zip") == "E_ARCHIVE"
    (tmp_path / "scan.png").write_bytes(b"\x89PNG")
    assert refusal(tmp_path / "scan.png") == "E_NIFTI"


def test_windowed_and_8_bit_and_4d_files_are_refused(scan, tmp_path):
    path = tmp_path / "a.nii.gz"
    window = np.clip((scan.hu + 1000) / 1400 * 255, 0, 255)
    for values in (window.astype(np.uint8), window.astype(np.int16), np.rint(window / 4).astype(np.int16) * 40 - 1000):
        sitk.WriteImage(as_image(Volume(values, scan.spacing)), str(path))
        assert refusal(path) == "E_NIFTI"
    sitk.WriteImage(sitk.JoinSeries([as_image(scan), as_image(scan)]), str(path))
    assert refusal(path) == "E_NIFTI"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_numbers_are_refused(scan, tmp_path, bad):
    values = scan.hu.astype(np.float32)
    values[1, 2, 3] = bad
    sitk.WriteImage(as_image(Volume(values, scan.spacing)), str(tmp_path / "a.nii.gz"))
    assert refusal(tmp_path / "a.nii.gz") == "E_NAN"


def test_a_header_that_announces_too_much_is_refused_before_the_pixels_are_read(scan, tmp_path):
    write_nifti(scan, tmp_path / "a.nii.gz")
    assert refusal(tmp_path / "a.nii.gz", max_voxels=scan.hu.size - 1) == "E_BOMB"


def test_impossible_spacing_is_refused(scan, tmp_path):
    write_nifti(Volume(scan.hu, (2.0, 0.01, 1.0)), tmp_path / "a.nii.gz")
    assert refusal(tmp_path / "a.nii.gz") == "E_GEOMETRY"


def edit_header(path: Path, form: str, at: int, *values) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into("<" + form, raw, at, *values)
    path.write_bytes(raw)


def test_nifti_forms_must_agree_unless_one_is_unset(scan, tmp_path):
    path = tmp_path / "a.nii"
    write_nifti(scan, path)
    read_volume(path)
    x_offset_of_sform = 292
    edit_header(path, "f", x_offset_of_sform, struct.unpack_from("<f", path.read_bytes(), x_offset_of_sform)[0] + 0.05)
    read_volume(path)
    edit_header(path, "f", x_offset_of_sform, 500.0)
    assert refusal(path) == "E_NIFTI"
    edit_header(path, "h", 252, 0)  # qform_code 0: the sform alone counts, as in the TotalSegmentator example
    assert read_volume(path).origin[0] == pytest.approx(-500.0)
    edit_header(path, "h", 254, 0)
    assert refusal(path) == "E_NIFTI"


@pytest.mark.parametrize(("factor", "code"), [(1.0001, ""), (1.02, "E_NIFTI"), (0.0, "E_NIFTI"), (np.nan, "E_NIFTI")])
def test_an_sform_alone_must_agree_with_the_voxel_sizes(scan, tmp_path, factor, code):
    """ITK takes the directions of the one and the lengths of the other, and says so to the terminal alone."""
    path = tmp_path / "a.nii"
    write_nifti(scan, path)
    edit_header(path, "h", 252, 0)
    edit_header(path, "f", 280, factor * struct.unpack_from("<f", path.read_bytes(), 280)[0])
    if code:
        assert refusal(path) == code
    else:
        np.testing.assert_array_equal(read_volume(path).hu, scan.hu)


def test_written_nifti_has_blank_text_fields_and_equal_bytes_each_time(scan, tmp_path):
    image = as_image(scan)
    image.SetMetaData("ITK_FileNotes", "CANARY NAME")
    write_nifti(from_image(image), tmp_path / "a.nii")
    raw = (tmp_path / "a.nii").read_bytes()
    assert raw[148:252] == bytes(104)  # descrip and aux_file
    assert raw[14:32] == bytes(18)  # db_name
    write_nifti(scan, tmp_path / "b.nii.gz")
    write_nifti(scan, tmp_path / "c.nii.gz")
    assert (tmp_path / "b.nii.gz").read_bytes() == (tmp_path / "c.nii.gz").read_bytes()


def test_a_mask_is_read_as_zero_and_one_and_must_lie_on_its_scan(tmp_path):
    scan, mask = chest((12, 20, 24))
    write_nifti(Volume(mask.hu * 7, mask.spacing, mask.origin), tmp_path / "m_lung.nii.gz")
    back = read_mask(tmp_path / "m_lung.nii.gz")
    np.testing.assert_array_equal(back.hu, mask.hu)
    require_same_grid(back, scan, where="m")
    moved = Volume(mask.hu, mask.spacing, (0.0, 0.0, 0.0))
    smaller = Volume(mask.hu[1:], mask.spacing, mask.origin)
    for wrong in (moved, smaller):
        with pytest.raises(VolumeError, match="E_MASK"):
            require_same_grid(wrong, scan, where="m")
    write_nifti(Volume(mask.hu * 0, mask.spacing, mask.origin), tmp_path / "empty.nii.gz")
    with pytest.raises(VolumeError, match="E_MASK"):
        read_mask(tmp_path / "empty.nii.gz")
