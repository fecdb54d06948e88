"""Canaries at the door: names, ids, dates, UIDs and paths go into the real commands, and come out nowhere else.

Two places may hold them: private/ and findings.csv, both for the owner alone; site.yaml names the folders, because a
person wrote them there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from dicom_factory import write_series
from fourdvq import console
from fourdvq.data.volume import Volume, write_nifti
from fourdvq.preprocessing.inputs import ScanInput, without_paths
from fourdvq_client.cli import app
from synthetic_lungs import chest

IDS = ("CANARY-PATIENT-4711", "CANARY-PATIENT-4712")
DATES = ("20150301", "20160229", "19500101", "2015-03-01", "2016-02-29")
TEXTS = ("CANARY", "Canary", "Catharina", "CanaryHospital", "CanaryDoctor", "CanaryScanner", "CANARYKERNEL")
ALLOWED = ("findings.csv", "private/", "site.yaml", "keys/")


def identify(i: int, data: pydicom.Dataset) -> None:
    """Everything that a real header holds about a person, and more."""
    data.InstitutionName, data.ReferringPhysicianName = "CanaryHospital", "CanaryDoctor"
    data.Manufacturer, data.StationName = "CanaryScanner", "CANARY-CT-1"
    data.ConvolutionKernel, data.StudyDescription = "CANARYKERNEL", "Canary study"
    data.SeriesDescription, data.ProtocolName = "Canary Catharina insp", "Canary protocol"
    data.PatientComments, data.OtherPatientIDs = "Canary comment", "CANARY-OTHER"
    data.AcquisitionDate = data.SeriesDate = data.StudyDate
    data.add_new((0x0029, 0x0010), "LO", "CANARY PRIVATE")
    data.add_new((0x0029, 0x1001), "LO", "Canary private value")


def write_odd_mask(mask: Volume, path: Path) -> None:
    """A NIfTI of which ITK warns with its path: an sform alone, a little longer than the voxel sizes."""
    write_nifti(mask, path)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<h", raw, 252, 0)
    struct.pack_into("<f", raw, 280, 1.0003 * struct.unpack_from("<f", raw, 280)[0])
    path.write_bytes(raw)


def hospital(folder: Path) -> Path:
    """Two patients of two scans, one of which has a damaged file; a wrong row; everything under a telling path."""
    scans = folder / "CANARY FOLDER of Catharina"
    number = 0
    for patient in IDS:
        for date in DATES[:2]:
            number += 1
            scan, mask = chest((48, 48, 48), seed=1, noise=10 + number)
            thin = Volume(scan.hu, (6.25, 5.0, 5.0), scan.origin)
            write_odd_mask(replace(mask, spacing=thin.spacing), scans / patient / f"Catharina {date}_lung.nii")
            write_series(scans / patient / f"Catharina {date}", thin, edit=identify, patient_id=patient,
                         study_date=date, study=f"CANARY{number}")  # fmt: skip
    damaged = sorted((scans / IDS[1] / f"Catharina {DATES[1]}").iterdir())[4]
    damaged.write_bytes(damaged.read_bytes()[:300])
    rows = [f"{IDS[0]},60,M,ever,900,censored", f"{IDS[1]},60,M,ever,900,censored", "CANARY-ROW,61,M,ever,-9,death"]
    (folder / "clinical.csv").write_text("\n".join(["patient_id,age,sex,smoking,time_days,event", *rows]) + "\n")
    profile = Path(__file__).parents[2] / "configs" / "preprocessing" / "tiny.yaml"
    (folder / "profile.yaml").write_text(profile.read_text())
    return scans


@dataclass(frozen=True)
class Outcome:
    """A site after the commands, and what they printed, by command."""

    root: Path
    printed: dict[str, str]
    codes: dict[str, int]
    uids: tuple[str, ...]


@contextlib.contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """All that this process and those it starts print, also past Python's own streams, as ITK does."""
    with path.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        terminal = [os.dup(1), os.dup(2)]
        try:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            yield
        finally:
            stream.flush()
            os.dup2(terminal[0], 1)
            os.dup2(terminal[1], 2)
            os.close(terminal[0])
            os.close(terminal[1])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("canary")
    scans = hospital(folder)
    root = folder / "site"
    data = (
        "--scans",
        str(scans),
        "--clinical",
        str(folder / "clinical.csv"),
        "--profile",
        str(folder / "profile.yaml"),
    )
    commands = {
        "init": ("init", "--site", "leuven", "--template", "demo", *data),
        "scan": ("scan",),
        "scan --json": ("scan", "--json"),
        "preprocess": ("preprocess", "--workers", "1", "-v"),
        "preprocess --json": ("preprocess", "--retry-failed", "--json"),
        "qc list": ("qc", "list"),
        "qc list --json": ("qc", "list", "--json"),
        "qc approve": ("qc", "approve", "--all", "--by", "Dr Test"),
        "qc reject": ("qc", "reject", f"{IDS[0]}/1", "--reason", "moved", "--by", "Dr Test"),
        "preprocess --verify": ("preprocess", "--verify"),
        "qc open": ("qc", "open"),
    }
    printed, codes = {}, {}
    for number, (name, words) in enumerate(commands.items()):
        with printed_to(folder / f"printed {number}"):
            codes[name] = console.run(app, [*words, "--workdir", str(root)], "fourdvq-client")
        printed[name] = (folder / f"printed {number}").read_text()
    heads = [pydicom.dcmread(next(iter(f.iterdir())), stop_before_pixels=True, force=True) for f in scans.glob("*/*/")]
    uids = {str(getattr(h, n)) for h in heads for n in ("StudyInstanceUID", "SeriesInstanceUID") if n in h}
    return Outcome(root, printed, codes, tuple(sorted(uids)))


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of a site with its bytes; of what is packed, the unpacked bytes too."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        data = path.read_bytes()
        yield path.relative_to(root).as_posix(), data
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(path) as archive:
                yield path.relative_to(root).as_posix(), b"".join(archive.read(n) for n in archive.namelist())


