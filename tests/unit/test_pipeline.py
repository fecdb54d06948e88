"""A patient goes through preparation: what comes out, what a bad scan does, what a second run does, what leaks."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from dicom_factory import CANARY_DATE, CANARY_ID, write_series
from fourdvq.data.cohort import load_cohort
from fourdvq.data.volume import Volume, read_volume, write_nifti
from fourdvq.errors import FourdvqError
from fourdvq.preprocessing.canvas import PANEL
from fourdvq.preprocessing.inputs import SourceHashes
from fourdvq.preprocessing.pipeline import (
    ScanInput,
    StepInHand,
    _is_out_of_memory,
    prepare_patient,
    record_failure,
    scan_inputs,
    write_manifest,
)
from fourdvq.preprocessing.profile import Profile, load_profile, profile_from, profile_to_plain
from fourdvq.preprocessing.records import Keys
from synthetic_lungs import chest

PROFILES = Path(__file__).parents[2] / "configs" / "preprocessing"
SIZE = (30, 40, 40)
NAME = "0123456789ab"


def write_scan(folder: Path, name: str, **anatomy) -> tuple[Path, Path]:
    scan, mask = chest(SIZE, **anatomy)
    image, lung = folder / f"{name}.nii.gz", folder / f"{name}_lung.nii.gz"
    write_nifti(scan, image)
    write_nifti(mask, lung)
    return image, lung


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Three scans of one patient: day 0, day 200 (moved and smaller), day 400."""
    folder = tmp_path_factory.mktemp("source")
    write_scan(folder, "a")
    write_scan(folder, "b", shift_mm=(8.0, 5.0, -6.0), scale=0.96)
    write_scan(folder, "c", shift_mm=(-4.0, 2.0, 3.0), scale=0.95)
    return folder


@pytest.fixture(scope="module")
def demo() -> Profile:
    return load_profile(PROFILES / "demo.yaml")


@pytest.fixture(scope="module")
def tiny() -> Profile:
    return load_profile(PROFILES / "tiny.yaml")


def inputs(folder: Path, names: str = "abc") -> list[ScanInput]:
    return [ScanInput(i, 200 * i, folder / f"{n}.nii.gz", folder / f"{n}_lung.nii.gz") for i, n in enumerate(names)]


def arrays(prep: Path, index: int) -> tuple[np.ndarray, np.ndarray]:
    folder = prep / NAME / str(index)
    hu = np.load(folder / "hu.npy")
    return hu, np.unpackbits(np.load(folder / "mask.npy"), count=hu.size).reshape(hu.shape).astype(bool)


def test_a_patient_is_prepared_on_one_grid_with_the_baselines_background(source, demo, tmp_path):
    result = prepare_patient(inputs(source), demo, tmp_path, pseudonym=NAME)
    assert [s.status for s in result.scans] == ["ok", "ok", "ok"]
    assert [s.baseline for s in result.scans] == [0, 0, 0]
    base, mask = arrays(tmp_path, 0)
    assert base.shape == demo.grid.size
    assert base.dtype == np.int16
    for index in (1, 2):
        hu, same_mask = arrays(tmp_path, index)
        np.testing.assert_array_equal(same_mask, mask)
        np.testing.assert_array_equal(hu[~mask], base[~mask])
        assert (hu[mask] != base[mask]).mean() > 0.9
        pair = result.scans[index].qc["pair"]
        assert pair["dice"] > 0.95
        assert pair["dice"] > pair["dice_before"]
        assert pair["ncc"] > pair["ncc_before"]
        assert np.corrcoef(hu[mask], base[mask])[0, 1] > 0.9
    record = json.loads((tmp_path / NAME / "1" / "step.json").read_text())
    extent = [n * s for n, s in zip(base.shape, record["spacing_mm"], strict=True)]
    scan, lung = chest(SIZE)
    for axis in range(3):
        inside = np.flatnonzero((lung.hu > 0).any(axis=tuple(a for a in range(3) if a != axis)))
        lung_mm = (inside[-1] - inside[0] + 1) * scan.spacing[axis]
        assert extent[axis] == pytest.approx(lung_mm + 2 * demo.fov.margin_mm)
    for index in range(3):
        assert Image.open(tmp_path / NAME / str(index) / "qc.png").size[0] > 500


