"""Whole preparations through the command: shards, damage, force, failures of workers, limits, decisions."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client_calls import call
from fourdvq.data.datasets import open_prepared
from fourdvq.data.volume import Volume, read_volume, write_nifti
from fourdvq.errors import CohortError, ConfigError, TemporaryStop
from fourdvq.preprocessing.pipeline import PatientResult, ScanInput, StepInHand
from fourdvq.preprocessing.profile import load_profile
from fourdvq.preprocessing.records import read_record
from fourdvq_client import embedded
from fourdvq_client.patient_pool import Limits, Means, PatientJob, prepare_all
from fourdvq_client.preparation import Request, prepare_site, real_ids
from fourdvq_client.shards import Shard, parse_shard, preparing
from fourdvq_client.worker_memory import GIB, free_memory, resident, worker_need
from fourdvq_client.workspace import locked, open_workspace
from site_cases import PATIENTS, ROOT, hospital, new_site, prepared_site

PRESETS = ROOT / "configs" / "preprocessing"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A site of three patients with two scans each, not prepared yet."""
    folder = tmp_path_factory.mktemp("fresh")
    return new_site(folder / "site", hospital(folder / "data", patients=PATIENTS[:3], scans=2))


@pytest.fixture(scope="module")
def whole(fresh, tmp_path_factory) -> Path:
    """The same site after one run; tests copy it."""
    root = shutil.copytree(fresh, tmp_path_factory.mktemp("whole") / "site")
    embedded.preprocess(root)
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return prepared_site(tmp_path / "site")


