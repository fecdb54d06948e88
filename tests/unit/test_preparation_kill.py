"""A preparation that is killed at any moment and started again ends like one that was never interrupted."""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from site_cases import PATIENTS, hospital, new_site

PROGRAM = Path(sys.executable).with_name("fourdvq-client")
COMMAND = ("preprocess", "--auto-approve-pass", "--quiet")
_WAIT_S = 300


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """A site folder with three patients of two scans that was not prepared yet."""
    folder = tmp_path_factory.mktemp("hospital")
    return new_site(folder / "site", hospital(folder / "data", patients=PATIENTS[:3], scans=2))


@pytest.fixture(scope="module")
def whole(before, tmp_path_factory) -> Path:
    """The site after one run without interruption."""
    root = shutil.copytree(before, tmp_path_factory.mktemp("whole") / "site")
    assert start(root).wait(_WAIT_S) == 0
    return root


def start(root: Path, workers: int = 1) -> subprocess.Popen:
    """The real command, in a process group of its own."""
    command = [PROGRAM, "--workdir", root, *COMMAND, "--workers", str(workers)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def files_of(root: Path) -> list[Path]:
    return [p for p in (root / "prep").rglob("*") if p.is_file()]


def kill_when(root: Path, files: int, delay: float, workers: int) -> bool:
    """Run until prep/ holds so many files, wait a moment, and kill the whole group; False if the run was faster."""
    process = start(root, workers)
    deadline = time.monotonic() + _WAIT_S
    while process.poll() is None and len(files_of(root)) < files and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_WAIT_S)
    return killed


def contents(root: Path) -> dict[str, object]:
    """All of prep/: bytes of every file, decisions without their time, the contact sheet without its own mark."""
    prep = root / "prep"
    found: dict[str, object] = {str(p.relative_to(prep)): p.read_bytes() for p in files_of(root)}
    with (prep / "review.csv").open(newline="") as stream:
        found["review.csv"] = [{k: v for k, v in row.items() if k != "time"} for row in csv.DictReader(stream)]
    page = str((prep / "contact_sheet.html").read_text())
    found["contact_sheet.html"] = re.sub(r'(fingerprint" content=")[0-9a-f]{64}', r"\1", page)
    return found


def interrupted(before: Path, whole: Path, root: Path, moments: int, seed: int, workers: int) -> int:
    """Kill a preparation at random moments, let it end, and compare; returns how often it really was killed."""
    shutil.copytree(before, root)
    rng = random.Random(seed)
    last = len(files_of(whole))
    kills = sum(kill_when(root, rng.randrange(last + 1), rng.uniform(0.0, 0.3), workers) for _ in range(moments))
    assert start(root).wait(_WAIT_S) == 0
    assert contents(root) == contents(whole)
    return kills


def test_a_run_that_was_killed_twice_ends_with_the_files_of_one_that_was_not(before, whole, tmp_path):
    assert interrupted(before, whole, tmp_path / "site", moments=2, seed=1, workers=1) > 0


@pytest.mark.slow
def test_a_run_that_was_killed_at_ten_random_moments_ends_with_the_files_of_one_that_was_not(before, whole, tmp_path):
    assert interrupted(before, whole, tmp_path / "site", moments=10, seed=2, workers=2) >= 5


def test_no_worker_outlives_a_run_that_was_killed_alone(before, tmp_path):
    """Only the parent dies, as when a person kills it by its id: its workers end by themselves."""
    root = shutil.copytree(before, tmp_path / "site")
    process = start(root)
    deadline = time.monotonic() + _WAIT_S
    while not files_of(root) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait(_WAIT_S)
    while group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group_members(process.pid) == []


def group_members(group: int) -> list[int]:
    """Processes of a group that still run (state Z is one that has ended)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(words[2]) == group and words[0] != "Z":
            found.append(int(stat.parent.name))
    return found
