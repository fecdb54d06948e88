"""The DICOM gate: a good series becomes its volume, and each way of breaking it becomes its code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import SecondaryCaptureImageStorage

from dicom_factory import CANARY_ID, rewrite, write_series
from fourdvq.data.choice import best_series
from fourdvq.data.cohort import load_cohort
from fourdvq.data.dicom import find_series, scan_folder
from fourdvq.data.series import LoadedSeries, SeriesLimits, load_series, read_series
from fourdvq.data.volume import Volume
from fourdvq.errors import VolumeError
from synthetic_lungs import chest


@pytest.fixture(scope="module")
def volume() -> Volume:
    scan, _ = chest((24, 32, 32))
    return Volume(scan.hu, (1.5, 0.7, 0.7), (-80.0, -70.0, -200.0))


def loaded(folder: Path, **limits) -> LoadedSeries:
    return load_series(best_series(folder), SeriesLimits(**limits))


def refusal(folder: Path, **limits) -> str:
    with pytest.raises(VolumeError) as caught:
        loaded(folder, **limits)
    return caught.value.code


def tag(name: str, value, only: int | None = None):
    def edit(i, data):
        if only is None or i == only:
            if value is None:
                delattr(data, name)
            else:
                setattr(data, name, value)

    return edit


def test_a_good_series_becomes_its_volume_whatever_the_names_of_its_files(volume, tmp_path):
    write_series(tmp_path / "a b" / "é", volume)
    found = loaded(tmp_path)
    np.testing.assert_array_equal(found.volume.hu, volume.hu)
    assert found.volume.spacing == pytest.approx(volume.spacing)
    assert found.volume.origin == pytest.approx(volume.origin)
    assert found.warnings == ()
    assert found.thickness_mm == pytest.approx(1.5)


def test_a_feet_first_prone_series_is_turned_to_lps_by_its_orientation(volume, tmp_path):
    def turn(i, data):
        data.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
        data.ImagePositionPatient = [80.0, 70.0, -200.0 + 1.5 * i]
        data.PatientPosition = "FFP"

    write_series(tmp_path, volume, edit=turn)
    found = loaded(tmp_path)
    np.testing.assert_array_equal(found.volume.hu, volume.hu[:, ::-1, ::-1])
    assert found.volume.direction == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert found.warnings == ("W_PRONE",)


def test_one_missing_thin_slice_is_filled_linearly_with_a_warning(volume, tmp_path):
    write_series(tmp_path, volume, leave_out=[9])
    found = loaded(tmp_path)
    expected = volume.hu.astype(float)
    expected[9] = (expected[8] + expected[10]) / 2
    np.testing.assert_allclose(found.volume.hu, expected, atol=0.51)
    assert found.volume.spacing[0] == pytest.approx(1.5)
    assert found.warnings == ("W_FILLED",)


@pytest.mark.parametrize("gone", [[9, 10], [5, 15]])
def test_more_missing_slices_are_refused(volume, tmp_path, gone):
    write_series(tmp_path, volume, leave_out=gone)
    assert refusal(tmp_path) == "E_GAP"


def test_one_missing_slice_is_refused_if_filling_is_off_or_the_series_is_thick(volume, tmp_path):
    write_series(tmp_path / "thin", volume, leave_out=[9])
    assert refusal(tmp_path / "thin", fill_single_gap=False) == "E_GAP"
    write_series(tmp_path / "thick", Volume(volume.hu, (2.5, 0.7, 0.7)), leave_out=[9])
    assert refusal(tmp_path / "thick") == "E_GAP"


def test_a_doubled_slice_with_equal_pixels_is_left_out_with_a_warning(volume, tmp_path):
    write_series(tmp_path, volume)
    write_series(tmp_path, volume, leave_out=set(range(24)) - {4}, prefix="again")
    found = loaded(tmp_path)
    np.testing.assert_array_equal(found.volume.hu, volume.hu)
    assert found.warnings == ("W_DUP",)


def test_two_different_slices_at_one_position_are_refused(volume, tmp_path):
    write_series(tmp_path, volume)
    other = Volume(volume.hu + 5, volume.spacing, volume.origin)
    write_series(tmp_path, other, leave_out=set(range(24)) - {4}, prefix="again")
    assert refusal(tmp_path) == "E_DUP"


def test_uneven_spacing_is_refused(volume, tmp_path):
    def stretch(i, data):
        data.ImagePositionPatient = [-80.0, -70.0, -200.0 + 1.5 * i + (0.4 if i > 12 else 0.0)]

    write_series(tmp_path, volume, edit=stretch)
    assert refusal(tmp_path) == "E_SPACING"


@pytest.mark.parametrize(("spacing", "decimals"), [(0.625, 2), (0.625, 1), (2 / 3, 2), (0.75, 1), (1.25, 1), (0.45, 1)])
def test_positions_rounded_to_two_decimals_or_one_are_even(volume, tmp_path, spacing, decimals):
    def rounded(i, data):
        data.ImagePositionPatient = [-80.0, -70.0, round(-200.0 + spacing * i, decimals)]

    write_series(tmp_path / "whole", volume, edit=rounded)
    found = loaded(tmp_path / "whole")
    np.testing.assert_array_equal(found.volume.hu, volume.hu)
    assert found.volume.spacing[0] * 23 == pytest.approx(spacing * 23, abs=0.1)
    write_series(tmp_path / "gap", volume, edit=rounded, leave_out=[9])
    assert loaded(tmp_path / "gap").warnings == ("W_FILLED",)
    write_series(tmp_path / "gaps", volume, edit=rounded, leave_out=[9, 10, 17])
    assert refusal(tmp_path / "gaps") == "E_GAP"


@pytest.mark.parametrize("shift", [0.12, -0.12])
def test_one_slice_away_from_its_place_is_refused(volume, tmp_path, shift):
    def shifted(i, data):
        data.ImagePositionPatient = [-80.0, -70.0, -200.0 + 1.5 * i + (shift if i == 5 else 0.0)]

    write_series(tmp_path, volume, edit=shifted)
    assert refusal(tmp_path) == "E_SPACING"


def test_steps_within_one_percent_that_add_up_to_more_are_refused(tmp_path):
    """60 steps of 1.000 mm and 60 of 1.0099 mm: slices lie up to 0.15 mm beside an even lattice."""
    scan, _ = chest((121, 12, 12))

    def stretch(i, data):
        data.ImagePositionPatient = [-80.0, -70.0, round(i + 0.0099 * max(0, i - 60), 4)]

    write_series(tmp_path, Volume(scan.hu, (1.0, 0.7, 0.7)), edit=stretch)
    assert refusal(tmp_path) == "E_SPACING"


def test_a_tilted_stack_is_straightened_or_refused(volume, tmp_path):
    """The shear moves slice i by 2 pixels per 8 slices along y; a straight column of the patient must come back."""
    degrees = np.degrees(np.arctan(0.25 * 0.7 / 1.5))
    hu = np.full((24, 32, 32), -1000, dtype=np.int16)
    hu[:, 20, 16] = 400
    hu[:, :6, :6] += np.arange(6 * 36, dtype=np.int16).reshape(6, 6, 6)[0]
    sheared = np.stack([np.roll(axial, -round(0.25 * i), axis=0) for i, axial in enumerate(hu)])

    def tilt(i, data):
        data.ImagePositionPatient = [-80.0, -70.0 + 0.7 * 0.25 * i, -200.0 + 1.5 * i]

    write_series(tmp_path, Volume(sheared, volume.spacing, volume.origin), edit=tilt)
    found = loaded(tmp_path)
    assert "W_TILT" in found.warnings
    assert (found.volume.hu[:, 19:22, 16].max(axis=1) > -400).all()
    assert np.unique(found.volume.hu[:, 10:, 16].argmax(axis=1) + 10).tolist() in ([20], [19, 20], [20, 21])
    assert degrees > 0.5
    assert refusal(tmp_path, shear_tilt=False) == "E_TILT"


def test_slices_shifted_against_each_other_are_refused(volume, tmp_path):
    def shift(i, data):
        data.ImagePositionPatient = [-80.0 + (6.0 if i > 12 else 0.0), -70.0, -200.0 + 1.5 * i]

    write_series(tmp_path, volume, edit=shift)
    assert refusal(tmp_path) == "E_MIXED"


@pytest.mark.parametrize("name", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
@pytest.mark.parametrize("only", [None, 7])
def test_missing_geometry_is_refused_even_in_one_slice(volume, tmp_path, name, only):
    write_series(tmp_path, volume, edit=tag(name, None, only))
    assert refusal(tmp_path) == "E_GEOMETRY"


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
def test_a_missing_rescale_tag_in_one_slice_is_refused(volume, tmp_path, name):
    write_series(tmp_path, volume, edit=tag(name, None, only=3))
    assert refusal(tmp_path) == "E_RESCALE"


def test_each_slice_is_scaled_by_its_own_tags(volume, tmp_path):
    def own_scale(i, data):
        if i % 2:
            data.RescaleSlope, data.RescaleIntercept = 0.5, -1024
            data.PixelData = ((volume.hu[i].astype(np.int32) + 1024) * 2).astype("<u2").tobytes()

    write_series(tmp_path, volume, edit=own_scale)
    np.testing.assert_array_equal(loaded(tmp_path).volume.hu, volume.hu)


@pytest.mark.parametrize("only", [0, 7, None])
def test_a_wrong_intercept_is_refused_in_one_slice_and_in_all(volume, tmp_path, only):
    write_series(tmp_path, volume, edit=tag("RescaleIntercept", 0, only))
    assert refusal(tmp_path) == "E_HU"


@pytest.mark.parametrize("block", [range(2), range(3), range(10, 13), range(8, 16), range(21, 24), range(12)])
@pytest.mark.parametrize(("name", "value"), [("RescaleIntercept", 0), ("RescaleIntercept", -3000), ("RescaleSlope", 3)])
def test_a_wrong_scale_is_refused_in_a_block_of_slices_however_long_and_one_of_its_files_is_named(
    volume, tmp_path, block, name, value
):
    def edit(i, data):
        if i in block:
            setattr(data, name, value)

    files = write_series(tmp_path, volume, edit=edit)
    with pytest.raises(VolumeError) as caught:
        loaded(tmp_path)
    assert caught.value.code == "E_RESCALE"
    named = {str(files[i]) for i in (block if len(block) < 12 else range(24))}
    assert caught.value.where in named


@pytest.mark.parametrize("slope", [lambda i: 0.5 + 0.01 * i, lambda i: 0.5 if i < 12 else 0.8, lambda i: 1 - i % 2 / 2])
def test_scales_that_change_where_the_pixels_follow_them_are_read(volume, tmp_path, slope):
    def own_scale(i, data):
        data.RescaleSlope = round(slope(i), 3)
        stored = (volume.hu[i].astype(np.float64) + 1024) / float(data.RescaleSlope)
        data.PixelData = np.rint(stored).astype("<u2").tobytes()

    write_series(tmp_path, volume, edit=own_scale)
    np.testing.assert_allclose(loaded(tmp_path).volume.hu, volume.hu, atol=1)


def test_a_file_cut_short_is_refused_by_its_name_and_never_dropped(volume, tmp_path):
    files = write_series(tmp_path, volume)
    whole = files[5].read_bytes()
    files[5].write_bytes(whole[: len(whole) - 700])
    with pytest.raises(VolumeError) as caught:
        loaded(tmp_path)
    assert caught.value.code == "E_CORRUPT"
    assert caught.value.where == str(files[5])
    files[5].write_bytes(whole[:400])
    assert refusal(tmp_path) == "E_CORRUPT"


def test_a_file_without_preamble_is_read(volume, tmp_path):
    files = write_series(tmp_path, volume)
    rewrite(files[5], lambda data: None)
    raw = files[5].read_bytes()
    meta_length = 144 + int.from_bytes(raw[140:144], "little")
    files[5].write_bytes(raw[meta_length:])
    np.testing.assert_array_equal(loaded(tmp_path).volume.hu, volume.hu)


def test_a_transfer_syntax_that_cannot_be_read_is_named(volume, tmp_path):
    write_series(tmp_path, volume)
    candidate = find_series(tmp_path)[0]
    from dataclasses import replace

    video = candidate.slices[0]._replace(transfer_syntax="1.2.840.10008.1.2.4.100")
    with pytest.raises(VolumeError, match=r"E_SYNTAX.*1\.2\.840\.10008\.1\.2\.4\.100"):
        read_series(replace(candidate, slices=(video, *candidate.slices[1:])))


def test_burnt_in_text_and_multi_frame_files_are_refused(volume, tmp_path):
    write_series(tmp_path / "a", volume, edit=tag("BurnedInAnnotation", "YES"))
    assert refusal(tmp_path / "a") == "E_BURNED"
    write_series(tmp_path / "b", volume, edit=tag("NumberOfFrames", 2))
    assert refusal(tmp_path / "b") == "E_UNSUPPORTED"


def test_padding_outside_the_reconstruction_circle_becomes_air(volume, tmp_path):
    def pad(i, data):
        pixels = volume.hu[i].astype(np.int32) + 1024
        pixels[0] = -2000 + 1024
        data.PixelRepresentation = 1
        data.PixelData = pixels.astype("<i2").tobytes()

    write_series(tmp_path, volume, edit=pad)
    hu = loaded(tmp_path).volume.hu
    assert (hu[:, 0] == -1024).all()
    np.testing.assert_array_equal(hu[:, 1:], volume.hu[:, 1:])


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (tag("Modality", "CR"), "E_NOTCT"),
        (tag("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), "E_DERIVED"),
        (tag("ImageType", ["DERIVED", "SECONDARY", "MPR"]), "E_DERIVED"),
        (tag("SOPClassUID", SecondaryCaptureImageStorage), "E_DERIVED"),
    ],
)
def test_what_is_no_original_ct_is_skipped_and_counted(volume, tmp_path, edit, code):
    write_series(tmp_path, volume, edit=edit)
    assert scan_folder(tmp_path).skipped == {code: 24}
    assert refusal(tmp_path) == code


def test_empty_folders_archives_and_links_in_a_circle_are_survived(volume, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == "E_EMPTY"
    (tmp_path / "empty" / "ct.zip").write_bytes(b"PK")
    (tmp_path / "empty" / "read me.txt").write_text("hello")
    (tmp_path / "empty" / "nothing.dcm").touch()
    assert refusal(tmp_path / "empty") == "E_ARCHIVE"
    write_series(tmp_path / "ok", volume)
    (tmp_path / "ok" / "loop").symlink_to(tmp_path / "ok")
    np.testing.assert_array_equal(loaded(tmp_path / "ok").volume.hu, volume.hu)


def test_a_series_that_mixes_geometries_is_split_and_the_larger_part_wins(volume, tmp_path):
    write_series(tmp_path, volume, edit=lambda i, d: setattr(d, "ConvolutionKernel", "B30f" if i < 16 else "B31f"))
    found = loaded(tmp_path)
    np.testing.assert_array_equal(found.volume.hu, volume.hu[:16])
    assert found.warnings == ("W_SPLIT",)


def test_the_thin_inspiratory_series_is_chosen(volume, tmp_path):
    def description(text, thickness):
        def edit(i, data):
            data.SeriesDescription, data.SliceThickness = text, thickness

        return edit

    write_series(tmp_path / "1", volume, series="exp", edit=description("Thorax expiratie", 1.5))
    write_series(tmp_path / "2", volume, series="thick", edit=description("Thorax insp", 5.0))
    write_series(tmp_path / "3", volume, series="good", edit=description("Thorax inspiratie", 1.5))
    assert best_series(tmp_path).first.path.parent.name == "3"


def test_a_folder_of_dicom_is_a_cohort_with_days_from_its_dates(volume, tmp_path):
    scans = tmp_path / "ct"
    write_series(scans / "x" / "1", volume, study="one", study_date="20150301")
    second, third, fourth, fifth = (Volume(volume.hu + k, volume.spacing, volume.origin) for k in (1, 2, 3, 4))
    write_series(scans / "x" / "2", second, study="two", study_date="20160229")
    write_series(scans / "y", third, study="three", patient_id="LEU-9", study_date="")
    write_series(scans / "z1", fourth, study="four", patient_id="LEU-10")
    write_series(scans / "z2", fifth, study="five", patient_id="LEU-10", edit=tag("PatientSex", "F"))
    (scans / "x" / "2_lung.nii.gz").touch()
    clinical = tmp_path / "clinical.csv"
    rows = [f"{p},60,M,ever,900,censored" for p in (CANARY_ID, "LEU-9", "LEU-10")]
    clinical.write_text("\n".join(["patient_id,age,sex,smoking,time_days,event", *rows]))
    cohort = load_cohort(clinical, None, scans)
    assert [s.days for s in cohort.scans_of(CANARY_ID)] == [0, 365]
    assert [s.mask_path for s in cohort.scans_of(CANARY_ID)] == [None, scans / "x" / "2_lung.nii.gz"]
    assert [p.patient_id for p in cohort.usable] == [CANARY_ID]
    found = {(f.code, f.patient_id) for f in cohort.findings}
    assert {("E_DATE", "LEU-9"), ("E_IDENTITY", "LEU-10")} <= found
    scan = cohort.scans_of(CANARY_ID)[1]
    assert best_series(scan.path, study_key=scan.study_key).first.path.parent.name == "2"


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize("date", ["", "19491231"])
def test_a_study_without_a_date_that_can_be_may_be_the_first_so_that_its_patient_is_left_out(volume, tmp_path, date):
    for number, day in enumerate((date, "20160301", "20170301")):
        noisy = Volume(volume.hu + number, volume.spacing, volume.origin)
        write_series(tmp_path / "ct" / str(number), noisy, study=str(number), study_date=day)
    clinical = tmp_path / "clinical.csv"
    clinical.write_text(f"patient_id,age,sex,smoking,time_days,event\n{CANARY_ID},60,M,ever,900,censored\n")
    cohort = load_cohort(clinical, None, tmp_path / "ct")
    assert {(f.code, f.scan_id) for f in cohort.findings} == {("E_DATE", "study-1"), ("E_TIME", "")}
    assert cohort.usable == ()