def words_of(outcome: Outcome) -> tuple[str, ...]:
    return (*IDS, *TEXTS, *outcome.uids)


def test_the_commands_did_their_work_with_the_canaries_in_hand(outcome):
    assert outcome.codes == {
        "init": 0, "scan": 3, "scan --json": 3, "preprocess": 3, "preprocess --json": 3, "qc list": 0,
        "qc list --json": 0, "qc approve": 0, "qc reject": 0, "preprocess --verify": 0, "qc open": 0,
    }, outcome.printed  # fmt: skip
    found = json.loads(outcome.printed["scan --json"].splitlines()[-1])
    assert (found["scans"], found["by_code"]["E_CORRUPT"]) == (4, 1)
    made = json.loads(outcome.printed["preprocess --json"].splitlines()[-1])
    assert made["by_status"] == {"ok": 2, "refused": 1, "review": 1}
    assert len(list(outcome.root.glob("prep/*/*/hu.npy"))) == 3
    assert len(outcome.uids) >= 4


def test_no_file_of_the_site_holds_a_name_an_id_or_a_uid(outcome):
    words = words_of(outcome)
    for name, data in contents(outcome.root):
        if not name.startswith(ALLOWED):
            assert not [word for word in words if word.encode() in data], name
            assert not [word for word in words if word in name], name


def test_no_text_file_of_the_site_holds_a_date_of_a_patient(outcome):
    for name, data in contents(outcome.root):
        if not name.startswith(ALLOWED) and not name.endswith((".npy", ".png", ".html")):
            assert not [date for date in DATES if date.encode() in data], name


def test_no_command_prints_a_name_an_id_a_date_a_uid_or_a_path_of_a_patient(outcome):
    for name, text in outcome.printed.items():
        assert not [word for word in (*words_of(outcome), *DATES) if word in text], (name, text)


def test_what_is_written_for_the_owner_alone_holds_them_and_nobody_else_can_read_it(outcome):
    """The negative control: the canaries were there to be found, and the search finds them where they may be."""
    private = {name: data for name, data in contents(outcome.root) if name.startswith(ALLOWED[:2])}
    assert IDS[0].encode() in private["private/patients.csv"]
    assert b"CANARY-ROW" in private["findings.csv"]
    assert b"CANARY FOLDER" in private["private/series.csv"]
    for name in private:
        assert (outcome.root / name).stat().st_mode & 0o077 == 0, name


def test_what_itk_would_print_past_python_is_seen(outcome, tmp_path):
    """The third control: with ITK's warnings on, the path of the odd mask is in what was printed."""
    mask = next(outcome.root.parent.glob("CANARY*/*/*_lung.nii"))
    sitk.ProcessObject.SetGlobalWarningDisplay(True)
    try:
        with printed_to(tmp_path / "printed"):
            sitk.ReadImage(str(mask))
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
    assert str(mask) in (tmp_path / "printed").read_text()


HOME = Path("/data/PACS/Jan Janssens 1950")
SCAN = ScanInput(0, 0, HOME / "scan 1.nii", mask_path=HOME / "O'Brien: lung.nii", files=(HOME / "a b" / "1 2.dcm",))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{SCAN.path} could not be read", "<path> could not be read"),
        (f"could not read {SCAN.path}, or {SCAN.mask_path}, twice", "could not read <path>, or <path>, twice"),
        (f"{SCAN.files[0]} in {HOME}", "<path> in <path>"),
        (f"OSError: [Errno 5] Input/output error: '{SCAN.path}'", "OSError: [Errno 5] Input/output error: '<path>'"),
        (f'OSError: no such file: "{SCAN.mask_path}"', 'OSError: no such file: "<path>"'),
        (f"ITK: {HOME}/other 2.nii: cut short", "ITK: <path>: cut short"),
        ("see '/data/Piet Peeters/3.nii' and\n/mnt/An Aerts/x y", "see '<path>' and\n<path>"),
        ("7 of 12 slices, 3/4 of the lung, 20 mg/ml", "7 of 12 slices, 3/4 of the lung, 20 mg/ml"),
    ],
)
def test_a_path_with_spaces_is_blanked_to_its_end_and_nothing_else_is(text, told):
    assert without_paths(text, SCAN) == told


def test_the_search_would_find_a_canary_in_every_kind_of_file(outcome, tmp_path):
    """The second control: planted on purpose, each is found."""
    (tmp_path / "a.json").write_text(json.dumps({"where": IDS[0]}))
    np.savez(tmp_path / "b.npz", text=np.frombuffer(b"Catharina", dtype=np.uint8))
    (tmp_path / "c.bin").write_bytes(b"\0\1" + outcome.uids[0].encode() + b"\0")
    words = words_of(outcome)
    found = {name for name, data in contents(tmp_path) if any(word.encode() in data for word in words)}
    assert found == {"a.json", "b.npz", "c.bin"}