def test_the_picture_shows_yellow_and_blue_before_and_grey_after(source, demo, tmp_path):
    prepare_patient(inputs(source, "ab"), demo, tmp_path, pseudonym=NAME)
    picture = np.asarray(Image.open(tmp_path / NAME / "1" / "qc.png").convert("RGB")).astype(int)
    step = PANEL + 10
    columns = [picture[:, 10 + i * step : 10 + i * step + PANEL] for i in range(3)]
    merges = [c[len(picture) // 4 : len(picture) // 2] for c in columns]  # the second of four rows: axial
    colour = [np.abs(m[..., 0] - m[..., 2]).mean() for m in merges]  # yellow against blue
    assert colour[1] < 0.5 * colour[0]
    assert colour[2] < 0.5 * colour[0]


def test_two_runs_give_equal_bytes_and_a_third_does_nothing(source, demo, tmp_path):
    results = [prepare_patient(inputs(source, "ab"), demo, tmp_path / run, pseudonym=NAME) for run in "xy"]
    files = sorted(p.relative_to(tmp_path / "x") for p in (tmp_path / "x").rglob("*") if p.is_file())
    assert len(files) == 12
    for file in files:
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes(), file
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "x").rglob("*")}
    again = prepare_patient(inputs(source, "ab"), demo, tmp_path / "x", pseudonym=NAME)
    assert all(s.reused for s in again.scans)
    assert [s.content_sha256 for s in again.scans] == [s.content_sha256 for s in results[0].scans]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "x").rglob("*")} == times


def test_only_what_a_change_touches_is_made_again(source, tiny, tmp_path):
    prepare_patient(inputs(source, "ab"), tiny, tmp_path, pseudonym=NAME)

    def reused(profile: Profile, scans: list[ScanInput]) -> list[bool]:
        return [s.reused for s in prepare_patient(scans, profile, tmp_path, pseudonym=NAME).scans]

    window = replace(tiny, window_hu=(-900.0, 300.0))
    assert reused(window, inputs(source, "ab")) == [True, True]
    assert json.loads((tmp_path / NAME / "0" / "step.json").read_text())["profile_sha256"] == window.sha256
    more = replace(tiny, registration=replace(tiny.registration, affine_iterations=5))
    assert reused(more, inputs(source, "ab")) == [True, False]
    assert reused(more, inputs(source, "abc")) == [True, True, False]
    (tmp_path / NAME / "1" / "hu.npy").unlink()
    assert reused(more, inputs(source, "abc")) == [True, False, True]
    assert reused(replace(more, grid=replace(more.grid, depth=20)), inputs(source, "abc")) == [False, False, False]
    later = [replace(s, days=s.days * 2) for s in inputs(source, "abc")]
    assert reused(replace(more, grid=replace(more.grid, depth=20)), later) == [True, True, True]
    assert json.loads((tmp_path / NAME / "2" / "step.json").read_text())["days"] == 800


def test_a_bad_scan_is_refused_with_its_code_and_the_next_becomes_the_baseline(source, tiny, tmp_path):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes((source / "a.nii.gz").read_bytes()[:2000])
    scans = inputs(source)
    scans[0] = replace(scans[0], path=broken)
    result = prepare_patient(scans, tiny, tmp_path / "prep", pseudonym=NAME)
    assert (result.scans[0].status, result.scans[0].code) == ("refused", "E_CORRUPT")
    assert [s.baseline for s in result.scans] == [0, 1, 1]
    assert all(s.content_sha256 for s in result.scans[1:])
    again = prepare_patient(scans, tiny, tmp_path / "prep", pseudonym=NAME)
    assert all(s.reused for s in again.scans)
    retried = prepare_patient(scans, tiny, tmp_path / "prep", pseudonym=NAME, retry=range(3))
    assert [s.reused for s in retried.scans] == [False, True, True]
    repaired = prepare_patient(inputs(source), tiny, tmp_path / "prep", pseudonym=NAME)
    assert [s.baseline for s in repaired.scans] == [0, 0, 0]
    assert [s.reused for s in repaired.scans] == [False, False, False]


def test_a_rejected_baseline_gives_way_to_the_next_scan(source, tiny, tmp_path):
    prepare_patient(inputs(source), tiny, tmp_path, pseudonym=NAME)
    rejected = {recipe(tmp_path, 0)}
    result = prepare_patient(inputs(source), tiny, tmp_path, pseudonym=NAME, rejected=rejected)
    assert [s.baseline for s in result.scans] == [0, 1, 1]
    assert [s.reused for s in result.scans] == [True, False, False]
    (tmp_path / NAME / "0" / "step.json").unlink()
    result = prepare_patient(inputs(source), tiny, tmp_path, pseudonym=NAME, rejected=rejected)
    assert [s.baseline for s in result.scans] == [0, 1, 1]
    assert [s.reused for s in result.scans] == [False, True, True]


