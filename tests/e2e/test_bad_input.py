"""What people and machines get wrong, told as they meet it: a code, a place, a remedy, nothing lost, others go on.

Every rule has its own test in `unit`; here are the stories through the real commands and the hospitals' own client.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from client_calls import call
from coordinator_runs import stages_until
from fourdvq.data.volume import write_nifti
from fourdvq.errors import Refused
from fourdvq.wire.messages import PROTOCOL
from fourdvq_client import embedded
from fourdvq_client.app import make_client_app
from fourdvq_client.audit import read_entries
from fourdvq_client.egress import Outcome
from fourdvq_client.runtime import open_site
from fourdvq_client.worker import Job, ProcessWorker
from fourdvq_client.workspace import Workspace
from fourdvq_server.app import RunOptions, new_run, run_experiment
from fourdvq_server.experiment import compose
from fourdvq_server.local_grid import LocalGrid
from fourdvq_server.loopback import bind, free_port
from fourdvq_server.project import Project
from fourdvq_server.setup import create_project
from fourdvq_server.store import open_store
from site_cases import hospital, new_site, prepared_site, tiny_profile
from synthetic_lungs import chest

BIN = Path(sys.executable).parent


def command(program: str, *words: str, folder: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON object and standard error of a command as it is typed in `folder`."""
    done = subprocess.run(
        [str(BIN / program), *words, "--json"], cwd=folder, capture_output=True, text=True, timeout=90, check=False
    )
    assert "Traceback" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, found, done.stderr


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def new_project(root: Path, *, gate_port: int = 0, private_port: int = 0) -> Path:
    """A coordinator's folder as `fourdvq-server init` makes it, on this machine alone."""
    address = f"localhost:{gate_port or free_port()}"
    create_project(root, "ipf", address, gate_host="127.0.0.1", private_port=private_port)
    return root


def explained(error: dict[str, Any]) -> bool:
    """Whether an error says where, what was found, what was wanted, and what to do."""
    return all(error[part] for part in ("where", "found", "wanted", "why", "fix"))


# --- a hospital whose tables and scans have every fault at once ------------------------------------------------------

EVERYBODY = tuple(f"LEU-10000{k}" for k in range(6))
SOUND, NOT_IN_CLINICAL, NOT_IN_SCANS, NEGATIVE, TRUNCATED, NO_LUNG = EVERYBODY


