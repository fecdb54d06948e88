"""A phantom cohort on disk: the same bytes for the same seed, files that others read back, tables without findings."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from fourdvq.data import phantom
from fourdvq.data.cohort import load_cohort
from fourdvq.data.volume import read_mask, read_volume
from fourdvq.errors import CohortError, ConfigError

SIZE = (20, 32, 32)


def _make(folder, **changes):
    arguments: dict[str, Any] = {"patients": 3, "seed": 5, "size": SIZE, "scans_per_patient": (2, 3)} | changes
    return phantom.make_cohort(folder, **arguments)


def _bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return _make(tmp_path_factory.mktemp("phantom") / "cohort")


@pytest.fixture(scope="module")
def dicom(tmp_path_factory):
    return _make(tmp_path_factory.mktemp("phantom") / "dicom", format="dicom", patients=2)


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(cohort, tmp_path):
    seen = []
    _make(tmp_path / "again", workers=2, progress=lambda done, total: seen.append((done, total)))
    assert _bytes(tmp_path / "again") == _bytes(cohort.folder)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_another_seed_gives_other_scans(cohort, tmp_path):
    other = _make(tmp_path / "other", seed=6, patients=1)
    assert other.patients[0].patient_id != cohort.patients[0].patient_id
    a, b = (phantom.render(c.patients[0], 0.0).hu for c in (cohort, other))
    assert not np.array_equal(a, b)


def test_dicom_files_are_the_same_bytes_too(dicom, tmp_path):
    _make(tmp_path / "again", format="dicom", patients=2)
    assert _bytes(tmp_path / "again") == _bytes(dicom.folder)


def test_nifti_scans_read_back_as_they_were_made(cohort):
    for patient in cohort.patients:
        for visit in patient.visits:
            made = phantom.scan(patient, visit)
            stem = cohort.folder / "scans" / patient.patient_id / visit.scan_id
            read = read_volume(stem.with_suffix(".nii.gz"))
            np.testing.assert_array_equal(read.hu, made.volume.hu)
            np.testing.assert_allclose(read.spacing, made.volume.spacing, rtol=1e-6)
            np.testing.assert_allclose(read.origin, made.volume.origin, atol=1e-4)
            mask = read_mask(stem.with_name(f"{visit.scan_id}_lung.nii.gz"))
            np.testing.assert_array_equal(mask.hu.astype(bool), made.lung)


def test_dicom_series_read_back_by_simpleitk_as_they_were_made(dicom):
    for patient in dicom.patients:
        for visit in patient.visits:
            made = phantom.scan(patient, visit).volume
            folder = str(dicom.folder / "scans" / patient.patient_id / visit.scan_id)
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
            image = reader.Execute()
            np.testing.assert_array_equal(sitk.GetArrayFromImage(image), made.hu)
            np.testing.assert_allclose(image.GetSpacing()[::-1], made.spacing, atol=1e-4)
            np.testing.assert_allclose(image.GetOrigin(), made.origin, atol=1e-3)
            np.testing.assert_allclose(image.GetDirection(), np.eye(3).ravel())


def test_dicom_headers_hold_what_intake_needs(dicom):
    patient = dicom.patients[0]
    files = sorted((dicom.folder / "scans" / patient.patient_id / "CT1").glob("*.dcm"))
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    assert len(headers) == SIZE[0]
    assert len({h.SOPInstanceUID for h in headers}) == SIZE[0]
    assert len({h.SeriesInstanceUID for h in headers}) == 1
    first = headers[0]
    assert first.Modality == "CT"
    assert list(first.ImageType) == ["ORIGINAL", "PRIMARY", "AXIAL"]
    assert first.PatientID == patient.patient_id
    assert first.PatientSex == patient.sex
    assert first.StudyDate == patient.first_date.replace("-", "")
    z = np.array([float(h.ImagePositionPatient[2]) for h in headers])
    np.testing.assert_allclose(np.diff(z), -float(first.SliceThickness), atol=1e-4)


def test_dicom_studies_of_a_patient_are_as_far_apart_as_its_visits(dicom):
    patient = dicom.patients[0]
    rows = load_cohort(dicom.folder / "clinical.csv", None, dicom.folder / "scans", columns={}, values={}).scans_of(
        patient.patient_id
    )
    assert [row.days for row in rows] == [v.days for v in patient.visits]


@pytest.mark.parametrize("kind", ["cohort", "dicom"])
def test_the_tables_load_without_a_finding_and_agree_with_the_truth(kind, request):
    made = request.getfixturevalue(kind)
    folder = made.folder
    loaded = load_cohort(folder / "clinical.csv", folder / "scans.csv", folder / "scans", columns={}, values={})
    assert loaded.findings == ()
    assert [r.patient_id for r in loaded.patients] == [p.patient_id for p in made.patients]
    for row, patient in zip(loaded.patients, made.patients, strict=True):
        assert (row.age, row.sex, row.time_days, row.event) == (
            patient.age,
            patient.sex,
            patient.time_days,
            patient.event,
        )
        assert row.smoking == (patient.smoking == "ever")
        found = loaded.scans_of(row.patient_id)
        assert [s.days for s in found] == [v.days for v in patient.visits]
        assert all(s.path.exists() and s.mask_path is not None and s.mask_path.exists() for s in found)


def test_the_truth_on_disk_renders_the_same_patient_again(cohort):
    loaded = phantom.load_cohort_truth(cohort.folder)
    assert loaded.patients == cohort.patients
    patient = loaded.patient(cohort.patients[1].patient_id)
    np.testing.assert_array_equal(phantom.render(patient, 1.7).hu, phantom.render(cohort.patients[1], 1.7).hu)


def test_the_truth_arrays_are_those_of_the_scans(cohort):
    patient = cohort.patients[0]
    visit = patient.visits[1]
    made = phantom.scan(patient, visit)
    severity = phantom.load_severity(cohort.folder, patient, visit.scan_id)
    np.testing.assert_allclose(severity, made.severity, atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(phantom.load_lung(cohort.folder, patient, visit.scan_id), made.lung)
    moved = phantom.load_displacement(cohort.folder, patient, visit.scan_id)
    assert moved.shape == (3, *SIZE)
    assert np.abs(phantom.load_displacement(cohort.folder, patient, "CT1")).max() < 0.05


def test_masks_and_truth_can_be_left_out(tmp_path):
    made = _make(tmp_path / "bare", patients=1, masks=False, truth=False)
    names = [p.name for p in made.folder.rglob("*")]
    assert not any("lung" in name for name in names)
    assert "truth" not in names
    with (made.folder / "scans.csv").open() as stream:
        assert {row["mask"] for row in csv.DictReader(stream)} == {""}
    with pytest.raises(CohortError) as caught:
        phantom.load_cohort_truth(made.folder)
    assert caught.value.code == "E_FILE"


def test_a_finished_cohort_is_not_written_over(cohort):
    with pytest.raises(CohortError) as caught:
        _make(cohort.folder)
    assert caught.value.code == "E_EXISTS"


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        _make(tmp_path / "x", format="png")
    assert "format" in caught.value.where