def recipe(prep: Path, index: int) -> str:
    return json.loads((prep / NAME / str(index) / "step.json").read_text())["recipe_sha256"]


def test_a_rejection_holds_under_another_baseline_and_not_for_another_export(source, tiny, tmp_path):
    folder = shutil.copytree(source, tmp_path / "source")
    prep = tmp_path / "prep"
    prepare_patient(inputs(folder), tiny, prep, pseudonym=NAME)
    rejected = {recipe(prep, 0), recipe(prep, 1)}
    result = prepare_patient(inputs(folder), tiny, prep, pseudonym=NAME, rejected=rejected)
    assert [s.baseline for s in result.scans] == [0, 0, 2]
    assert [s.reused for s in result.scans] == [True, True, False]
    write_scan(folder, "a", scale=0.99)
    result = prepare_patient(inputs(folder), tiny, prep, pseudonym=NAME, rejected=rejected)
    assert [s.baseline for s in result.scans] == [0, 0, 0]
    assert [s.reused for s in result.scans] == [False, True, False]


@pytest.mark.parametrize("gone", [0, 1])
def test_what_was_made_of_a_scan_stays_while_its_files_cannot_be_opened(source, tiny, tmp_path, gone):
    folder = shutil.copytree(source, tmp_path / "source")
    prep = tmp_path / "prep"
    scans = inputs(folder)
    prepare_patient(scans, tiny, prep, pseudonym=NAME)
    before = {p: p.read_bytes() for p in prep.rglob("*") if p.is_file()}
    lost = scans[gone].path.rename(tmp_path / "elsewhere")
    told = [replace(s, source_sha256="f" * 64) if s.index == gone else s for s in scans]  # hashed before it went away
    for these in (scans, told):
        result = prepare_patient(these, tiny, prep, pseudonym=NAME)
        assert [s.status for s in result.scans][gone:] == ["failed"] * (3 if gone == 0 else 1) + ["ok"] * gone
        assert result.scans[gone].code == "E_READ"
        assert str(tmp_path) not in result.scans[gone].detail
        assert {p: p.read_bytes() for p in prep.rglob("*") if p.is_file()} == before
    lost.rename(scans[gone].path)
    assert all(s.reused for s in prepare_patient(scans, tiny, prep, pseudonym=NAME).scans)


def test_a_series_that_vanishes_while_it_is_read_is_no_damaged_one(demo, tmp_path):
    scan, _ = chest(SIZE)
    write_series(tmp_path / "series", scan)
    threshold = replace(demo, segmentation=replace(demo.segmentation, method="threshold"))
    files = tuple(sorted((tmp_path / "series").iterdir()))
    job = ScanInput(0, 0, tmp_path / "series", kind="dicom", source_sha256="f" * 64, files=files)
    shutil.move(tmp_path / "series", tmp_path / "gone")
    result = prepare_patient([job], threshold, tmp_path / "prep", pseudonym=NAME)
    assert (result.scans[0].status, result.scans[0].code) == ("failed", "E_READ")
    shutil.move(tmp_path / "gone", tmp_path / "series")
    files[3].write_bytes(files[3].read_bytes()[:400])
    result = prepare_patient([job], threshold, tmp_path / "prep", pseudonym=NAME)
    assert (result.scans[0].status, result.scans[0].code) == ("refused", "E_CORRUPT")


def test_the_reason_of_a_refusal_is_told_by_every_run(source, tiny, tmp_path):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes((source / "a.nii.gz").read_bytes()[:2000])
    scans = [replace(inputs(source, "a")[0], path=broken)]
    first, second = (prepare_patient(scans, tiny, tmp_path / "prep", pseudonym=NAME).scans[0] for _ in range(2))
    assert second.reused
    assert second.detail == first.detail != ""


