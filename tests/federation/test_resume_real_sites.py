"""The whole row with the hospitals' own client: folders, policies, guards and synthetic scans, in one process."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from coordinator_runs import NO_SURVIVAL, DyingGrid, Killed
from fourdvq_client import embedded
from fourdvq_server.app import RunOptions, new_run, run_experiment
from fourdvq_server.experiment import compose
from fourdvq_server.local_grid import LocalGrid
from fourdvq_server.project import Project
from fourdvq_server.store import open_store

# Ten of a site's twelve or so training scans a round: enough patients for the demo's policy.
EXPERIMENT = (
    "experiment=tiny",
    "tracking=none",
    "federation.local_steps=10",
    "federation.ode_local_steps=6",
    "gan.start_step=15",
    "federation.wait_sites_s=1",
)
SITES = {"leuven": ("train", 6, 1), "southampton": ("train", 6, 2), "external": ("external", 3, 3)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Site folders with prepared scans, as `init` and `preprocess` leave them."""
    folder = tmp_path_factory.mktemp("sites")
    profile = compose(EXPERIMENT).profile_plain
    for name, (role, patients, seed) in SITES.items():
        data = folder / "data" / name
        embedded.make_phantom(
            data, site=name, patients=patients, seed=seed, size=(20, 40, 40), scans_per_patient=(3, 3)
        )
        tables = {"scans": data / "scans", "clinical": data / "clinical.csv", "scans_csv": data / "scans.csv"}
        embedded.create_site(folder / name, site=name, role=role, profile=profile, **tables)
        embedded.preprocess(folder / name, decision="demo")
    return folder


def federate(prepared: Path, folder: Path, *, die_in: int = 0) -> tuple[dict, int, Project]:
    """Copy the sites, run to the end, and start again after every death; summary, deaths, coordinator."""
    for name in SITES:
        shutil.copytree(prepared / name, folder / name, dirs_exist_ok=True)
    project, deaths = Project(folder / "coordinator"), 0
    new_run(project, compose(EXPERIMENT), name="r")
    options = RunOptions(
        on_unapproved=lambda sites: [embedded.approve(folder / s, by="test") for s in sites],
        approval_wait_s=10,
        stages=NO_SURVIVAL,
    )
    while True:
        apps = {name: embedded.client_app(folder / name, worker="inline") for name in SITES}
        grid = DyingGrid(apps, die_in) if die_in else LocalGrid(apps, one_at_a_time=True)
        try:
            return run_experiment(grid, project, "r", options), deaths, project
        except Killed:
            deaths += 1
        finally:
            grid.close()


@pytest.fixture(scope="module")
def unbroken(prepared, tmp_path_factory) -> tuple[dict, int, Project]:
    return federate(prepared, tmp_path_factory.mktemp("unbroken"))


def test_real_sites_go_from_hello_to_a_release_that_all_of_them_hold(unbroken):
    summary, _, project = unbroken
    stages = summary["stages"]
    assert stages["hello"]["refused"] == {}
    assert stages["encode"]["failed"] == {}
    assert sorted(stages["release"]["received_by"]) == ["external", "leuven", "southampton"]
    validated = open_store(project.runs / "r").stage("validate").result
    assert validated is not None
    rows = {(r["row"], r["metric"]) for r in validated["groups"]["external"]}
    assert {("model", "extrapolation/mse/lung"), ("persistence", "extrapolation/mse/lung")} <= rows


def test_nothing_at_the_coordinator_names_a_patient_a_pseudonym_or_a_path_of_a_site(unbroken, prepared):
    _, _, project = unbroken
    known = set()
    for name in SITES:
        table = (prepared / "data" / name / "clinical.csv").read_text().splitlines()
        known |= {line.split(",")[0] for line in table[1:]}
        known |= {p.name for p in (prepared / name / "prep").iterdir() if re.fullmatch("[0-9a-f]{12}", p.name)}
    assert len(known) == 2 * sum(patients for _, patients, _ in SITES.values())
    text = b"".join(p.read_bytes() for p in project.root.rglob("*") if p.is_file() and p.suffix != ".safetensors")
    assert not [word for word in known if word.encode() in text]
    assert b"/prep/" not in text
    assert b"clinical.csv" not in text


def test_an_external_site_is_never_asked_to_train(unbroken, tmp_path):
    _, _, project = unbroken
    store = open_store(project.runs / "r")
    for stage in ("vqgan", "ode"):
        for number in (1, 2):
            assert "external" not in store.stage(stage).read_round(number).facts["shares"]


@pytest.mark.slow
def test_real_sites_give_the_same_bits_when_the_coordinator_dies_in_every_exchange(prepared, unbroken, tmp_path):
    summary, deaths, _ = federate(prepared, tmp_path, die_in=3)
    assert deaths >= 10
    ours, theirs = summary["stages"], unbroken[0]["stages"]
    assert ours["vqgan"]["model_sha256"] == theirs["vqgan"]["model_sha256"]
    assert ours["release"]["weights_sha256"] == theirs["release"]["weights_sha256"]
