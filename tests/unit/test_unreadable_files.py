"""Files that are there and cannot be read cost their scan a wait, the site a word, and nobody else anything.

A link to this process's own memory is a regular file whose first byte cannot be read: EIO, for root too, as from a
share that failed. Missing rights need an account that has none: root gives up its power to override them.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client_calls import call
from dicom_factory import write_series
from site_cases import PATIENTS, hospital, new_site, tiny_profile
from synthetic_lungs import chest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that fails as a share does"),
]

CLIENT = Path(sys.executable).parent / "fourdvq-client"
WITHOUT_POWER = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with the data of two patients, two scans each, and their prepared site."""
    folder = tmp_path_factory.mktemp("prepared")
    data = hospital(folder / "data", patients=PATIENTS[:2], scans=2)
    assert call(new_site(folder / "site", data), "preprocess", "--workers", "1")[0] == 0
    return folder


@pytest.fixture
def site(prepared, tmp_path) -> tuple[Path, Path]:
    """Site folder and data folder, as if they had been prepared here."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "site" / "site.yaml"
    settings.write_text(settings.read_text().replace(str(prepared), str(tmp_path)))
    assert call(tmp_path / "site", "preprocess", "--workers", "1")[1]["reused"] == 4
    return tmp_path / "site", tmp_path / "data"


def fail_to_read(path: Path) -> Path:
    """Put the file aside; what is there instead cannot be read. Returns where the file is now."""
    aside = path.rename(path.with_name(f"{path.name}.aside"))
    path.symlink_to("/proc/self/mem")
    return aside


def prepared_files(root: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted((root / "prep").glob("*/*/*"))}


@pytest.mark.parametrize("name", ["0.nii.gz", "1.nii.gz", "1_lung.nii.gz"])
@pytest.mark.parametrize("hashed_before", [True, False])
def test_a_scan_that_cannot_be_read_waits_and_the_others_go_on(site, name, hashed_before):
    root, data = site
    before = prepared_files(root)
    path = data / "scans" / PATIENTS[0] / name
    aside = fail_to_read(path)
    if not hashed_before:
        (root / "state" / "source_hashes.json").unlink()
    code, found, err = call(root, "scan")
    assert code == 3
    assert [f["code"] for f in found["findings"]] == ["E_READ"]
    assert found["scans"] == 4
    assert PATIENTS[0] not in json.dumps(found) + err
    code, found, err = call(root, "preprocess", "--workers", "1")
    assert code == 3
    assert found["by_code"]["E_READ"] >= 1
    assert found["patients"] == 2
    assert PATIENTS[0] not in json.dumps(found) + err
    assert prepared_files(root) == before
    path.unlink()
    aside.rename(path)
    code, found, _ = call(root, "preprocess", "--workers", "1")
    assert (code, found["reused"], found["scans"]) == (0, 4, 4)


@pytest.mark.parametrize("name", ["clinical.csv", "scans.csv"])
@pytest.mark.parametrize("verb", ["scan", "preprocess"])
def test_a_table_that_cannot_be_read_is_named(site, name, verb):
    root, data = site
    fail_to_read(data / name)
    code, error, _ = call(root, verb)
    assert (code, error["code"], error["where"]) == (75, "E_STORAGE", str(data / name))
    assert error["fix"]
    code, found, _ = call(root, "check", "--data")
    assert code != 0
    assert [c["name"] for c in found["checks"] if c["code"] == "E_STORAGE"] == ["tables"]


# --- rights ----------------------------------------------------------------------------------------------------------


def powerless(root: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a command of an account that may not override rights."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root can read everything here")
    without = WITHOUT_POWER if os.geteuid() == 0 else ()
    command = [*without, str(CLIENT), "--workdir", str(root), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert "Traceback" not in done.stderr
    assert not any(patient in done.stdout + done.stderr for patient in PATIENTS)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("what", ["scan", "folder"])
def test_without_a_right_to_read_a_scan_it_is_a_finding_and_a_failed_row(site, what):
    root, data = site
    before = prepared_files(root)
    path = data / "scans" / PATIENTS[0]
    path = path / "1.nii.gz" if what == "scan" else path
    (root / "state" / "source_hashes.json").unlink()
    path.chmod(0)
    try:
        code, found = powerless(root, "scan")
        assert (code, {f["code"] for f in found["findings"]}) == (3, {"E_READ"})
        code, found = powerless(root, "preprocess", "--workers", "1")
        assert (code, found["by_status"]) == (3, {"failed": 1, "ok": 3} if what == "scan" else {"failed": 2, "ok": 2})
    finally:
        path.chmod(0o755)
    assert prepared_files(root) == before
    with (root / "findings.csv").open(newline="") as stream:
        assert {row["patient_id"] for row in csv.DictReader(stream)} == {PATIENTS[0]}


@pytest.mark.parametrize("what", ["slice", "series"])
def test_without_a_right_to_read_a_dicom_series_or_a_slice_of_it_the_scan_waits(tmp_path, what):
    data = hospital(tmp_path / "data", patients=PATIENTS[:1], scans=2)
    rows = [f"{PATIENTS[0]},{k},scans/series{k},{200 * k}" for k in range(2)]
    (data / "scans.csv").write_text("\n".join(["patient_id,scan_id,path,days_from_baseline", *rows, ""]))
    for k in range(2):
        write_series(data / "scans" / f"series{k}", chest((20, 32, 32), noise=10 + k)[0])
    root = new_site(tmp_path / "site", data, profile={**tiny_profile(), "segmentation": {"method": "threshold"}})
    assert call(root, "preprocess", "--workers", "1")[1]["scans"] == 2
    before = prepared_files(root)
    path = data / "scans" / "series1"
    path = sorted(path.iterdir())[7] if what == "slice" else path
    path.chmod(0)
    (root / "private" / "headers").unlink()
    (root / "state" / "source_hashes.json").unlink()
    try:
        code, found = powerless(root, "scan")
        assert (code, [f["code"] for f in found["findings"] if f["code"].startswith("E_")]) == (3, ["E_READ"])
        code, found = powerless(root, "preprocess", "--workers", "1")
        assert (code, found["by_status"]["failed"], found["by_code"]["E_READ"]) == (3, 1, 1)
    finally:
        path.chmod(0o755)
    assert prepared_files(root) == before
    assert call(root, "preprocess", "--workers", "1")[1]["reused"] == 2


@pytest.mark.parametrize(
    ("place", "verb", "where"),
    [
        ("prep/manifest.csv", ("qc", "list"), "prep/manifest.csv"),
        ("prep", ("preprocess",), "prep"),
        ("private", ("scan",), "private"),
        ("private/patients.csv", ("qc", "approve", "somebody"), "private/patients.csv"),
        ("state", ("preprocess",), "state"),
        ("profile.json", ("preprocess",), "profile.json"),
    ],
)
def test_without_a_right_a_part_of_the_site_folder_is_named_and_the_doctor_goes_on(site, place, verb, where):
    root, _ = site
    path = root / place
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        code, error = powerless(root, *verb)
        checked, found = powerless(root, "check", "--data")
    finally:
        path.chmod(mode)
    assert (code, error["code"]) == (1, "E_RIGHTS")
    assert error["where"].removeprefix(f"{root.resolve()}/").startswith(where)
    assert error["fix"]
    assert len(found["checks"]) > 10
    if place not in ("state", "private/patients.csv"):  # what the doctor does not look at
        assert checked != 0
        assert "E_RIGHTS" in [c["code"] for c in found["checks"]]
