"""The table of bad inputs, row by row: a good series or image is broken one way, and the way has its code.

Rows that need no more than one tag are in test_series.py, those of tables in test_cohort.py, of masks and grades in
test_pipeline_quality.py.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.uid import JPEG2000Lossless, MediaStorageDirectoryStorage

from dicom_factory import CANARY_ID, compress, rewrite, write_enhanced, write_series
from fourdvq.data.burnt_text import has_burnt_text
from fourdvq.data.choice import best_series
from fourdvq.data.cohort import Cohort, load_cohort
from fourdvq.data.dicom import find_series, scan_folder
from fourdvq.data.series import LoadedSeries, SeriesLimits, load_series
from fourdvq.data.volume import Volume, write_nifti
from fourdvq.errors import VolumeError
from fourdvq.preprocessing.inputs import load_input, scan_inputs, source_key
from fourdvq.preprocessing.profile import LimitsSpec
from synthetic_lungs import chest


@pytest.fixture(scope="module")
def volume() -> Volume:
    scan, _ = chest((16, 24, 24))
    return Volume(scan.hu, (1.5, 0.7, 0.7), (-80.0, -70.0, -200.0))


def other(volume: Volume, by: int) -> Volume:
    return Volume(volume.hu + by, volume.spacing, volume.origin)


def loaded(folder: Path, **limits) -> LoadedSeries:
    return load_series(best_series(folder), SeriesLimits(**limits))


def refused(folder: Path, **limits) -> VolumeError:
    with pytest.raises(VolumeError) as caught:
        loaded(folder, **limits)
    return caught.value


def cohort_of(folder: Path, *patients: str) -> Cohort:
    """The cohort of DICOM files in `folder`/ct."""
    rows = [f"{p},60,M,ever,900,censored" for p in patients]
    text = "\n".join(["patient_id,age,sex,smoking,time_days,event", *rows])
    (folder / "clinical.csv").write_text(text, encoding="utf-8")
    return load_cohort(folder / "clinical.csv", None, folder / "ct")


def found(cohort: Cohort) -> set[tuple[str, str]]:
    return {(f.code, f.patient_id) for f in cohort.findings}


# --- rows 4 to 6: files and their encodings --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["RLE", "JPEG", "JPEG2000", "deflated", "big-endian"])
def test_a_compressed_series_gives_the_same_voxels_as_the_uncompressed_one(volume, tmp_path, how):
    for path in write_series(tmp_path, volume):
        compress(path, how)
    assert len({s.transfer_syntax for s in find_series(tmp_path)[0].slices} - {"1.2.840.10008.1.2.1"}) == 1
    np.testing.assert_array_equal(loaded(tmp_path).volume.hu, volume.hu)


def test_pixels_taken_from_the_file_are_bit_equal_to_what_itk_decodes(volume, tmp_path):
    def signed_with_overlay_bits(i, data):
        data.PixelRepresentation, data.BitsStored, data.HighBit = 1, 13, 12
        raw = volume.hu[i].astype(np.int32) + 24
        data.RescaleIntercept = -24
        data.PixelData = ((raw & 0x1FFF) | 0x4000).astype("<u2").tobytes()

    for name, edit in (("plain", None), ("signed", signed_with_overlay_bits)):
        write_series(tmp_path / name, volume, edit=edit)
        np.testing.assert_array_equal(loaded(tmp_path / name).volume.hu, volume.hu)
    files = write_series(tmp_path / "scaled", volume, edit=lambda i, d: setattr(d, "RescaleSlope", 0.7))
    ours = loaded(tmp_path / "scaled").volume.hu
    for z, path in enumerate(files):
        itk = sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat64))[0]
        np.testing.assert_array_equal(ours[z], np.clip(np.rint(itk), -1024, 3071))


@pytest.mark.parametrize(("added", "code"), [(2, ""), (4, "E_CORRUPT"), (-2, "E_CORRUPT")])
def test_a_word_of_padding_after_the_pixels_is_passed_over_and_no_more(volume, tmp_path, added, code):
    def pad(i, data):
        data.PixelData = data.PixelData + bytes(added) if added > 0 else data.PixelData[:added]

    write_series(tmp_path, volume, edit=pad)
    if code:
        assert refused(tmp_path).code == code
    else:
        np.testing.assert_array_equal(loaded(tmp_path).volume.hu, volume.hu)


def test_an_unknown_syntax_is_named_with_what_to_do(volume, tmp_path):
    for path in write_series(tmp_path, volume):
        rewrite(path, lambda d: None)
        raw = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
        path.write_bytes(raw)
    error = refused(tmp_path)
    assert error.code == "E_SYNTAX"
    assert error.found == "1.2.840.10008.1.2.9"
    assert "Explicit VR Little Endian" in error.fix


def test_a_code_stream_that_announces_another_size_is_refused_before_it_is_decoded(volume, tmp_path):
    files = write_series(tmp_path, volume)
    for path in files:
        compress(path, "JPEG2000")
    raw = bytearray(files[3].read_bytes())
    at = raw.index(b"\xff\x4f\xff\x51") + 8
    raw[at : at + 8] = (60_000).to_bytes(4, "big") * 2
    files[3].write_bytes(raw)
    error = refused(tmp_path)
    assert (error.code, error.where) == ("E_BOMB", str(files[3]))
    assert "60000 x 60000" in error.found


def without_preamble_mark(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[129] = 0
    path.write_bytes(raw)


def test_a_damaged_preamble_is_a_damaged_file_and_not_something_else(volume, tmp_path):
    files = write_series(tmp_path, volume)
    without_preamble_mark(files[0])
    assert scan_folder(tmp_path).unreadable == (files[0],)
    assert refused(tmp_path).code == "E_CORRUPT"


# --- rows 7, 8, 11: what belongs together ----------------------------------------------------------------------------


def test_two_acquisitions_at_the_same_places_are_split_before_anything_is_refused(volume, tmp_path):
    def second(i, data):
        data.AcquisitionNumber = 2

    write_series(tmp_path, volume)
    write_series(tmp_path, other(volume, 7), edit=second, leave_out=[15], prefix="again")
    got = loaded(tmp_path)
    np.testing.assert_array_equal(got.volume.hu, volume.hu)
    assert got.warnings == ("W_SPLIT",)


@pytest.mark.parametrize("slices", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("downwards", [False, True])
def test_a_scan_numbered_acquisition_by_acquisition_is_still_one_scan(volume, tmp_path, slices, downwards):
    def numbered(i, data):
        data.AcquisitionNumber = (15 - i if downwards else i) // slices + 1

    write_series(tmp_path, volume, edit=numbered)
    got = loaded(tmp_path)
    np.testing.assert_array_equal(got.volume.hu, volume.hu)
    assert got.warnings == ()


def test_a_slice_that_is_missing_between_two_acquisitions_is_filled_as_anywhere_else(volume, tmp_path):
    write_series(tmp_path, volume, leave_out=[8], edit=lambda i, d: setattr(d, "AcquisitionNumber", 1 + i // 8))
    got = loaded(tmp_path)
    assert (got.volume.hu.shape, got.warnings) == ((16, 24, 24), ("W_FILLED",))


def test_two_breath_holds_of_several_acquisitions_each_are_two_scans(volume, tmp_path):
    def edit(first):
        return lambda i, d: setattr(d, "AcquisitionNumber", first + i // 4)

    write_series(tmp_path, volume, edit=edit(1))
    write_series(tmp_path, other(volume, 7), edit=edit(8), prefix="again")
    assert len(find_series(tmp_path)) == 2
    assert loaded(tmp_path).volume.hu.shape == volume.hu.shape


@pytest.mark.parametrize("uid", ["", "1.2.3.4"])
def test_patients_whose_uids_were_blanked_or_made_one_stay_apart(volume, tmp_path, uid):
    def edit(i, data):
        data.StudyInstanceUID = data.SeriesInstanceUID = data.FrameOfReferenceUID = uid

    write_series(tmp_path / "ct" / "a", volume, patient_id="P1", edit=edit)
    write_series(tmp_path / "ct" / "b", other(volume, 3), patient_id="P2", study_date="20160301", edit=edit)
    cohort = cohort_of(tmp_path, "P1", "P2")
    assert [p.patient_id for p in cohort.usable] == ["P1", "P2"]
    for patient, hu in (("P1", volume.hu), ("P2", volume.hu + 3)):
        (scan,) = scan_inputs(cohort, patient)
        np.testing.assert_array_equal(load_input(scan, LimitsSpec(), with_mask=False).volume.hu, hu)


def test_a_frame_of_reference_that_is_new_in_every_file_says_nothing(volume, tmp_path):
    write_series(tmp_path, volume, edit=lambda i, d: setattr(d, "FrameOfReferenceUID", f"1.2.{i}"))
    got = loaded(tmp_path)
    np.testing.assert_array_equal(got.volume.hu, volume.hu)
    assert got.warnings == ()


def test_two_acquisitions_apart_are_two_scans_and_the_longer_is_used(volume, tmp_path):
    def edit(i, data):
        far = i >= 10
        data.AcquisitionNumber = 2 if far else 1
        data.ImagePositionPatient = [-80.0, -70.0, -200.0 + 1.5 * i + (20 if far else 0)]

    write_series(tmp_path, volume, edit=edit)
    got = loaded(tmp_path)
    np.testing.assert_array_equal(got.volume.hu, volume.hu[:10])
    assert got.warnings == ("W_SPLIT",)


@pytest.mark.parametrize("at", [0, 7, 15])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ConvolutionKernel", "B70f"),
        ("PixelSpacing", [0.8, 0.7]),
        ("ImageOrientationPatient", [1, 0, 0, 0, 0, 1]),
        ("SeriesInstanceUID", "1.2.3"),
        ("Modality", "MR"),
        ("ImageType", ["DERIVED", "SECONDARY", "MPR"]),
        ("BitsStored", 12),
        ("PixelRepresentation", 1),
    ],
)
def test_one_slice_with_another_header_is_missed_and_never_bridged_over(volume, tmp_path, name, value, at):
    write_series(tmp_path, volume, edit=lambda i, d: setattr(d, name, value) if i == at else None)
    assert refused(tmp_path).code == "E_MIXED"


def test_slices_stored_in_two_ways_are_one_series_and_each_is_decoded_in_its_own(volume, tmp_path):
    def two_ways(i, data):
        if i % 2:
            raw = volume.hu[i].astype(np.int32)
            data.PixelRepresentation, data.BitsStored, data.HighBit, data.RescaleIntercept = 1, 13, 12, 0
            data.PixelData = (raw & 0x1FFF).astype("<u2").tobytes()

    write_series(tmp_path, volume, edit=two_ways)
    got = loaded(tmp_path)
    np.testing.assert_array_equal(got.volume.hu, volume.hu)
    assert got.warnings == ()


@pytest.mark.parametrize("elsewhere", [{7, 13, 14, 15}, {13, 14, 15}])
def test_what_was_split_off_at_the_scan_is_not_bridged_over_at_preparation(volume, tmp_path, elsewhere):
    """The missing slice is there, with another kernel; the files of the chosen part alone do not show it."""
    write_series(
        tmp_path / "ct", volume, edit=lambda i, d: setattr(d, "ConvolutionKernel", "B31f" if i in elsewhere else "B30f")
    )
    (scan,) = scan_inputs(cohort_of(tmp_path, CANARY_ID), CANARY_ID)
    if 7 in elsewhere:
        with pytest.raises(VolumeError, match="E_GAP"):
            load_input(scan, LimitsSpec(), with_mask=False)
    else:
        assert load_input(scan, LimitsSpec(), with_mask=False).warnings == ("W_SPLIT",)
    assert source_key(scan) != source_key(replace(scan, split=False))


def test_a_localizer_of_the_same_patient_is_no_missing_slice(volume, tmp_path):
    def scout(i, data):
        data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        data.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        data.ImagePositionPatient = [-80.0, 0.0, 100.0]

    write_series(tmp_path, volume)
    write_series(tmp_path, volume, series="scout", leave_out=range(1, 16), edit=scout, prefix="scout")
    assert scan_folder(tmp_path).skipped == {"E_DERIVED": 1}
    np.testing.assert_array_equal(loaded(tmp_path).volume.hu, volume.hu)


def test_a_scale_that_only_one_slice_has_must_be_borne_out_by_its_pixels(volume, tmp_path):
    def own_scale(i, data):
        if i == 5:
            data.RescaleSlope = 0.5
            data.PixelData = ((volume.hu[i].astype(np.int32) + 1024) * 2).astype("<u2").tobytes()

    write_series(tmp_path / "true", volume, edit=own_scale)
    np.testing.assert_array_equal(loaded(tmp_path / "true").volume.hu, volume.hu)
    for name, value in (("RescaleSlope", 3), ("RescaleIntercept", -1023)):
        write_series(tmp_path / name, volume, edit=lambda i, d, n=name, v=value: setattr(d, n, v) if i == 5 else None)
        assert refused(tmp_path / name).code == "E_RESCALE"


@pytest.mark.parametrize("at", [0, 7, 15])
def test_a_slice_whose_header_is_shifted_from_its_series_uid_on_is_missed_at_the_ends_too(volume, tmp_path, at):
    files = write_series(tmp_path, volume)
    raw = files[at].read_bytes()
    uid = raw.index(b"\x20\x00\x0e\x00UI") + 20
    files[at].write_bytes(raw[:uid] + raw[uid + 2 :])
    error = refused(tmp_path)
    assert (error.code, error.where) == ("E_MIXED", str(files[at]))


@pytest.mark.parametrize("at", [0, 7, 15])
def test_a_slice_whose_modality_swallows_the_rest_of_its_header_is_missed(volume, tmp_path, at):
    files = write_series(tmp_path, volume)
    raw = bytearray(files[at].read_bytes())
    raw[raw.index(b"\x08\x00\x60\x00CS") + 7] = 0xF6  # the high byte of a length of two
    files[at].write_bytes(raw)
    assert refused(tmp_path).code == "E_CORRUPT"


# --- row 24: enhanced multi-frame ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "RLE", "JPEG", "JPEG2000"])
def test_an_enhanced_file_becomes_its_volume_whatever_the_order_and_scale_of_its_frames(volume, tmp_path, how):
    order = np.random.default_rng(0).permutation(16)
    path = write_enhanced(tmp_path / "one.dcm", volume, order=order)
    if how:
        compress(path, how)
    got = loaded(tmp_path)
    np.testing.assert_array_equal(got.volume.hu, volume.hu)
    assert got.volume.spacing == pytest.approx(volume.spacing)
    assert got.volume.origin == pytest.approx(volume.origin)
    assert got.thickness_mm == pytest.approx(1.5)


def test_an_enhanced_file_with_several_stacks_is_refused(volume, tmp_path):
    def stack_of(k, groups):
        groups.FrameContentSequence[0].StackID = "1" if k < 8 else "2"

    def turned(k, groups):
        groups.PlaneOrientationSequence = [groups.PlanePositionSequence[0].__class__()]
        groups.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0] if k < 8 else [1, 0, 0, 0, 0, 1]

    write_enhanced(tmp_path / "a" / "named.dcm", volume, edit_frame=stack_of)
    write_enhanced(tmp_path / "b" / "turned.dcm", volume, edit_frame=turned)
    write_enhanced(tmp_path / "c" / "twice.dcm", volume, order=[*range(16), *range(16)])
    for name in "abc":
        assert refused(tmp_path / name).code == "E_STACKS"


def test_an_enhanced_file_is_held_to_the_same_rules(volume, tmp_path):
    def no_scale(k, groups):
        if k == 3:
            del groups.PixelValueTransformationSequence

    def no_place(k, groups):
        if k == 3:
            del groups.PlanePositionSequence

    write_enhanced(tmp_path / "scale" / "a.dcm", volume, edit_frame=no_scale)
    write_enhanced(tmp_path / "place" / "a.dcm", volume, edit_frame=no_place)
    write_enhanced(tmp_path / "gap" / "a.dcm", volume, order=[0, 1, 2, 3, 6, 7, 8])
    path = write_enhanced(tmp_path / "count" / "a.dcm", volume, edit=lambda d: setattr(d, "NumberOfFrames", 10**9))
    assert refused(tmp_path / "scale").code == "E_RESCALE"
    assert refused(tmp_path / "place").code == "E_GEOMETRY"
    assert refused(tmp_path / "gap").code == "E_GAP"
    assert scan_folder(path.parent).unreadable == (path,)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("ContrastBolusAgent", "Iomeron 400", "W_CONTRAST"),
        ("PixelSpacing", [0.3, 0.3], "W_PIXEL"),
        ("PixelSpacing", [1.2, 1.2], "W_PIXEL"),
        ("PatientPosition", "HFP", "W_PRONE"),
        ("LossyImageCompression", "01", "W_LOSSY"),
    ],
)
def test_what_is_unusual_but_usable_is_read_with_a_warning(volume, tmp_path, name, value, code):
    write_series(tmp_path, volume, edit=lambda i, d: setattr(d, name, value))
    got = loaded(tmp_path)
    assert got.warnings == (code,)
    np.testing.assert_array_equal(got.volume.hu, volume.hu)


# --- rows 27 to 30: the same scan, the same day, the same person ------------------------------------------------------


def test_a_scan_exported_twice_is_kept_once_and_one_person_under_two_ids_is_found(volume, tmp_path):
    write_series(tmp_path / "ct" / "a", volume, study="one", study_date="20150301")
    write_series(tmp_path / "ct" / "b", volume, study="two", study_date="20150401", prefix="copy")
    write_series(tmp_path / "ct" / "c", other(volume, 3), study="three", study_date="20160301")
    write_series(tmp_path / "ct" / "d", other(volume, 3), study="four", patient_id="LEU-2", study_date="20170101")
    cohort = cohort_of(tmp_path, CANARY_ID, "LEU-2")
    assert [s.days for s in cohort.scans_of(CANARY_ID)] == [0, 366]
    assert cohort.scans_of("LEU-2") == ()
    assert {("W_DOUBLE_PIXELS", CANARY_ID), ("W_DOUBLE_PIXELS", "LEU-2")} <= found(cohort)
    assert [p.patient_id for p in cohort.usable] == [CANARY_ID]


def test_an_image_file_copied_to_another_patient_is_found(tmp_path):
    scan, _ = chest((12, 20, 24))
    (tmp_path / "ct").mkdir()
    write_nifti(scan, tmp_path / "ct" / "a.nii.gz")
    shutil.copy(tmp_path / "ct" / "a.nii.gz", tmp_path / "ct" / "b.nii.gz")
    (tmp_path / "scans.csv").write_text(
        "patient_id,scan_id,path,days_from_baseline\nP1,a,a.nii.gz,0\nP2,b,b.nii.gz,0\n"
    )
    rows = "patient_id,age,sex,smoking,time_days,event\nP1,60,M,ever,9,censored\nP2,60,M,ever,9,censored\n"
    (tmp_path / "clinical.csv").write_text(rows)
    cohort = load_cohort(tmp_path / "clinical.csv", tmp_path / "scans.csv", tmp_path / "ct")
    assert ("W_DOUBLE_PIXELS", "P2") in found(cohort)
    assert [p.patient_id for p in cohort.usable] == ["P1"]


def test_of_two_scans_on_one_day_the_better_series_is_kept(volume, tmp_path):
    def sharp(i, data):
        data.ConvolutionKernel = "B70f"

    write_series(tmp_path / "ct" / "a", volume, study="sharp", edit=sharp)
    write_series(tmp_path / "ct" / "b", other(volume, 1), study="soft")
    cohort = cohort_of(tmp_path, CANARY_ID)
    (scan,) = cohort.scans_of(CANARY_ID)
    assert scan.path.name == "b"
    assert ("W_SAMEDAY", CANARY_ID) in found(cohort)


@pytest.mark.parametrize(("name", "value"), [("PatientSex", "F"), ("PatientBirthDate", "19510101")])
def test_one_id_with_two_persons_is_refused_in_the_cohort_and_in_a_series(volume, tmp_path, name, value):
    write_series(tmp_path / "ct" / "a", volume, study="one")
    write_series(tmp_path / "ct" / "b", other(volume, 1), study="two", edit=lambda i, d: setattr(d, name, value))
    assert ("E_IDENTITY", CANARY_ID) in found(cohort_of(tmp_path, CANARY_ID))
    write_series(tmp_path / "c", volume, edit=lambda i, d: setattr(d, name, value) if i == 4 else None)
    assert refused(tmp_path / "c").code == "E_IDENTITY"


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize("date", ["", "00000000", "2015-13-01", "19491231"])
def test_a_study_without_a_date_or_before_birth_is_left_out(volume, tmp_path, date):
    write_series(tmp_path / "ct" / "a", volume, study_date=date)
    cohort = cohort_of(tmp_path, CANARY_ID)
    assert ("E_DATE", CANARY_ID) in found(cohort)
    assert cohort.scans == ()


def test_a_damaged_slice_beside_a_scan_is_a_finding_and_goes_on_to_be_refused(volume, tmp_path):
    files = write_series(tmp_path / "ct", volume)
    files[4].write_bytes(files[4].read_bytes()[:300])
    cohort = cohort_of(tmp_path, CANARY_ID)
    assert ("E_CORRUPT", CANARY_ID) in found(cohort)
    (scan,) = cohort.scans
    assert files[4] in scan.files
    with pytest.raises(VolumeError, match="E_CORRUPT"):
        best_series(scan.path, series_key=scan.series_key, files=scan.files)


def flat_folder(folder: Path, volume: Volume) -> dict[str, list[Path]]:
    """Three patients in one folder, as a receiver of DICOM writes them."""
    return {
        p: write_series(folder / "ct", other(volume, k), prefix=p, patient_id=p, study=p, series=f"{p}s")
        for k, p in enumerate(("P1", "P2", "P3"))
    }


def blocked(folder: Path) -> set[str]:
    """Patients of `folder` whose scan is a finding or refused at preparation."""
    cohort = cohort_of(folder, "P1", "P2", "P3")
    refused = {f.patient_id for f in cohort.findings if f.code in ("E_MIXED", "E_CORRUPT")}
    for patient in ("P1", "P2", "P3"):
        for scan in scan_inputs(cohort, patient):
            try:
                load_input(scan, LimitsSpec(), with_mask=False)
            except VolumeError:
                refused.add(patient)
    return refused


def test_a_screen_save_or_raw_data_refuses_nobody_beside_it(volume, tmp_path):
    def screen(i, data):
        data.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
        del data.ImagePositionPatient, data.ImageOrientationPatient

    def raw(i, data):
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66"
        for name in ("ImageType", "ImagePositionPatient", "ImageOrientationPatient", "PixelData", "Rows", "Columns"):
            delattr(data, name)

    flat_folder(tmp_path, volume)
    for name, edit in (("screen", screen), ("raw", raw)):
        for study in ("P1", "other"):
            write_series(tmp_path / "ct", volume, edit=edit, leave_out=range(1, 16), prefix=f"{name}{study}",
                         patient_id="P1", study=study, series=name)  # fmt: skip
    assert blocked(tmp_path) == set()


def test_a_projection_over_the_same_places_is_no_missing_slice(volume, tmp_path):
    def projection(i, data):
        data.ImageType = ["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 MIP"]

    shorter = Volume(volume.hu[:12], volume.spacing, volume.origin)
    write_series(tmp_path, shorter, series="native")
    write_series(tmp_path, volume, series="mip", prefix="mip", edit=projection)
    np.testing.assert_array_equal(loaded(tmp_path).volume.hu, shorter.hu)


def test_a_damaged_file_is_of_the_patient_whose_uid_it_still_holds(volume, tmp_path):
    without_preamble_mark(flat_folder(tmp_path, volume)["P2"][3])
    assert blocked(tmp_path) == {"P2"}


def test_a_damaged_file_of_nobody_is_a_finding_and_blocks_none_of_the_patients_in_its_folder(volume, tmp_path):
    path = flat_folder(tmp_path, volume)["P2"][3]
    path.write_bytes(path.read_bytes()[:300])
    assert ("E_CORRUPT", "") in found(cohort_of(tmp_path, "P1", "P2", "P3"))
    assert blocked(tmp_path) == {""}


def test_a_damaged_file_of_another_series_leaves_the_chosen_one_alone(volume, tmp_path):
    write_series(tmp_path / "ct", volume, patient_id="P1", series="soft")
    files = write_series(
        tmp_path / "ct", volume, patient_id="P1", series="sharp", prefix="s", leave_out=[15],
        edit=lambda i, d: setattr(d, "ConvolutionKernel", "B70f"),
    )  # fmt: skip
    without_preamble_mark(files[3])
    assert blocked(tmp_path) == set()


def test_a_directory_file_of_a_burnt_disc_is_no_damaged_image(volume, tmp_path):
    def directory(data):
        for element in list(data):
            del data[element.tag]
        data.FileSetID, data.DirectoryRecordSequence = "DISC", []
        data.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage

    write_series(tmp_path / "ct", volume, patient_id="P1")
    (extra,) = write_series(tmp_path, volume, leave_out=range(1, 16))
    rewrite(extra, directory)
    extra.rename(tmp_path / "ct" / "DICOMDIR;1")
    assert scan_folder(tmp_path / "ct").skipped == {"other": 1}
    assert blocked(tmp_path) == set()


def test_a_slice_that_lost_its_study_or_series_is_missed_also_among_other_patients(volume, tmp_path):
    for name, value in (("StudyInstanceUID", "1.2.3"), ("SeriesInstanceUID", "1.2.3"), ("StudyInstanceUID", "")):
        folder = tmp_path / f"{name}{value}"
        path = flat_folder(folder, volume)["P2"][3]
        rewrite(path, lambda d, n=name, v=value: setattr(d, n, v))
        assert "P2" in blocked(folder)


@pytest.mark.parametrize(
    "name",
    [
        "Thorax exp.",
        "THORAX EXPIRATIE",
        "Thorax_Exspiration 1.0",
        "Ausatmung",
        "CT expiratoire",
        "uitademing",
        "THX EXSP.",
        "Thx exspi 1.0",
        "Thorax in Exspiration",
    ],
)
def test_a_scan_named_expiratory_goes_to_review_in_four_languages(volume, tmp_path, name):
    write_series(tmp_path, volume, edit=lambda i, d: setattr(d, "SeriesDescription", name))
    assert "V_EXPIR" in loaded(tmp_path).warnings


def test_words_that_only_look_like_expiration_do_not(volume, tmp_path):
    for k, name in enumerate(
        ("Experimental", "Thorax insp/exp", "Insp/Exsp", "Thorax In+Exp", "Export", "Thorax inspiratie")
    ):
        write_series(tmp_path / str(k), volume, edit=lambda i, d, n=name: setattr(d, "SeriesDescription", n))
        assert "V_EXPIR" not in loaded(tmp_path / str(k)).warnings


# --- row 38: letters in the pixels -----------------------------------------------------------------------------------

GLYPHS = {  # 5 x 7 dots
    "A": ("01110", "10001", "10001", "11111", "10001", "10001", "10001"),
    "N": ("10001", "11001", "10101", "10011", "10001", "10001", "10001"),
    "S": ("01111", "10000", "10000", "01110", "00001", "00001", "11110"),
    "T": ("11111", "00100", "00100", "00100", "00100", "00100", "00100"),
    "O": ("01110", "10001", "10001", "10001", "10001", "10001", "01110"),
}


def written_on(hu: np.ndarray, text: str, row: int, column: int, scale: int = 1) -> np.ndarray:
    """A copy of an axial image with saturated letters, its first one at (row, column)."""
    result = hu.copy()
    for k, letter in enumerate(text):
        dots = np.kron(np.array([[int(c) for c in line] for line in GLYPHS[letter]]), np.ones((scale, scale), int)) > 0
        place = result[row : row + 7 * scale, column + 6 * scale * k : column + 6 * scale * k + 5 * scale]
        place[dots] = 3071
    return result


@pytest.mark.parametrize(("row", "column", "scale"), [(3, 3, 1), (3, 90, 1), (116, 4, 1), (4, 4, 2)])
def test_letters_in_a_corner_of_one_slice_are_refused(tmp_path, row, column, scale):
    scan, _ = chest((8, 128, 128))
    hu = scan.hu.copy()
    assert not has_burnt_text(hu)
    hu[3] = written_on(hu[3], "SANTOS" if scale == 1 else "ANNAS"[:4], row, column, scale)
    write_series(tmp_path, Volume(hu, (1.5, 0.7, 0.7), (-80.0, -70.0, -200.0)))
    assert refused(tmp_path).code == "E_BURNED"


def test_bright_things_that_are_no_letters_are_left_alone():
    scan, _ = chest((6, 128, 128))
    hu = scan.hu.copy()
    hu[:, 4:8, 4:120] = 3071  # a rail
    hu[1, 90:126, 6:30] = 2500  # an elbow
    rng = np.random.default_rng(0)
    for _ in range(30):  # a coil in pieces of all sizes
        y, x = rng.integers(100, 120, 1)[0], rng.integers(80, 120, 1)[0]
        hu[2, y : y + rng.integers(1, 7), x : x + rng.integers(1, 7)] = 3071
    assert not has_burnt_text(hu)


# --- rows 39 to 41: whatever else lies in an export ------------------------------------------------------------------


def a_messy_export(folder: Path, volume: Volume, notes: int) -> None:
    """A series among empty files, notes, links in circles and to nothing, a pipe, and an archive."""
    write_series(folder / "Thorax (1)" / "São João – 日本", volume)
    for k in range(notes):
        (folder / f"{k}.txt").write_bytes(b"note")
    (folder / "empty.dcm").touch()
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "round").symlink_to(folder)
    (folder / "Thorax (1)" / "up").symlink_to(folder)
    (folder / "ct.tar.gz").write_bytes(b"\x1f\x8b")
    os.mkfifo(folder / "pipe")


def test_empty_unreadable_and_special_files_and_loops_are_counted_and_the_series_is_read(volume, tmp_path):
    a_messy_export(tmp_path, volume, notes=2000)
    scan = scan_folder(tmp_path)
    assert scan.skipped == {"other": 2000, "empty": 1, "unreadable": 1, "loop": 2, "E_ARCHIVE": 1, "special": 1}
    np.testing.assert_array_equal(loaded(tmp_path).volume.hu, volume.hu)


@pytest.mark.slow
def test_a_hundred_thousand_files_are_walked(volume, tmp_path):
    a_messy_export(tmp_path, volume, notes=100_000)
    assert scan_folder(tmp_path).skipped["other"] == 100_000


def test_names_that_are_no_utf8_and_ids_with_accents_work(volume, tmp_path):
    strange = Path(os.fsdecode(os.fsencode(tmp_path / "ct") + b"/caf\xe9 \xff"))
    for path in write_series(strange, volume, patient_id="Åse-Müller"):
        rewrite(path, lambda d: setattr(d, "SpecificCharacterSet", "ISO_IR 192"))
        compress(path, "JPEG2000")
    assert find_series(strange)[0].first.transfer_syntax == JPEG2000Lossless
    np.testing.assert_array_equal(loaded(strange).volume.hu, volume.hu)
    cohort = cohort_of(tmp_path, "Åse-Müller")
    assert [p.patient_id for p in cohort.usable] == ["Åse-Müller"]
    next(iter(strange.iterdir())).write_bytes(b"\0" * 128 + b"DICM broken")
    error = refused(strange)
    assert error.code == "E_CORRUPT"
    assert "caf\\udce9" in str(error).encode("utf-8").decode()


def test_each_kind_of_nothing_has_its_own_code(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "export.zip").write_bytes(b"PK")
    assert refused(tmp_path / "none").code == "E_EMPTY"
    assert refused(tmp_path / "zip").code == "E_ARCHIVE"


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_sites_limits_on_voxels_memory_and_spacing_hold_for_a_series(volume, tmp_path):
    from fourdvq.data.limits import ReaderLimits

    write_series(tmp_path, volume)
    size = volume.hu.size
    assert refused(tmp_path, readers=ReaderLimits(max_voxels=size - 1)).code == "E_BOMB"
    assert refused(tmp_path, readers=ReaderLimits(spacing_mm=(0.8, 10.0))).code == "E_GEOMETRY"
    big, _ = chest((3, 600, 600))
    write_series(tmp_path / "big", Volume(big.hu, (1.5, 0.7, 0.7)))
    assert refused(tmp_path / "big", readers=ReaderLimits(decode_memory_mb=4)).code == "E_BOMB"


def test_rows_and_columns_that_the_file_cannot_hold_are_refused_without_reading(volume, tmp_path):
    def huge(i, data):
        data.Rows = data.Columns = 65_535

    write_series(tmp_path, volume, edit=huge)
    assert refused(tmp_path).code == "E_BOMB"


def test_a_deflated_header_that_never_ends_is_refused(volume, tmp_path):
    def grow(i, data):
        data.PixelData = bytes(80 << 20) if i == 2 else data.PixelData

    files = write_series(tmp_path, volume, leave_out=range(3, 16), edit=grow)
    compress(files[2], "deflated")
    assert files[2].stat().st_size < 1 << 20
    scan = scan_folder(tmp_path)
    assert scan.unreadable == (files[2],)
    assert scan.skipped == {"E_BOMB": 1}