def table_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def rewrite(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def fine_hospital(folder: Path) -> Path:
    """Six patients of two scans, fine enough for the threshold method: given masks would hide that there is no lung."""
    hospital(folder, patients=EVERYBODY, scans=2)
    for number, patient in enumerate(EVERYBODY):
        for visit in range(2):
            scan, _ = chest(seed=number, noise=10 + visit)
            write_nifti(scan, folder / "scans" / patient / f"{visit}.nii.gz")
    return folder


def spoil(data: Path) -> None:
    """One fault for each patient but the first."""
    clinical = [row for row in table_rows(data / "clinical.csv") if row["patient_id"] != NOT_IN_CLINICAL]
    for row in clinical:
        if row["patient_id"] == NEGATIVE:
            row["time_days"] = "-900"
    rewrite(data / "clinical.csv", clinical)
    rewrite(data / "scans.csv", [r for r in table_rows(data / "scans.csv") if r["patient_id"] != NOT_IN_SCANS])
    cut = data / "scans" / TRUNCATED / "1.nii.gz"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    for path in (data / "scans" / NO_LUNG).glob("?.nii.gz"):
        scan, lung = chest(seed=EVERYBODY.index(NO_LUNG), noise=10 + int(path.name[0]))
        write_nifti(replace(scan, hu=np.where(lung.hu > 0, scan.hu + 900, scan.hu).astype(np.int16)), path)


@pytest.fixture(scope="module")
def bad_day(tmp_path_factory) -> tuple[Path, Path, dict, dict]:
    """Site folder, data folder, and what `scan` and `preprocess` said."""
    folder = tmp_path_factory.mktemp("bad-day")
    data = fine_hospital(folder / "data")
    profile = {**tiny_profile(), "segmentation": {"method": "threshold"}}
    root = new_site(folder / "site", data, profile=profile)
    spoil(data)
    code, scanned, _ = command("fourdvq-client", "scan", folder=root)
    assert code == 3
    code, prepared, _ = command("fourdvq-client", "preprocess", "--workers", "1", folder=root)
    assert code == 3
    return root, data, scanned, prepared


@pytest.mark.parametrize(
    ("patient", "code", "where"),
    [
        (NOT_IN_CLINICAL, "E_ID", "scans.csv"),
        (NOT_IN_SCANS, "E_ID", "clinical.csv"),
        (NEGATIVE, "E_TIME", "clinical.csv row"),
    ],
)
def test_a_patient_whose_rows_do_not_fit_is_left_out_by_name(bad_day, patient, code, where):
    root, _, scanned, prepared = bad_day
    rows = [r for r in table_rows(root / "findings.csv") if r["patient_id"] == patient and r["code"].startswith("E_")]
    assert [r["code"] for r in rows] == [code]
    assert rows[0]["where"].startswith(where)
    assert rows[0]["found"]
    assert rows[0]["fix"]
    assert scanned["blocking"] == 3
    assert prepared["blocking"] == 3


def test_a_truncated_scan_and_one_without_lung_are_refused_and_leave_no_half_made_file(bad_day):
    root, _, _, prepared = bad_day
    rows = {r["pseudonym"]: r for r in table_rows(root / "private" / "patients.csv")}
    names = {r["patient_id"]: name for name, r in rows.items()}
    assert set(names) == {SOUND, TRUNCATED, NO_LUNG}
    found = {(r["pseudonym"], r["index"]): r for r in table_rows(root / "prep" / "manifest.csv")}
    assert found[names[TRUNCATED], "1"]["status"] == "refused"
    assert found[names[TRUNCATED], "0"]["content_sha256"]
    assert {found[names[NO_LUNG], i]["code"] for i in "01"} == {"E_NOLUNG"}
    assert prepared["by_status"]["refused"] == 3
    assert len(prepared["details"]) == 3
    for row in (r for r in found.values() if r["status"] == "refused"):
        assert row["code"].startswith("E_")
        assert not list((root / "prep" / row["folder"]).glob("*.npy"))
    assert [p for p in root.rglob("*") if p.name.startswith(".") and p.is_file()] == []
    # The sound patient is as complete as if the others had not been there.
    for index in "01":
        assert found[names[SOUND], index]["content_sha256"]
        assert np.load(root / "prep" / names[SOUND] / index / "hu.npy").shape == (16, 32, 32)


def test_after_the_corrections_the_same_command_takes_everybody_and_repeats_nothing(bad_day, tmp_path):
    root, data, _, prepared = bad_day
    shutil.copytree(root, tmp_path / "site")
    sound = fine_hospital(tmp_path / "data")
    text = (root / "site.yaml").read_text().replace(str(data), str(sound))
    (tmp_path / "site" / "site.yaml").write_text(text)
    code, found, _ = call(tmp_path / "site", "preprocess", "--workers", "1")
    assert (code, found["blocking"], found["patients"], found["scans"]) == (0, 0, 6, 12)
    assert found["reused"] == prepared["scans"] - prepared["by_status"]["refused"]


def test_a_data_folder_that_is_gone_or_empty_stops_before_anything_is_touched(tmp_path):
    """As when the network drive is not there on a Monday: what was prepared on Friday stays."""
    data = hospital(tmp_path / "data", patients=(SOUND, TRUNCATED), scans=1)
    root = new_site(tmp_path / "site", data)
    assert call(root, "preprocess", "--workers", "1")[0] == 0
    before = files_in(root / "prep"), (root / "private" / "patients.csv").read_bytes()
    shutil.move(data / "scans", tmp_path / "elsewhere")
    code, error, _ = command("fourdvq-client", "preprocess", folder=root)
    assert (code, error["code"]) == (3, "E_FEW")  # the tables are there and no file that they name is
    assert explained(error)
    assert "findings.csv" in error["fix"]
    assert {r["code"] for r in table_rows(root / "findings.csv") if r["code"].startswith("E_")} == {"E_FILE", "E_ID"}
    settings = (root / "site.yaml").read_text()
    without_table = [line for line in settings.splitlines() if not line.startswith("scans_csv:")]
    (tmp_path / "empty").mkdir()
    for folder, wanted in ((tmp_path / "nowhere", "E_FOLDER"), (tmp_path / "empty", "E_EMPTY")):
        lines = [f"scans: {json.dumps(str(folder))}" if t.startswith("scans:") else t for t in without_table]
        (root / "site.yaml").write_text("\n".join(lines) + "\n")
        code, error, _ = command("fourdvq-client", "preprocess", folder=root)
        assert (code, error["code"]) == (3, wanted)
        assert explained(error)
        assert error["where"] == str(folder)
    (data / "clinical.csv").unlink()
    code, error, _ = call(root, "preprocess")
    assert (code, error["code"]) == (3, "E_FILE")
    assert explained(error)
    assert (files_in(root / "prep"), (root / "private" / "patients.csv").read_bytes()) == before


# --- a machine in trouble --------------------------------------------------------------------------------------------


def nothing_more_may_be_written() -> None:
    """As under a quota that is used up: every byte written to a file is refused, a pipe takes what it gets."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.parametrize("words", [("scan",), ("preprocess",), ("qc", "approve", "--all"), ("qc", "open")])
def test_a_full_disk_stops_any_verb_for_a_while_and_spoils_no_table(tmp_path, words):
    root = prepared_site(tmp_path / "site")
    (root / "prep" / "contact_sheet.html").unlink()  # else it is as it has to be and is not written
    before = files_in(root / "prep")
    done = subprocess.run(
        [str(BIN / "fourdvq-client"), *words, "--json"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        preexec_fn=nothing_more_may_be_written,
    )
    error = json.loads(done.stdout)
    assert (done.returncode, error["code"]) == (75, "DISK_FULL")
    assert explained(error)
    assert "Traceback" not in done.stderr
    assert files_in(root / "prep") == before


# --- settings and ports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "code", "found"),
    [("+federation.cookies=1", "E_KEY", "cookies"), ("federation.rounds=many", "E_TYPE", "many")],
)
def test_a_wrong_setting_starts_no_run(tmp_path, override, code, found):
    project = new_project(tmp_path / "coordinator")
    exit_code, error, _ = command("fourdvq-server", "run", "experiment=tiny", override, folder=project)
    assert (exit_code, error["code"]) == (2, code)
    assert found in error["where"] + error["found"]
    assert error["wanted"]
    assert error["fix"]
    assert list((project / "runs").iterdir()) == []


@pytest.mark.parametrize("which", ["gate", "private", "ui"])
def test_a_port_in_use_is_named_with_the_way_out_and_leaves_nothing_running(tmp_path, which):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        ports = {"gate": {"gate_port": port}, "private": {"private_port": port}}
        project = new_project(tmp_path / "coordinator", **ports.get(which, {}))
        words = ["serve"]
        if which == "ui":
            (project / "mlflow.db").touch()
            words = ["ui", "--port", str(port)]
        code, error, _ = command("fourdvq-server", *words, folder=project)
        assert (code, error["code"]) == (1, "E_PORT")
        assert explained(error)
        assert error["where"].endswith(f":{port}")
        assert not (project / "state" / "door.json").exists()


# --- a federation with a site of another protocol, one of another profile, and one that fails twice ------------------

EXPERIMENT = (
    "experiment=tiny",
    "tracking=none",
    "federation.quorum=1",
    "federation.rounds=3",
    "federation.local_steps=10",
    "federation.ode_rounds=1",
    "federation.ode_local_steps=8",
    "federation.wait_sites_s=0.5",
    "evaluation.every_rounds=0",
    "gan.loss=none",
)


class FaultyWorker(ProcessWorker):
    """A real worker process on a machine with a bad evening: first a wrong number, then the process is killed."""

    def __init__(self, root: Path) -> None:
        super().__init__(Workspace(root), "cpu")
        self.asked = 0

    def train_vqgan(self, job: Job) -> Outcome:
        self.asked += 1
        if self.asked == 2:
            self._kill_at_work()
        done = super().train_vqgan(job)
        if self.asked == 1:
            reply: Any = done.reply
            broken = {name: tensor.clone() for name, tensor in reply.delta.items()}
            next(iter(broken.values())).view(-1)[0] = torch.nan
            return replace(done, reply=replace(reply, delta=broken))
        return done

    def _kill_at_work(self) -> None:
        # Stopped first, so that it has surely taken the job and not finished it when it is killed.
        pid = self.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()


def of_another_protocol(app: Callable[[Message, Context], Message]) -> Callable[[Message, Context], Message]:
    """The same client with another protocol number, as after an update at one side only."""

    def answer(message: Message, context: Context) -> Message:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fourdvq_client.guard.PROTOCOL", PROTOCOL + 1)
            return app(message, context)

    return answer


def renamed(root: Path, name: str) -> Path:
    """The prepared site under another name."""
    prepared_site(root)
    for file in ("site.yaml", "policy.yaml"):
        text = (root / file).read_text()
        assert "site: leuven" in text
        (root / file).write_text(text.replace("site: leuven", f"site: {name}"))
    return root


@pytest.fixture(scope="module")
def evening(tmp_path_factory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and summary of a run over leuven (sound), southampton (fails twice), gent (profile), bruges (protocol)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evening")
    for name in ("leuven", "southampton", "bruges"):
        renamed(folder / name, name)
    data = hospital(folder / "data", patients=("GEN-1", "GEN-2"), scans=1)
    new_site(folder / "gent", data, site="gent", profile={**tiny_profile(), "window_hu": [-1000, 600]})
    embedded.preprocess(folder / "gent", decision="demo")
    faulty = open_site(folder / "southampton")
    faulty.worker = FaultyWorker(folder / "southampton")
    apps: dict[str, Any] = {name: embedded.client_app(folder / name) for name in ("leuven", "gent")}
    apps["southampton"] = make_client_app(faulty)
    apps["bruges"] = of_another_protocol(embedded.client_app(folder / "bruges"))

    def approve(sites: Any) -> None:
        for site in sites:
            with contextlib.suppress(Refused):  # gent's person is told that the profile is another one
                embedded.approve(folder / site, by="Dr Test")

    project = Project(folder / "coordinator")
    new_run(project, compose(EXPERIMENT), name="r")
    options = RunOptions(on_unapproved=approve, approval_wait_s=5, stages=stages_until("release"))
    with LocalGrid(apps, one_at_a_time=True) as grid:
        summary = run_experiment(grid, project, "r", options)
    yield folder, summary
    faulty.close()
    torch.set_num_threads(before)


def vqgan_round(folder: Path, number: int) -> dict[str, Any]:
    facts: dict[str, Any] = open_store(folder / "coordinator" / "runs" / "r").stage("vqgan").read_round(number).facts
    return facts


def refusals(root: Path) -> list[tuple[str, str]]:
    """What the site's own log says it refused: kind of message and code."""
    return [(e["kind"], e["decision"]) for e in read_entries(root / "audit.jsonl") if e["action"] == "refuse"]


def test_a_site_of_another_protocol_and_one_of_another_profile_stay_out_and_the_others_reach_the_release(evening):
    folder, summary = evening
    stages = summary["stages"]
    assert stages["hello"]["refused"]["bruges"] == "PROTOCOL_MISMATCH"
    assert stages["plan"]["refused"] == {"bruges": "PROTOCOL_MISMATCH", "gent": "PROFILE_MISMATCH"}
    assert {"leuven", "southampton"} <= set(stages["release"]["received_by"])
    assert refusals(folder / "bruges")[0] == ("query.hello", "PROTOCOL_MISMATCH")
    for outside in ("bruges", "gent"):
        assert not list((folder / outside / "runs").iterdir())


def test_the_site_of_another_profile_is_told_what_to_do_by_its_own_command(evening):
    folder, _ = evening
    code, error, _ = call(folder / "gent", "approve", "--latest")
    assert (code, error["code"]) == (5, "PROFILE_MISMATCH")
    assert explained(error)
    assert "preprocess" in error["fix"]


def test_an_update_that_is_not_a_number_never_leaves_its_site_and_the_round_goes_on(evening):
    folder, _ = evening
    facts = vqgan_round(folder, 1)
    assert facts["failed"] == {"southampton": "NONFINITE"}
    assert facts["shares"] == {"leuven": 1.0}
    assert ("train.vqgan", "NONFINITE") in refusals(folder / "southampton")


def test_a_site_whose_work_is_killed_misses_that_round_and_takes_part_in_the_next(evening):
    folder, _ = evening
    assert vqgan_round(folder, 2)["failed"] == {"southampton": "OUT_OF_MEMORY"}
    third = vqgan_round(folder, 3)
    assert third["failed"] == {}
    assert set(third["shares"]) == {"leuven", "southampton"}
    for name in ("leuven", "southampton"):
        assert call(folder / name, "audit", "verify")[0] == 0