def test_a_pair_that_cannot_be_registered_waits_for_a_person_with_its_lungs_centred(source, tiny, tmp_path):
    coarse = replace(tiny.registration, backend="corrfield", spacing_mm=12.0)  # fewer than 100 places to hold on to
    result = prepare_patient(inputs(source, "ab"), replace(tiny, registration=coarse), tmp_path, pseudonym=NAME)
    scan = result.scans[1]
    assert (scan.status, scan.grade, scan.code) == ("review", "FAIL", "V_REG")
    assert "keypoints" in scan.qc["pair"]["gave_up"]
    assert scan.qc["pair"]["dice"] == scan.qc["pair"]["dice_before"] > 0.8
    assert (tmp_path / NAME / "1" / "qc.png").is_file()
    assert np.corrcoef(arrays(tmp_path, 1)[0].ravel(), arrays(tmp_path, 0)[0].ravel())[0, 1] > 0.8


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), RuntimeError("CUDA out of memory.")],
)
def test_too_little_memory_is_known_by_its_words(error):
    assert _is_out_of_memory(error)
    assert not _is_out_of_memory(RuntimeError("an axis is out of range"))


def test_numbers_that_were_changed_are_not_believed(source, tiny, tmp_path):
    first = prepare_patient(inputs(source, "ab"), tiny, tmp_path, pseudonym=NAME)
    path = tmp_path / NAME / "1" / "qc.json"
    path.write_text(path.read_text().replace("lung_ml", "lung_mm"))
    again = prepare_patient(inputs(source, "ab"), tiny, tmp_path, pseudonym=NAME)
    assert [s.reused for s in again.scans] == [True, False]
    assert again.scans[1].qc == first.scans[1].qc


def test_a_scan_that_left_the_cohort_leaves_the_folder(source, tiny, tmp_path):
    prepare_patient(inputs(source), tiny, tmp_path, pseudonym=NAME)
    prepare_patient(inputs(source, "ab"), tiny, tmp_path, pseudonym=NAME)
    assert sorted(p.name for p in (tmp_path / NAME).iterdir()) == ["0", "1"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_thickness_mm": 2.5}, "E_THICK"),
        ({"max_thickness_mm": 2.5, "thick": "warn"}, "W_THICK"),
        ({"min_coverage_mm": 400.0, "cut_field": "refuse"}, "E_FOV"),
        ({"min_coverage_mm": 400.0, "cut_field": "warn"}, "W_MASK_FOV"),
        ({"max_lung_ml": 2000.0}, "V_VOLUME"),
        ({"min_lung_ml": 6000.0}, "V_VOLUME"),
    ],
)
def test_limits_refuse_review_or_warn_as_the_profile_says(source, tiny, tmp_path, limits, expected):
    profile = replace(tiny, limits=replace(tiny.limits, **limits))
    scan = prepare_patient(inputs(source, "a"), profile, tmp_path, pseudonym=NAME).scans[0]
    assert expected in scan.codes
    assert scan.status == {"E": "refused", "V": "review", "W": "ok"}[expected[0]]
    assert bool(scan.content_sha256) == (scan.status != "refused")
    again = prepare_patient(inputs(source, "a"), profile, tmp_path, pseudonym=NAME).scans[0]
    told = {"E_THICK": "10 mm, at most 2.5 mm expected", "E_FOV": "the scan: 300 mm along z"}
    assert (again.reused, again.detail) == (True, told.get(expected, ""))