def manifest(root: Path) -> list[dict[str, str]]:
    with (root / "prep" / "manifest.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def tables(root: Path) -> dict[str, bytes]:
    names = ("manifest.csv", "manifest.json", "splits.csv", "clinical.csv")
    return {name: (root / "prep" / name).read_bytes() for name in names}


# --- shards ------------------------------------------------------------------------------------------------------


def test_shards_cut_the_cohort_into_parts_that_do_not_depend_on_who_else_is_there():
    names = [f"{n:012x}" for n in range(0, 4000, 7)]
    parts = [{n for n in names if Shard(i, 8).has(n)} for i in range(1, 9)]
    assert set().union(*parts) == set(names)
    assert sum(len(p) for p in parts) == len(names)
    assert all(0.6 * len(names) / 8 < len(p) < 1.5 * len(names) / 8 for p in parts)
    # Fixed for good: a job array that is started again, on another machine or day, must divide in the same way.
    assert [next(i for i in range(1, 9) if Shard(i, 8).has(name)) for name in names[:6]] == [5, 2, 7, 5, 8, 5]


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/5"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="E_USAGE"):
        parse_shard(text)


def test_shards_in_another_order_end_with_the_tables_of_one_run(fresh, whole, tmp_path):
    root = shutil.copytree(fresh, tmp_path / "parts")
    workspace, config = open_workspace(root)
    names = {row["pseudonym"] for row in manifest(whole)}
    waiting = []
    # Pseudonyms are random, so all patients may share a shard: the emptiest goes first and leaves some waiting.
    for part in sorted((3, 1, 2), key=lambda part: sum(Shard(part, 3).has(name) for name in names)):
        with preparing(workspace, Shard(part, 3)):
            summary = prepare_site(workspace, config, request=Request(shard=Shard(part, 3)))
        waiting.append(summary.waiting)
        assert (root / "prep" / "splits.csv").exists() == (summary.waiting == 0)
    assert waiting[0] > waiting[-1] == 0
    assert tables(root) == tables(whole)


def test_a_shard_runs_beside_others_and_not_beside_itself_a_whole_run_or_another_division(root):
    workspace, _ = open_workspace(root)
    with preparing(workspace, Shard(1, 3)), preparing(workspace, Shard(2, 3)):
        for other in (Shard(1, 3), Shard(1, 2), Shard()):
            with pytest.raises(TemporaryStop, match="E_BUSY"), preparing(workspace, other):
                pass
    with preparing(workspace, Shard(1, 2)):
        pass
    with locked(workspace), pytest.raises(TemporaryStop, match="E_BUSY"), preparing(workspace, Shard(1, 3)):
        pass


def test_status_names_every_shard_at_work(root):
    workspace, _ = open_workspace(root)
    assert call(root, "status", "--quiet")[0] == 1
    with preparing(workspace, Shard(1, 3)), preparing(workspace, Shard(2, 3)):
        code, found, _ = call(root, "status", "--quiet")
        assert (code, found["running"], [h["pid"] for h in found["holders"]]) == (0, True, [os.getpid()] * 2)
        code, error, _ = call(root, "qc", "redo", manifest(root)[0]["pseudonym"])
        assert (code, error["code"]) == (75, "E_BUSY")
        assert f"process {os.getpid()} on" in error["found"]


# --- verify and force ----------------------------------------------------------------------------------------------


def test_a_changed_byte_is_named_leaves_the_manifest_and_is_made_again_with_its_decision(root):
    before = {(r["pseudonym"], r["index"]): r["content_sha256"] for r in manifest(root)}
    assert call(root, "preprocess", "--verify")[1]["damaged"] == []
    name = manifest(root)[4]["pseudonym"]
    hu, record = root / "prep" / name / "1" / "hu.npy", root / "prep" / name / "2" / "step.json"
    data = bytearray(hu.read_bytes())
    data[len(data) // 2] ^= 1
    hu.write_bytes(data)
    record.write_text(record.read_text().replace('"days": 400', '"days": 401'))
    code, found, _ = call(root, "preprocess", "--verify")
    assert code == 3
    assert found["damaged"] == [
        {"scan": f"{name}/1", "files": ["hu.npy"]},
        {"scan": f"{name}/2", "files": ["step.json"]},
    ]
    assert len(manifest(root)) == len(before) - 2
    data[len(data) // 2] ^= 1
    hu.write_bytes(data)  # brought back from a copy
    assert [d["scan"] for d in call(root, "preprocess", "--verify")[1]["damaged"]] == [f"{name}/2"]
    assert len(manifest(root)) == len(before) - 1
    data[-1] ^= 1
    hu.write_bytes(data)
    assert call(root, "preprocess", "--verify")[0] == 3
    code, found, _ = call(root, "preprocess")
    assert (code, found["reused"]) == (0, len(before) - 2)
    assert {(r["pseudonym"], r["index"]): r["content_sha256"] for r in manifest(root)} == before
    assert {r["decision"] for r in manifest(root)} == {"demo"}
    assert call(root, "preprocess", "--verify")[0] == 0


@pytest.mark.parametrize("words", [("--force", "segment"), ("--retry-failed",), ("--auto-approve-pass",)])
def test_an_option_to_make_something_is_refused_beside_verify_which_makes_nothing(root, words):
    code, error, _ = call(root, "preprocess", "--verify", *words)
    assert (code, error["code"]) == (2, "E_USAGE")
    assert words[0] in error["where"]


def test_force_makes_again_what_a_step_leads_to_and_nothing_else(whole, tmp_path):
    root = shutil.copytree(whole, tmp_path / "site")
    workspace, config = open_workspace(root)
    summary = prepare_site(workspace, config, request=Request(force="register"))
    assert (summary.scans, summary.reused) == (6, 3)
    part = Shard(1, 2)
    summary = prepare_site(workspace, config, request=Request(shard=part, force="resample"))
    assert summary.reused == 0
    assert summary.patients == sum(part.has(name) for name in {r["pseudonym"] for r in manifest(root)})
    assert tables(root) == tables(whole)
    code, error, _ = call(root, "preprocess", "--force", "everything")
    assert (code, error["code"]) == (2, "E_USAGE")


# --- workers -------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Processes that `pid` started with multiprocessing's spawn, without the resource tracker."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = re.search(r"^PPid:\t(\d+)", status.read_text(), re.M)
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent and int(parent[1]) == pid and b"spawn_main" in command:
            found.append(int(status.parent.name))
    return found


def jobs_of(root: Path) -> tuple[list[PatientJob], Means]:
    from fourdvq.data.cohort import load_cohort
    from fourdvq.preprocessing.inputs import scan_inputs

    data = root.parent / "data"
    cohort = load_cohort(data / "clinical.csv", data / "scans.csv", data)
    jobs = [PatientJob(f"{n:012x}", tuple(scan_inputs(cohort, p.patient_id))) for n, p in enumerate(cohort.usable)]
    return jobs, Means(load_profile(PRESETS / "tiny.yaml"), root / "prep")


class Killer:
    """Sends a signal to the worker that begins to read the second scan of one patient."""

    def __init__(self, pseudonym: str, number: signal.Signals) -> None:
        self.pseudonym = pseudonym
        self.number = number
        self.killed: set[int] = set()

    def step(self, pseudonym: str, step: StepInHand) -> None:
        if (pseudonym, step.scan.index, step.name) == (self.pseudonym, 1, "read"):
            for pid in children(os.getpid()):
                os.kill(pid, self.number)
                self.killed.add(pid)

    def patient(self, result: PatientResult) -> None:
        pass


@pytest.mark.parametrize(
    ("number", "code", "kills"),
    [(signal.SIGKILL, "OUT_OF_MEMORY", 2), pytest.param(signal.SIGSEGV, "E_CRASH", 1, marks=pytest.mark.slow)],
)
def test_a_worker_that_dies_costs_the_scan_it_had_in_hand_and_the_others_go_on(fresh, tmp_path, number, code, kills):
    """The system ends a process without memory by SIGKILL: that is tried once more, alone; a broken decoder is not."""
    jobs, means = jobs_of(fresh)
    means = Means(means.profile, tmp_path)
    killer = Killer(jobs[0].pseudonym, number)
    results = prepare_all(jobs, means, Limits(workers=1), killer)
    assert len(killer.killed) == kills
    failed = [(r.pseudonym, s.index, s.code) for r in results for s in r.scans if s.status == "failed"]
    assert failed == [(jobs[0].pseudonym, 1, code)]
    record = read_record(tmp_path / jobs[0].pseudonym / "1")
    assert (record["status"], record["code"]) == ("failed", code)
    again = prepare_all(jobs, means, Limits(workers=0))
    assert [s.reused for r in again for s in r.scans] == [True] * 6
    retried = prepare_all([replace(jobs[0], retry=frozenset({1}))], means, Limits(workers=0))
    assert [s.status for s in retried[0].scans] == ["ok", "ok"]


def test_a_scan_that_takes_too_long_becomes_a_failed_row(fresh, tmp_path):
    jobs, means = jobs_of(fresh)
    scans = jobs[0].scans[:1]
    results = prepare_all([replace(jobs[0], scans=scans)], replace(means, prep=tmp_path), Limits(1, scan_seconds=0.0))
    assert [s.code for s in results[0].scans] == ["E_SLOW"]


def test_a_file_that_is_never_read_to_its_end_becomes_a_failed_row_and_the_others_go_on(fresh, tmp_path):
    """A pipe into which nobody writes, in the place of a scan: storage that no longer answers."""
    jobs, means = jobs_of(fresh)
    os.mkfifo(tmp_path / "silent.nii.gz")
    first, second = jobs[0].scans
    jobs[0] = replace(jobs[0], scans=(first, replace(second, path=tmp_path / "silent.nii.gz")))
    results = prepare_all(jobs, Means(means.profile, tmp_path / "prep"), Limits(workers=1, read_seconds=3.0))
    failed = [(r.pseudonym, s.index, s.code) for r in results for s in r.scans if s.status == "failed"]
    assert failed == [(jobs[0].pseudonym, 1, "E_SLOW")]


@pytest.mark.parametrize(
    ("ours", "mine", "code"),
    [
        ("max_voxels: 268435456", "max_voxels: 1000", "E_BOMB"),
        ("spacing_mm: [0.1, 20]", "spacing_mm: [0.1, 1]", "E_GEOMETRY"),
    ],
)
def test_a_sites_own_policy_bounds_what_a_header_may_announce(fresh, tmp_path, ours, mine, code):
    root = shutil.copytree(fresh, tmp_path / "site")
    policy = (root / "policy.yaml").read_text()
    assert ours in policy
    (root / "policy.yaml").write_text(policy.replace(ours, mine))
    embedded.preprocess(root)
    assert {row["code"] for row in manifest(root)} == {code}


class Weigher:
    """Notes the most memory that a worker held when it had finished a patient."""

    most = 0

    def step(self, pseudonym: str, step: StepInHand) -> None:
        pass

    def patient(self, result: PatientResult) -> None:
        self.most = max([self.most, *(resident(pid) for pid in children(os.getpid()))])


@pytest.mark.slow
def test_a_scan_that_needs_more_than_there_is_becomes_a_failed_row_after_one_try_alone(fresh, tmp_path):
    jobs, means = jobs_of(fresh)
    means, weigher = replace(means, prep=tmp_path / "prep"), Weigher()
    prepare_all([replace(jobs[0], scans=jobs[0].scans[:1])], means, Limits(1), weigher)
    scan = read_volume(jobs[1].scans[0].path)
    large = scan.hu.repeat(14, 0).repeat(10, 1).repeat(10, 2)  # 29 million voxels: 400 MB more than a small scan needs
    fine = tuple(s / n for s, n in zip(scan.spacing, (14, 10, 10), strict=True))
    write_nifti(Volume(large, fine, scan.origin), tmp_path / "large.nii")
    write_nifti(Volume((large < -500).astype(np.uint8), fine, scan.origin), tmp_path / "large_lung.nii")
    first = ScanInput(0, 0, tmp_path / "large.nii", tmp_path / "large_lung.nii")
    job = PatientJob("a" * 12, (first, *(replace(s, index=s.index + 1, days=s.days + 10) for s in jobs[1].scans)))
    started = Starts()
    results = prepare_all([job], means, Limits(1, memory=weigher.most + (120 << 20)), started)
    assert [s.code for s in results[0].scans] == ["OUT_OF_MEMORY"] * 3  # without a baseline nothing can be aligned
    assert started.count == 2


class Starts:
    """Counts how often the first scan was begun."""

    count = 0

    def step(self, pseudonym: str, step: StepInHand) -> None:
        self.count += (step.scan.index, step.name) == (0, "read")

    def patient(self, result: PatientResult) -> None:
        pass


def test_the_memory_that_is_there_bounds_the_workers():
    assert resident(os.getpid()) > 10 << 20
    assert resident(2**22 + 1) == 0
    assert 0 < free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 3 * GIB < worker_need(load_profile(PRESETS / "paper-v1.yaml")) < 5 * GIB
    assert worker_need(load_profile(PRESETS / "tiny.yaml")) < 2 * GIB


def test_ctrl_c_ends_with_130_and_sigterm_with_75_and_both_can_be_resumed(fresh, tmp_path):
    root = shutil.copytree(fresh, tmp_path / "site")
    program = Path(sys.executable).with_name("fourdvq-client")
    for number, exit_code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        words = [program, "--workdir", root, "--json", "preprocess"]
        process = subprocess.Popen(
            words,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A test run started in the background by a shell ignores Ctrl-C, and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not children(process.pid) and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, number)  # as a terminal and a batch system do it
        out, err = process.communicate(timeout=60)
        assert process.returncode == exit_code
        assert json.loads(out.splitlines()[-1])["code"] == "E_INTERRUPTED"
        assert b"Traceback" not in err
    assert embedded.preprocess(root)["by_status"].keys() <= {"ok", "review"}


# --- decisions -----------------------------------------------------------------------------------------------------


def test_only_undecided_scans_of_grade_pass_are_approved_without_a_look_and_only_if_asked(whole, tmp_path):
    root = shutil.copytree(whole, tmp_path / "site")
    assert {r["decision"] for r in manifest(root)} == {""}
    first = manifest(root)[0]
    call(root, "qc", "reject", f"{first['pseudonym']}/1", "--by", "Dr Ann", "--reason", "motion")
    found = call(root, "preprocess", "--auto-approve-pass")[1]
    rows = {(r["pseudonym"], r["index"]): r for r in manifest(root)}
    passed = [k for k, r in rows.items() if r["grade"] == "PASS" and k != (first["pseudonym"], "1")]
    assert found["auto_approved"] == len(passed) > 0
    assert {rows[k]["decision"] for k in passed} == {"auto"}
    assert rows[first["pseudonym"], "1"]["decision"] == "reject"
    assert call(root, "preprocess", "--auto-approve-pass")[1]["auto_approved"] == 0


def test_a_decision_lapses_with_parameters_or_input_and_training_reads_none_of_it(whole, tmp_path):
    root = shutil.copytree(whole, tmp_path / "site")
    call(root, "qc", "approve", "--all", "--by", "Dr Ann")
    approved = open_prepared(root / "prep")
    assert len(approved.scans("train", "validation", "test")) == 6
    issued = (root / "profile.json").read_text()
    other = json.loads(issued) | {"fov": {"mode": "lung_bbox", "margin_mm": 20}}
    (root / "profile.json").write_text(json.dumps(other))
    embedded.preprocess(root)
    assert {r["decision"] for r in manifest(root)} == {""}
    with pytest.raises(CohortError, match="E_NO_APPROVED"):
        open_prepared(root / "prep")
    (root / "profile.json").write_text(issued)
    embedded.preprocess(root)
    assert open_prepared(root / "prep") == approved  # the very same content again
    changed = next(r for r in manifest(root) if r["index"] == "1")
    path = input_of(root, changed["pseudonym"], 1)
    volume = read_volume(path)
    write_nifti(replace(volume, hu=volume.hu + np.int16(1)), path)
    embedded.preprocess(root)
    undecided = [(r["pseudonym"], r["index"]) for r in manifest(root) if not r["decision"]]
    assert undecided == [(changed["pseudonym"], "1")]
    assert len(open_prepared(root / "prep").scans("train", "validation", "test")) == 5


def input_of(root: Path, pseudonym: str, index: int) -> Path:
    """A scan's file, in a copy of the hospital's data that the site then reads."""
    workspace, config = open_workspace(root)
    data = root.parent / "own"
    shutil.copytree(config.scans, data)
    text = workspace.site_yaml.read_text()
    workspace.site_yaml.write_text(text.replace(str(config.scans), str(data)))
    return data / "scans" / real_ids(workspace)[pseudonym] / f"{index}.nii.gz"


@pytest.mark.parametrize("verb", ["approve", "reject"])
def test_a_command_copied_from_a_sheet_decides_about_nothing_that_was_made_again_since(whole, tmp_path, verb):
    root = shutil.copytree(whole, tmp_path / "site")
    page = Path(call(root, "qc", "open")[1]["file"]).read_text()
    marked = re.findall(r'data-name="(\w+/[01])".* data-content="(\w+)"', page)
    assert [c for _, c in marked] == [r["content_sha256"][:8] for r in manifest(root)]
    pseudonym = marked[0][0].partition("/")[0]
    seen = [f"{name}@{content}" for name, content in marked]
    assert marked[1][0] == f"{pseudonym}/1"
    path = input_of(root, pseudonym, 1)
    volume = read_volume(path)
    write_nifti(replace(volume, hu=volume.hu + np.int16(1)), path)
    embedded.preprocess(root)  # at night, while the sheet is open in a browser
    for words in (seen, seen[1:2], [f"{pseudonym}/1@"], [seen[0][:-1]]):
        code, error, _ = call(root, "qc", verb, *words, "--by", "Dr Ann")
        assert (code, error["code"]) == (3, "E_CONTENT")
        assert not (root / "prep" / "review.csv").exists()
    assert call(root, "qc", verb, seen[0], f"{pseudonym}/1", *seen[2:], "--by", "Dr Ann")[0] == 0
    assert {r["decision"] for r in manifest(root)} == {verb}


def test_a_scan_to_be_made_again_is_told_from_a_damaged_and_a_refused_one_and_none_can_be_decided_about(root):
    name = manifest(root)[0]["pseudonym"]
    call(root, "qc", "redo", f"{name}/1", "--by", "Dr Ann")
    rows = {(s["pseudonym"], s["index"]): s for s in call(root, "qc", "list")[1]["scans"]}
    assert (rows[name, "1"]["status"], rows[name, "1"]["grade"]) == ("redo", "")
    assert call(root, "qc", "list")[1]["undecided"] == 0
    page = (root / "prep" / "contact_sheet.html").read_text()
    assert re.search(f'data-name="{name}/1" data-grade="none" .* data-content=""', page)
    hu = root / "prep" / name / "2" / "hu.npy"
    hu.write_bytes(hu.read_bytes()[:-1] + b"~")

    def refusal(index: int) -> str:
        code, error, _ = call(root, "qc", "approve", f"{name}/{index}", "--by", "Dr Ann")
        assert (code, error["code"]) == (3, "E_NO_RESULT")
        assert "preprocess" in error["fix"]
        return str(error["found"])

    assert refusal(1) == f"{name}/1 is to be made again"
    code, found, _ = call(root, "preprocess", "--verify")
    assert (code, found["scans"], [d["scan"] for d in found["damaged"]]) == (3, 17, [f"{name}/2"])
    assert refusal(1) == f"{name}/1 is to be made again"
    assert refusal(2) == f"{name}/2 is damaged"
    path = input_of(root, name, 1)
    path.write_bytes(path.read_bytes()[:3000])
    call(root, "preprocess")
    assert refusal(1).startswith(f"{name}/1 refused: E_CORRUPT")
    code, error, _ = call(root, "qc", "approve", f"{name}/9")
    assert (code, error["code"]) == (3, "E_PATIENT")


def test_redo_takes_a_decision_back_and_has_the_scan_made_again(root):
    name = manifest(root)[0]["pseudonym"]
    code, found, _ = call(root, "qc", "redo", f"{name}/1", "--by", "Dr Ann", "--reason", "new mask")
    assert (code, found["redo"]) == (0, 1)
    code, found, _ = call(root, "preprocess")
    assert found["scans"] - found["reused"] == 1
    decisions = {(r["pseudonym"], r["index"]): r["decision"] for r in manifest(root)}
    assert decisions.pop((name, "1")) == ""
    assert set(decisions.values()) == {"demo"}
    assert [len(p.scans) for p in open_prepared(root / "prep").patients if p.pseudonym == name] == [2]


def test_a_run_with_nothing_to_do_loads_neither_torch_nor_an_image_library_and_writes_nothing(root):
    call(root, "preprocess")
    stamps = {p: p.stat().st_mtime_ns for p in (root / "prep").rglob("*") if p.is_file()}
    code = (
        "import sys; from pathlib import Path; from fourdvq_client.preparation import prepare_site;"
        "from fourdvq_client.workspace import open_workspace; s = prepare_site(*open_workspace(Path(sys.argv[1])));"
        "print(s.reused, s.workers, [m for m in ('torch', 'SimpleITK', 'scipy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "18 0 []"
    assert {p: p.stat().st_mtime_ns for p in (root / "prep").rglob("*") if p.is_file()} == stamps


def test_the_contact_sheet_shows_every_scan_and_asks_no_network(root):
    page = Path(call(root, "preprocess")[1]["contact_sheet"]).read_text()
    rows = manifest(root)
    for row in rows:
        assert f'data-name="{row["pseudonym"]}/{row["index"]}" data-grade="{row["grade"]}"' in page
    assert page.count("data:image/jpeg;base64,") == len(rows)
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|fetch\(|XMLHttpRequest", page)
