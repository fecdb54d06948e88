"""Training reads approved scans and no others, in [0, 1], on the baseline's mask; decisions hold for one content."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdvq.data.cohort import PatientRow, write_clinical
from fourdvq.data.datasets import (
    ScanDataset,
    clinical_of,
    latent_mask,
    load_hu,
    load_lung,
    load_x01,
    open_prepared,
)
from fourdvq.data.latents import LatentPatient, load_latents, save_latents
from fourdvq.data.prepared import read_splits, write_splits
from fourdvq.data.review import approve, decide, read_decisions, reject
from fourdvq.data.volume import write_nifti
from fourdvq.errors import CohortError, ModelError
from fourdvq.preprocessing.pipeline import ScanInput, prepare_patient, write_manifest
from fourdvq.preprocessing.profile import load_profile
from synthetic_lungs import chest

TINY = load_profile(Path(__file__).parents[2] / "configs" / "preprocessing" / "tiny.yaml")
WINDOW = (-1000.0, 400.0)
BY = {"reviewer": "jd", "time": "2026-01-02T03:04:05Z"}
P, Q = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


@pytest.fixture
def prep(tmp_path: Path) -> Path:
    """Two patients with two scans each, prepared, split, not yet reviewed."""
    folder = tmp_path / "prep"
    for number, name in enumerate((P, Q)):
        prepare_patient(scans(tmp_path, number), TINY, folder, pseudonym=name)
    write_manifest(folder)
    write_splits(folder, {P: "train", Q: "test"})
    rows = [
        PatientRow("id-p", 60.0, "M", 1, 900, "death"),
        PatientRow("id-q", 70.5, "F", None, 800, "transplant"),
        PatientRow("id-r", 50.0, "F", 0, 100, "censored"),
    ]
    write_clinical(folder, rows, {"id-p": P, "id-q": Q, "id-r": "cccccccccccc"})
    return folder


def scans(folder: Path, number: int, size: tuple[int, int, int] = (20, 28, 28)) -> list[ScanInput]:
    result = []
    for i in range(2):
        path, lung = folder / f"{number}{i}.nii.gz", folder / f"{number}{i}_lung.nii.gz"
        scan, mask = chest(size, seed=number, scale=1 - 0.02 * i)
        write_nifti(scan, path)
        write_nifti(mask, lung)
        result.append(ScanInput(i, 180 * i, path, lung))
    return result


def test_nothing_is_read_before_a_person_decided(prep):
    with pytest.raises(CohortError, match="E_NO_APPROVED"):
        open_prepared(prep)


def test_approved_scans_come_in_time_order_with_years_from_the_first(prep):
    assert approve(prep, None, **BY) == 4
    cohort = open_prepared(prep)
    assert [(p.pseudonym, p.split, len(p.scans)) for p in cohort.patients] == [(P, "train", 2), (Q, "test", 2)]
    assert [s.years for s in cohort.of("train")[0].scans] == [0.0, 180 / 365.25]
    assert cohort.profile_sha256 == TINY.sha256
    assert len(cohort.scans("train", "test")) == 4
    assert read_splits(prep) == {P: "train", Q: "test"}


def test_a_follow_up_is_not_read_without_its_baseline(prep):
    approve(prep, [(P, 1), (Q, 0), (Q, 1)], **BY)
    assert [p.pseudonym for p in open_prepared(prep).patients] == [Q]
    reject(prep, [(Q, 1)], reason="motion", **BY)
    assert [len(p.scans) for p in open_prepared(prep).patients] == [1]
    assert read_decisions(prep).rejected() == {Q: {recipe(prep, Q, 1)}}


def recipe(prep: Path, pseudonym: str, index: int) -> str:
    return json.loads((prep / pseudonym / str(index) / "step.json").read_text())["recipe_sha256"]


def test_decisions_follow_a_scan_when_an_older_export_shifts_the_numbers(prep, tmp_path):
    first, second = scans(tmp_path, 0)
    prepare_patient([replace(second, index=0)], TINY, prep, pseudonym=P)
    write_manifest(prep)
    approve(prep, [(P, 0)], **BY)
    third = replace(second, index=1, days=500, path=first.path, mask_path=first.mask_path)
    prepare_patient([replace(second, index=0), third], TINY, prep, pseudonym=P)
    write_manifest(prep)
    reject(prep, [(P, 1)], reason="motion", **BY)
    rejected = read_decisions(prep).rejected()[P]
    late = replace(second, index=1)
    between = replace(second, index=0, days=100, path=tmp_path / "10.nii.gz", mask_path=tmp_path / "10_lung.nii.gz")
    prepare_patient([between, late, replace(third, index=2)], TINY, prep, pseudonym=P, rejected=rejected)
    rows = {r["index"]: r for r in write_manifest(prep) if r["pseudonym"] == P}
    assert {i: r["decision"] for i, r in rows.items()} == {0: "", 1: "", 2: "reject"}
    prepare_patient([replace(second, index=0), third], TINY, prep, pseudonym=P, rejected=rejected)
    rows = {r["index"]: r for r in write_manifest(prep) if r["pseudonym"] == P}
    assert {i: r["decision"] for i, r in rows.items()} == {0: "approve", 1: "reject"}


def test_an_approval_without_a_look_ends_with_its_grade_and_a_persons_does_not(prep):
    rows = write_manifest(prep)
    decide(prep, [(P, 0)], "auto", **BY)
    approve(prep, [(P, 1)], **BY)
    decisions = read_decisions(prep)
    assert [decisions.about({**r, "grade": "PASS"}) for r in rows[:2]] == ["auto", "approve"]
    assert [decisions.about({**r, "grade": "REVIEW"}) for r in rows[:2]] == ["", "approve"]


def test_a_rejection_ends_when_it_is_taken_back_or_the_scan_is_approved(prep):
    reject(prep, [(P, 0), (P, 1)], reason="motion", **BY)
    decide(prep, [(P, 0)], "redo", **BY)
    approve(prep, [(P, 1)], **BY)
    assert read_decisions(prep).rejected() == {}
    assert [r["decision"] for r in write_manifest(prep)] == ["", "approve", "", ""]


def test_a_decision_lapses_when_the_content_changes(prep, tmp_path):
    decide(prep, None, "demo", **BY)
    before = open_prepared(prep)
    other = replace(TINY, registration=replace(TINY.registration, affine_iterations=1))
    moved = replace(other, fov=replace(TINY.fov, margin_mm=20.0))
    prepare_patient(scans(tmp_path, 0), moved, prep, pseudonym=P)
    write_manifest(prep)
    assert [p.pseudonym for p in open_prepared(prep).patients] == [Q]
    approve(prep, [(P, 0), (P, 1)], **BY)
    with pytest.raises(CohortError, match="E_PROFILE"):
        open_prepared(prep)
    prepare_patient(scans(tmp_path, 0), TINY, prep, pseudonym=P)
    write_manifest(prep)
    approve(prep, [(P, 0), (P, 1)], **BY)
    assert open_prepared(prep).cohort_sha256 == before.cohort_sha256


def test_the_cohorts_identity_changes_with_splits_and_clinical_rows_and_not_with_the_reviewer(prep):
    approve(prep, None, **BY)
    first = open_prepared(prep).cohort_sha256
    approve(prep, None, reviewer="else", time="later")
    assert open_prepared(prep).cohort_sha256 == first
    write_splits(prep, {P: "test", Q: "test"})
    assert open_prepared(prep).cohort_sha256 != first
    write_splits(prep, {P: "train", Q: "test"})
    text = (prep / "clinical.csv").read_text()
    (prep / "clinical.csv").write_text(text.replace("900", "901"))
    assert open_prepared(prep).cohort_sha256 != first


def test_a_decision_about_an_unknown_scan_and_a_patient_without_split_are_refused(prep):
    with pytest.raises(CohortError, match="E_PATIENT"):
        approve(prep, [(P, 7)], **BY)
    approve(prep, None, **BY)
    write_splits(prep, {P: "train"})
    with pytest.raises(CohortError, match="E_TABLE"):
        open_prepared(prep)


def test_hu_are_clipped_to_the_window_and_scaled(prep):
    approve(prep, None, **BY)
    scan = open_prepared(prep).patients[0].scans[0]
    hu = load_hu(scan)
    x = load_x01(scan, WINDOW)
    assert x.shape == (1, *TINY.grid.size)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x[0].numpy(), np.clip((hu.astype(float) + 1000) / 1400, 0, 1), atol=1e-6)
    narrow = load_x01(scan, (-900.0, -500.0))
    np.testing.assert_allclose(narrow[0].numpy(), np.clip((hu.astype(float) + 900) / 400, 0, 1), atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        hu[0, 0, 0] = 1


@pytest.mark.parametrize("cache", [True, False])
def test_a_dataset_gives_the_same_tensor_each_time(prep, cache):
    approve(prep, None, **BY)
    cohort = open_prepared(prep)
    data = ScanDataset(cohort.scans("train", "test"), WINDOW, cache)
    assert len(data) == 4
    assert [data.patient_of(i) for i in range(4)] == [P, P, Q, Q]
    first = data[2].clone()
    data[2].zero_()
    assert torch.equal(data[2], first)
    assert torch.equal(first, load_x01(cohort.patients[1].scans[0], WINDOW))


def test_the_lung_mask_is_the_baselines_and_its_latent_form_covers_it(prep):
    approve(prep, None, **BY)
    first, second = open_prepared(prep).patients[0].scans
    lung = load_lung(first)
    assert torch.equal(lung, load_lung(second))
    share = lung.float().mean().item()
    assert 0.2 < share < 0.8
    small = latent_mask(lung, 4)
    assert small.shape == (4, 8, 8)
    dense = torch.nn.functional.avg_pool3d(lung[None, None].float(), 4)[0, 0]
    assert bool(small[dense == 1].all())
    assert not bool(small[dense == 0].any())
    assert small.float().mean() > share


def test_clinical_rows_say_whether_they_are_complete(prep):
    rows = {r.pseudonym: r for r in clinical_of(prep)}
    assert (rows[P].age, rows[P].sex, rows[P].smoking, rows[P].time_days, rows[P].event) == (60.0, 1, 1, 900, 1)
    assert rows[P].complete
    assert not rows[Q].complete
    assert (rows[Q].sex, rows[Q].smoking, rows[Q].event) == (0, None, 0)
    assert {r.pseudonym: r for r in clinical_of(prep, transplant="event")}[Q].event == 1


def test_time_and_age_count_from_the_new_baseline_if_the_first_scan_is_rejected(prep, tmp_path):
    prepare_patient(scans(tmp_path, 0), TINY, prep, pseudonym=P, rejected={recipe(prep, P, 0)})
    write_manifest(prep)
    approve(prep, [(P, 1)], **BY)
    row = {r.pseudonym: r for r in clinical_of(prep)}[P]
    assert row.time_days == 900 - 180
    assert row.age == pytest.approx(60.0 + 180 / 365.25)
    assert open_prepared(prep).patients[0].scans[0].years == 0.0


@pytest.mark.parametrize(("codes", "dtype"), [(256, torch.uint8), (1024, torch.int16)])
def test_latents_come_back_as_they_were_saved(tmp_path, codes, dtype):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, codes, (3, 5, 6, 7), generator=generator)
    indices[0, 0, 0, 0] = codes - 1
    lung = torch.rand(5, 6, 7, generator=generator) > 0.5
    years = torch.tensor([0.0, 0.7, 2.125], dtype=torch.float64)
    save_latents(tmp_path, LatentPatient(P, indices, lung, years, torch.arange(6.0).view(3, 2), "t" * 64))
    back = load_latents(tmp_path, tokenizer_sha256="t" * 64)
    assert back.indices.dtype == dtype
    assert torch.equal(back.indices.long(), indices)
    assert torch.equal(back.lung, lung)
    assert torch.equal(back.years, years)
    assert torch.equal(back.means, torch.arange(6.0).view(3, 2))
    assert back.pseudonym == P


def test_codes_of_another_tokenizer_and_damaged_files_are_refused(tmp_path):
    one = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    path = save_latents(tmp_path, LatentPatient(P, one, one[0] == 0, torch.zeros(1), torch.zeros(1, 3), "t" * 64))
    with pytest.raises(ModelError, match="E_TOKENIZER"):
        load_latents(tmp_path, tokenizer_sha256="u" * 64)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ModelError, match="E_CHECKPOINT"):
        load_latents(tmp_path)
    with pytest.raises(ModelError, match="E_FILE"):
        load_latents(tmp_path / "none")


def test_reading_prepared_scans_needs_no_imaging_library():
    code = (
        "import sys, fourdvq.data.datasets, fourdvq.data.latents, fourdvq.data.splits, fourdvq.preprocessing.profile;"
        "print([m for m in ('SimpleITK', 'pydicom', 'matplotlib', 'scipy', 'pandas', 'monai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
