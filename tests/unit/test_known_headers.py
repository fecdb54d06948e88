"""Headers that a site remembers: an unchanged file is not opened again, and whatever changes is read again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_calls import call
from dicom_factory import CANARY_ID, CANARY_NAME, compress, rewrite, write_enhanced, write_series
from fourdvq.data import known_headers
from fourdvq.data.cohort import Cohort, load_cohort
from fourdvq.data.dicom import FolderScan, scan_folder
from fourdvq.data.dicom_file import PixelPlace, SliceHeader, read_headers
from fourdvq.data.dicom_studies import DicomOptions
from fourdvq.data.known_headers import KnownHeaders
from fourdvq.data.volume import Volume
from fourdvq.data.walk import walk_files
from fourdvq_client.preparation import read_cohort
from fourdvq_client.workspace import open_workspace
from site_cases import new_site
from synthetic_lungs import chest

DAY = 86_400 * 10**9
_watched: list[set[str]] = []


def _note_opening(event: str, arguments: tuple) -> None:
    if event == "open" and _watched and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _watched[-1].add(os.fsdecode(arguments[0]))


sys.addaudithook(_note_opening)


@contextmanager
def opened_below(folder: Path) -> Iterator[set[Path]]:
    """The files below `folder` that this process opens, in any way; filled at the end."""
    paths: set[Path] = set()
    _watched.append(set())
    try:
        yield paths
    finally:
        paths |= {p for p in map(Path, _watched.pop()) if p.is_relative_to(folder) and p.is_file()}


@pytest.fixture
def volume() -> Volume:
    scan, _ = chest((6, 8, 8))
    return Volume(scan.hu, (40.0, 45.0, 45.0), (-80.0, -70.0, -200.0))


@pytest.fixture
def export(tmp_path: Path, volume: Volume) -> Path:
    """Two series in folders of their own, two in one folder, an enhanced file, a damaged one, notes, an archive."""
    folder = tmp_path / "export"
    write_series(folder / "a", volume)
    write_series(folder / "b", volume, study="other")
    write_series(folder / "c", volume, study="third", series="1", prefix="x")
    write_series(folder / "c", volume, study="third", series="2", prefix="y")
    write_series(folder / "d", volume, study="scout", edit=lambda i, data: setattr(data, "ImageType", ["LOCALIZER"]))
    write_enhanced(folder / "e" / "all.dcm", volume)
    first = sorted((folder / "b").iterdir())[0]
    first.write_bytes(first.read_bytes()[:300])
    (folder / "a" / "note.txt").write_text("no image")
    (folder / "a" / "rest.zip").write_bytes(b"PK")
    return folder


def scanned(folder: Path, text: bytes = b"") -> tuple[FolderScan, bytes, set[Path]]:
    """The scan, what it leaves to the next one, and which files it opened."""
    known = KnownHeaders(text)
    with opened_below(folder) as opened:
        found = scan_folder(folder, None, known)
    return found, known.as_text(all_met=True), opened


def later(path: Path) -> None:
    """Set the time of change to another day, as a new version of a file has it."""
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + DAY))


def test_an_unchanged_export_is_scanned_from_memory_with_an_equal_result_and_no_file_opened(export):
    found, text, opened = scanned(export)
    assert found == scan_folder(export)
    assert len(opened) == len(walk_files(export).files) - 1  # an archive is never opened
    again, text_again, opened_again = scanned(export, text)
    assert (again, text_again, opened_again) == (found, text, set())
    assert {s.frame for c in again.candidates for s in c.slices if s.path.name == "all.dcm"} == set(range(6))
    assert (again.skipped["E_CORRUPT"], len(again.unreadable)) == (1, 1)


def test_a_scan_from_memory_has_nothing_new_to_keep(export):
    _, text, _ = scanned(export)
    known = KnownHeaders(text)
    scan_folder(export, None, known)
    assert not known.changed(all_met=True)
    assert KnownHeaders(text).changed(all_met=True)  # a run that met nothing would forget everything


def test_a_changed_file_is_read_again_and_no_other(export):
    _, text, _ = scanned(export)
    path = sorted((export / "a").glob("*.dcm"))[2]
    rewrite(path, lambda data: setattr(data, "PatientID", "ANOTHER-PATIENT-99"))
    later(path)
    found, _, opened = scanned(export, text)
    assert found == scan_folder(export)
    assert opened == {path}


def test_a_new_content_of_equal_size_whose_time_of_change_was_set_back_is_read(export):
    _, text, _ = scanned(export)
    path = sorted((export / "a").glob("*.dcm"))[2]
    before, size = path.stat(), len(path.read_bytes())
    path.write_bytes(path.read_bytes().replace(CANARY_ID.encode(), CANARY_ID[::-1].encode()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (size, before.st_mtime_ns)
    found, _, _ = scanned(export, text)
    ids = {s.patient_id for c in found.candidates for s in c.slices}
    assert ids == {CANARY_ID, CANARY_ID[::-1]}


def test_files_that_came_went_or_were_renamed_are_seen(export, volume):
    _, text, _ = scanned(export)
    (some, other, gone, *_) = sorted((export / "a").glob("*.dcm"))
    gone.unlink()
    renamed, moved = some.with_name("renamed.dcm"), export / "c" / other.name
    some.rename(renamed)
    other.rename(moved)
    new = write_series(export / "new", volume, study="new")
    found, _, opened = scanned(export, text)
    assert found == scan_folder(export)
    assert opened == {renamed, moved, *new}


def test_what_is_gone_is_forgotten_unless_the_run_was_broken_off(export):
    _, text, _ = scanned(export)
    for path in (export / "c").iterdir():
        path.unlink()
    known = KnownHeaders(text)
    scan_folder(export, None, known)
    assert b"export/c" in known.as_text(all_met=False)
    assert b"export/c" not in known.as_text(all_met=True)
    sorted((export / "a").glob("*.dcm"))[0].unlink()
    assert len(scanned(export, text)[1]) < len(known.as_text(all_met=True))


def test_a_damaged_file_stays_damaged_until_it_is_mended(export):
    found, text, _ = scanned(export)
    (damaged,) = found.unreadable
    found, text, opened = scanned(export, text)
    assert (found.unreadable, opened) == ((damaged,), set())
    damaged.write_bytes(sorted((export / "b").iterdir())[1].read_bytes())
    found, _, opened = scanned(export, text)
    assert (found.unreadable, opened) == ((), {damaged})


@pytest.mark.parametrize("how", ["deflated", "big-endian", "RLE"])
def test_headers_of_other_transfer_syntaxes_come_back_equal(volume, tmp_path, how):
    for path in write_series(tmp_path, volume):
        compress(path, how)
    found, text, _ = scanned(tmp_path)
    assert scanned(tmp_path, text)[0] == found == scan_folder(tmp_path)


def test_a_file_that_could_not_be_read_is_not_remembered(export):
    walk = walk_files(export / "a")
    path, state = walk.files[0], walk.states[0]
    known = KnownHeaders()
    path.rename(path.with_suffix(".away"))
    with pytest.raises(FileNotFoundError):
        known.headers(path, state)
    path.with_suffix(".away").rename(path)
    assert known.headers(path, state) == read_headers(path)


@pytest.mark.parametrize("broken", ["empty", "foreign", "cut", "a byte", "older"])
def test_a_memory_that_is_damaged_foreign_or_of_another_reader_is_ignored(export, broken, monkeypatch):
    found, text, opened = scanned(export)
    if broken == "older":
        monkeypatch.setattr(known_headers, "_reader", lambda: "0" * 64)
    at = text.index(b"-1024")
    text = {
        "empty": b"",
        "foreign": b"\x80\x04pickle\n{}\n",
        "cut": text[: len(text) // 2],
        "a byte": text[:at] + b"-1023" + text[at + 5 :],
        "older": text,
    }[broken]
    again, _, opened_again = scanned(export, text)
    assert (again, opened_again) == (found, opened)


def test_the_reader_that_filled_a_memory_is_known_by_its_source(monkeypatch):
    ours = known_headers._reader.__wrapped__()
    monkeypatch.setattr(known_headers.pydicom, "__version__", "0.0")
    assert known_headers._reader.__wrapped__() != ours
    monkeypatch.undo()
    monkeypatch.setattr(known_headers.pkgutil, "get_data", lambda package, name: b"another source")
    assert known_headers._reader.__wrapped__() != ours


def _cohort(export: Path, known: KnownHeaders | None) -> Cohort:
    clinical = export.parent / "clinical.csv"
    clinical.write_text(f"patient_id,age,sex,smoking,time_days,event\n{CANARY_ID},60,M,ever,900,death\n")
    return load_cohort(clinical, None, export, dicom=DicomOptions(known=known, estimate=None))


def test_a_cohort_from_memory_equals_the_one_that_was_read(export):
    known = KnownHeaders()
    read = _cohort(export, known)
    assert read == _cohort(export, None) == _cohort(export, KnownHeaders(known.as_text(all_met=True)))
    assert read.scans


_text = st.text(max_size=5)
_finite = st.floats(allow_nan=False, allow_infinity=False)
_places = st.builds(PixelPlace, st.integers(0, 2**40), st.integers(-1, 2**40), signed=st.booleans(), photometric=_text)


def _numbers(count: int) -> st.SearchStrategy[tuple[float, ...] | None]:
    # Few different ones, so that 0.0 and -0.0 and None stand side by side in one column.
    return st.none() | st.tuples(*[st.sampled_from((0.0, -0.0, 1.0)) | _finite] * count)


_images = st.builds(
    SliceHeader,
    path=st.just(Path("/x/f")),
    image_type=st.lists(_text, max_size=3).map(tuple),
    pixel_spacing=_numbers(2),
    position=_numbers(3),
    orientation=_numbers(6),
    slope=st.none() | _finite,
    intercept=st.none() | _finite,
    thickness=st.none() | _finite,
    kvp=st.none() | _finite,
    frame=st.none() | st.integers(0, 3),
    pixels=_places,
    **dict.fromkeys(
        ("study", "series", "patient_id", "kernel", "stack"), st.sampled_from(("", "1.2", "\udcff\n\u2028"))
    ),
)


@given(st.lists(st.lists(_images, max_size=3), min_size=1, max_size=5))
def test_storing_and_loading_headers_is_the_identity(files):
    names = [f"{n}\udcff.dcm" for n in range(len(files))]
    outcomes = {
        name: known_headers._Outcome(n, n, 7, tuple(image[1:] for image in images), "" if images else "E_BOMB")
        for n, (name, images) in enumerate(zip(names, files, strict=True))
    }
    loaded = known_headers._unpacked(known_headers._packed(outcomes))
    assert repr(loaded) == repr(outcomes)  # by repr, because 0.0 == -0.0
    for name, images in zip(names, files, strict=True):
        back = [SliceHeader(Path("/x/f"), *values) for values in loaded[name].images]
        assert repr(back) == repr(images)


def _site(tmp_path: Path, volume: Volume) -> tuple[Path, Path]:
    data = tmp_path / "data"
    for number, date in enumerate(("20150301", "20160301")):
        noisy = Volume(volume.hu + np.int16(10 * number), volume.spacing, volume.origin)
        write_series(data / "scans" / f"s{number}", noisy, study=f"s{number}", study_date=date)
    (data / "clinical.csv").write_text(f"patient_id,age,sex,smoking,time_days,event\n{CANARY_ID},60,M,ever,900,death\n")
    return data, new_site(tmp_path / "site", data, scans=data / "scans", scans_csv=None)


def test_a_site_scans_its_unchanged_files_from_a_memory_for_its_owner_alone(tmp_path, volume):
    data, root = _site(tmp_path, volume)
    workspace, config = open_workspace(root)
    first = read_cohort(workspace, config)
    assert len(first.scans) == 2
    assert workspace.headers.stat().st_mode & 0o777 == 0o600
    assert [p for p in root.rglob("*") if p.is_file() and b"1.2.826" in p.read_bytes()] == [workspace.headers]
    assert not [p for p in root.rglob("*") if p.is_file() and CANARY_NAME.encode() in p.read_bytes()]
    stamp = workspace.headers.stat().st_mtime_ns, workspace.headers.stat().st_ino
    with opened_below(data / "scans") as opened:
        assert read_cohort(workspace, config) == first
    # To find doubles, the pixels of three slices a scan are looked at; no other file is opened.
    assert len(opened) == 3 * len(first.scans)
    assert (workspace.headers.stat().st_mtime_ns, workspace.headers.stat().st_ino) == stamp


def test_a_run_that_is_broken_off_keeps_what_it_has_read_and_forgets_nothing(tmp_path, volume):
    data, root = _site(tmp_path, volume)
    workspace, config = open_workspace(root)
    files = walk_files(data / "scans").files

    def stop(done: int, _: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_cohort(workspace, config, stop)
    with opened_below(data / "scans") as opened:
        scan_folder(data / "scans", None, KnownHeaders(workspace.headers.read_bytes()))
    assert opened == set(files[4:])
    read_cohort(workspace, config)
    later(files[0])
    with pytest.raises(KeyboardInterrupt):
        read_cohort(workspace, config, stop)
    with opened_below(data / "scans") as opened:
        scan_folder(data / "scans", None, KnownHeaders(workspace.headers.read_bytes()))
    assert opened == set()


def test_a_memory_that_can_be_neither_read_nor_written_stops_no_scan(tmp_path, volume):
    _, root = _site(tmp_path, volume)
    workspace, config = open_workspace(root)
    first = read_cohort(workspace, config)
    workspace.headers.unlink()
    workspace.headers.mkdir()  # stands in the way, for root too
    assert read_cohort(workspace, config) == first
    code, said, _ = call(root, "scan")
    assert (code, said["scans"]) == (0, 2)
    assert not list(workspace.private.glob(".headers*"))
