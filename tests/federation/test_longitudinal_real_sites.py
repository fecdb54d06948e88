"""The longitudinal stage with the hospitals' own client: from scans to a frozen model and scores of third scans."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coordinator_runs import NO_SURVIVAL
from fourdvq.survival.messages import HelloRequest
from fourdvq_client import embedded
from fourdvq_client.runtime import open_site
from fourdvq_server.app import RunOptions, new_run, run_experiment
from fourdvq_server.experiment import compose
from fourdvq_server.local_grid import LocalGrid
from fourdvq_server.project import Project
from fourdvq_server.stages.table import STAGES
from fourdvq_server.store import open_store

EXPERIMENT = (
    "experiment=tiny",
    "tracking=none",
    "federation.rounds=1",
    "federation.ode_rounds=1",
    "federation.local_steps=10",
    "federation.ode_local_steps=6",
    "gan.loss=none",
    "federation.wait_sites_s=1",
)
SITES = {"leuven": ("train", 22, 1), "southampton": ("train", 22, 2), "external": ("external", 6, 3)}


def hospital(folder: Path, name: str, profile) -> None:
    role, patients, seed = SITES[name]
    data = folder / "data" / name
    embedded.make_phantom(data, site=name, patients=patients, seed=seed, size=(20, 40, 40), scans_per_patient=(3, 3))
    tables = {"scans": data / "scans", "clinical": data / "clinical.csv", "scans_csv": data / "scans.csv"}
    embedded.create_site(folder / name, site=name, role=role, profile=profile, **tables)
    embedded.preprocess(folder / name, decision="demo")
    # A handful of test patients is far below every minimum: rules that so few meet.
    policy = folder / name / "policy.yaml"
    text = policy.read_text(encoding="utf-8")
    for field in ("min_patients", "min_events", "min_carriers", "min_distinct", "min_class", "min_effective_patients"):
        text = re.sub(rf"^(  {field}:) .*$", r"\1 1", text, flags=re.M)
    policy.write_text(re.sub(r"^(  max_dominance:) .*$", r"\1 1.0", text, flags=re.M), encoding="utf-8")


def most_varied_code(root: Path, store) -> int:
    """The code with the most different shares in a training site's first scans."""
    tokenizer = store.stage("freeze").read_round(1).facts["tokenizer_sha256"]
    shares = open_site(root, worker="inline").cox.tables(HelloRequest(), tokenizer, store.plan).X
    return max(range(shares.shape[1]), key=lambda code: len(set(shares[:, code])))


@pytest.mark.slow
def test_third_scans_are_generated_and_scored_at_real_sites(tmp_path):
    experiment = compose(EXPERIMENT)
    for name in SITES:
        hospital(tmp_path, name, experiment.profile_plain)
    project = Project(tmp_path / "coordinator")
    new_run(project, experiment, name="r")
    store = open_store(project.runs / "r")
    apps = {name: embedded.client_app(tmp_path / name, worker="inline") for name in SITES}

    def approve(sites):
        for site in sites:
            embedded.approve(tmp_path / site, by="test")

    with LocalGrid(apps, one_at_a_time=True) as grid:
        options = RunOptions(on_unapproved=approve, approval_wait_s=10, stages=NO_SURVIVAL)
        run_experiment(grid, project, "r", options)
        # Noise is rarely selected, and must not be for this test: the codes are named instead.
        code = most_varied_code(tmp_path / "leuven", store)
        numbers = {f"code_{code}": (0.8, 0.1, 0.2), "age": (0.3, 0, 1), "sex": (0.1, 0, 1), "smoking": (0, 0, 1)}
        rows = [{"name": n, "beta_per_sd": b, "mean": m, "sd": sd} for n, (b, m, sd) in numbers.items()]
        model = {"coefficients": rows, "banner": ""}
        store.stage("survival").finish({"selected": [code], "codes": [], "model": model})
        run_experiment(grid, project, "r", RunOptions(approval_wait_s=10, stages=STAGES))
    facts = store.stage("longitudinal").result
    assert facts is not None
    assert facts["why"] in ("", "no comparable pair, so there is no C")
    assert set(facts["concordance"]) == {"real", "generated", "carried"}
    assert "external" in facts["sites"]
    assert all((tmp_path / name / "runs" / "r" / "future_codes.json").is_file() for name in SITES)