def test_one_lung_a_cut_field_and_a_wrong_intercept_are_seen(tiny, tmp_path):
    scan, mask = chest(SIZE)
    half = mask.hu.copy()
    half[:, :, SIZE[2] // 2 :] = 0
    cut = slice(8, None)
    cases = {
        "one": (scan.hu, half, "E_ONELUNG"),
        "cut": (scan.hu[cut], mask.hu[cut], "E_FOV"),
        "hu": (scan.hu + 80, mask.hu, "E_HU"),
    }
    profile = replace(tiny, limits=replace(tiny.limits, cut_field="refuse"))
    for name, (hu, lung, code) in cases.items():
        write_nifti(Volume(hu.astype(np.int16), scan.spacing, scan.origin), tmp_path / f"{name}.nii.gz")
        write_nifti(Volume(lung, scan.spacing, scan.origin), tmp_path / f"{name}_lung.nii.gz")
        given = ScanInput(0, 0, tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_lung.nii.gz")
        result = prepare_patient([given], profile, tmp_path / name, pseudonym=NAME).scans[0]
        assert (result.status, result.code) == ("refused", code)


def test_a_missing_mask_is_refused_under_provided_and_ignored_under_threshold(source, tiny, tmp_path):
    scan = replace(inputs(source, "a")[0], mask_path=None)
    assert prepare_patient([scan], tiny, tmp_path / "p", pseudonym=NAME).scans[0].code == "E_MASK"
    threshold = replace(tiny, segmentation=replace(tiny.segmentation, method="threshold"))
    result = prepare_patient([scan], threshold, tmp_path / "t", pseudonym=NAME).scans[0]
    assert (result.status, result.grade) == ("review", "REVIEW")
    assert "V_MASK" in result.codes


def test_a_scan_with_much_less_lung_than_all_others_goes_to_review(source, tiny, tmp_path):
    image, lung = write_scan(tmp_path, "small", scale=0.8)
    scans = [*inputs(source), ScanInput(3, 900, image, lung)]
    result = prepare_patient(scans, tiny, tmp_path / "prep", pseudonym=NAME)
    assert ["V_EXPIR" in s.codes for s in result.scans] == [False, False, False, True]
    assert result.scans[3].status == "review"
    assert prepare_patient(scans, tiny, tmp_path / "prep", pseudonym=NAME).scans[3].codes == result.scans[3].codes


def test_the_manifest_is_rebuilt_from_the_records_and_keeps_failed_scans(source, tiny, tmp_path):
    prepare_patient(inputs(source, "ab"), tiny, tmp_path, pseudonym=NAME)
    step = StepInHand(ScanInput(0, 0, tmp_path / "lost"), "segment", Keys("a" * 64, "b" * 64), None)
    record_failure(step, tiny, tmp_path / "ffffffffffff", "OUT_OF_MEMORY")
    assert len(write_manifest(tmp_path)) == 3
    first = (tmp_path / "manifest.csv").read_bytes()
    lines = first.decode().splitlines()
    assert lines[1].startswith(f"{NAME},0,0,0,ok,")
    assert lines[3].startswith("ffffffffffff,0,0,0,failed,OUT_OF_MEMORY,")
    (tmp_path / "manifest.csv").unlink()
    write_manifest(tmp_path)
    assert (tmp_path / "manifest.csv").read_bytes() == first
    head = json.loads((tmp_path / "manifest.json").read_text())
    assert head["profile_sha256"] == tiny.sha256
    assert profile_from(head["profile"]) == tiny


def test_what_a_profile_needs_and_the_site_lacks_stops_before_any_work(source, tiny, tmp_path):
    asked = profile_to_plain(tiny)
    backend = profile_from({**asked, "registration": {**asked["registration"], "backend": "nobody"}})
    network = {**asked["segmentation"], "method": "lungmask_r231", "weights_sha256": "a" * 64}
    for profile, code in ((backend, "E_UNSUPPORTED"), (profile_from({**asked, "segmentation": network}), "E_WEIGHTS")):
        with pytest.raises(FourdvqError, match=code):
            prepare_patient(inputs(source), profile, tmp_path / "prep", pseudonym=NAME)
    assert not (tmp_path / "prep").exists()


def test_nearest_interpolation_a_full_field_and_a_soft_edge_are_what_they_say(source, tiny, tmp_path):
    plain = profile_to_plain(tiny)
    nearest = profile_from(
        {**plain, "fov": {"mode": "full"}, "resample": {"interpolation": "nearest", "antialias": False}}
    )
    prepare_patient(inputs(source, "a"), nearest, tmp_path / "n", pseudonym=NAME)
    hu, _ = arrays(tmp_path / "n", 0)
    scan = read_volume(source / "a.nii.gz")
    record = json.loads((tmp_path / "n" / NAME / "0" / "step.json").read_text())
    extent = [n * s for n, s in zip(SIZE, scan.spacing, strict=True)]
    assert [n * s for n, s in zip(hu.shape, record["spacing_mm"], strict=True)] == pytest.approx(extent, rel=1e-5)
    at = [np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1) for n, m in zip(hu.shape, SIZE, strict=True)]
    assert (hu == scan.hu[np.ix_(*at)]).mean() > 0.95
    soft = profile_from({**plain, "outside_lung": {"feather_voxels": 2}})
    prepare_patient(inputs(source, "ab"), soft, tmp_path / "s", pseudonym=NAME)
    prepare_patient(inputs(source, "ab"), tiny, tmp_path / "h", pseudonym=NAME)
    assert not np.array_equal(arrays(tmp_path / "s", 1)[0], arrays(tmp_path / "h", 1)[0])


def test_nothing_of_a_header_a_path_or_a_table_reaches_an_output(tiny, tmp_path):
    """Canaries in PatientID, name, dates, UIDs, accession number, folder names and the id of the table."""
    scan, _ = chest((64, 48, 48))
    thin = Volume(scan.hu, scan.spacing, scan.origin)
    home = tmp_path / "CANARY-FOLDER" / CANARY_ID
    write_series(home / "1", thin, study="CANARYUID")
    later = Volume(scan.hu + 1, scan.spacing, scan.origin)
    write_series(home / "2", later, study="CANARYUID2", study_date="20160229")
    (home / "2" / "im000000.dcm").write_bytes(b"\0" * 128 + b"DICM CANARY broken")
    heads = [pydicom.dcmread(max((home / name).iterdir()), stop_before_pixels=True) for name in "12"]
    uids = [str(head[name].value) for head in heads for name in ("StudyInstanceUID", "SeriesInstanceUID")]
    assert len(set(uids)) == 4
    clinical = tmp_path / "clinical.csv"
    clinical.write_text(f"patient_id,age,sex,smoking,time_days,event\n{CANARY_ID},60,M,ever,900,censored\n")
    cohort = load_cohort(clinical, None, tmp_path / "CANARY-FOLDER")
    hashes = SourceHashes(tmp_path / "hashes.json")
    threshold = replace(tiny, segmentation=replace(tiny.segmentation, method="threshold"))
    scans = scan_inputs(cohort, CANARY_ID, hashes)
    hashes.save()
    result = prepare_patient(scans, threshold, tmp_path / "prep", pseudonym=NAME)
    assert [s.status for s in result.scans] == ["review", "refused"]
    assert result.scans[1].code == "E_CORRUPT"
    write_manifest(tmp_path / "prep")
    words = [CANARY_ID, "Canary", "CANARY", CANARY_DATE, "20160229", "19500101", "B30f", "insp", *uids]
    written = [p for p in (tmp_path / "prep").rglob("*") if p.is_file() and p.suffix != ".npy"]
    for file in [*written, tmp_path / "hashes.json"]:
        content = file.read_bytes()
        assert not [word for word in words if word.encode() in content], file
        if file.suffix in (".json", ".csv"):
            assert not re.search(rb"(?<![\w.])2015(?!\w)", content), file  # a year, and no digits of a hash
    assert SourceHashes(tmp_path / "hashes.json").of(home / "1") == SourceHashes().of(home / "1")


def test_a_run_that_was_killed_goes_on_and_ends_like_one_that_was_not(source, demo, tmp_path):
    code = (
        "import sys; from pathlib import Path; from fourdvq.preprocessing.pipeline import ScanInput, prepare_patient;"
        "from fourdvq.preprocessing.profile import load_profile; f, out, p = map(Path, sys.argv[1:]);"
        "s = [ScanInput(i, 200 * i, f / f'{n}.nii.gz', f / f'{n}_lung.nii.gz') for i, n in enumerate('abc')];"
        f"prepare_patient(s, load_profile(p), out, pseudonym='{NAME}')"
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, source, killed, PROFILES / "demo.yaml"])
    deadline = time.monotonic() + 60
    while not (killed / NAME / "0" / "hu.npy").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    prepare_patient(inputs(source), demo, killed, pseudonym=NAME)
    prepare_patient(inputs(source), demo, tmp_path / "whole", pseudonym=NAME)
    for file in (p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        assert (killed / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()


def test_a_full_disk_stops_the_run_to_be_resumed(source, tiny, tmp_path):
    """No file of that process may grow beyond 24 kB, which a file system without space answers in the same way."""
    code = (
        "import resource, sys; from pathlib import Path; from fourdvq.errors import TemporaryStop;"
        "from fourdvq.preprocessing.pipeline import ScanInput, prepare_patient;"
        "from fourdvq.preprocessing.profile import load_profile; f, out, p = map(Path, sys.argv[1:]);"
        "s = [ScanInput(i, 200 * i, f / f'{n}.nii.gz', f / f'{n}_lung.nii.gz') for i, n in enumerate('abc')];"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))\n"
        f"try: prepare_patient(s, load_profile(p), out, pseudonym='{NAME}')\n"
        "except TemporaryStop as stop: print(stop.code)"
    )
    words = [sys.executable, "-c", code, source, tmp_path, PROFILES / "tiny.yaml"]
    # Python ignores SIGXFSZ, so that a write beyond the limit fails instead of ending the process.
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "DISK_FULL\n"
    assert [p.name for p in (tmp_path / NAME).rglob("*") if p.name in ("step.json", "hu.npy")] == []
    result = prepare_patient(inputs(source), tiny, tmp_path, pseudonym=NAME)
    assert [s.status for s in result.scans] == ["ok", "ok", "ok"]
    assert not list(tmp_path.rglob(".tmp-*"))
