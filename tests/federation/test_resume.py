"""A coordinator may die at any moment: the same command goes on, and the model is the one of an unbroken run."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator_runs import NO_SURVIVAL, DyingGrid, Killed, experiment, run, three_sites
from fourdvq_server.app import RunOptions, new_run, run_experiment
from fourdvq_server.project import Project
from fourdvq_server.store import open_store


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict:
    summary, _ = run(tmp_path_factory.mktemp("unbroken"), three_sites())
    return summary["stages"]


def test_a_run_that_is_killed_in_every_exchange_gives_the_model_of_the_unbroken_run(tmp_path, unbroken):
    project, sites = Project(tmp_path), three_sites()
    new_run(project, experiment(), name="r")
    deaths = 0
    while True:
        # The third exchange is the first after hello and plan, which every start repeats.
        grid = DyingGrid(sites, 3)
        try:
            stages = run_experiment(grid, project, "r", RunOptions(approval_wait_s=1.0, stages=NO_SURVIVAL))["stages"]
            break
        except Killed:
            deaths += 1
        finally:
            grid.close()
    assert deaths >= 10
    assert stages["vqgan"]["model_sha256"] == unbroken["vqgan"]["model_sha256"]
    assert stages["freeze"]["tokenizer_sha256"] == unbroken["freeze"]["tokenizer_sha256"]
    assert stages["release"]["weights_sha256"] == unbroken["release"]["weights_sha256"]
    # A reply that had arrived was not asked for again: 2 rounds, and at most one repetition of each by a site whose
    # reply was still under way.
    assert sites["leuven"].asked.count("train.vqgan") <= 4


def test_replies_that_had_arrived_are_taken_from_the_journal(tmp_path):
    project, sites = Project(tmp_path), three_sites()
    new_run(project, experiment("evaluation.every_rounds=0"), name="r")
    grid = DyingGrid(sites, 4)  # hello, plan, codebook_init, then the first round
    with pytest.raises(Killed):
        run_experiment(grid, project, "r", RunOptions(approval_wait_s=1.0, stages=NO_SURVIVAL))
    grid.close()
    _, store = run(tmp_path, sites, "evaluation.every_rounds=0", until="vqgan")
    reused = store.stage("vqgan").read_round(1).facts["reused"]
    assert len(reused) == 1
    assert sites[reused[0]].asked.count("train.vqgan") == 2  # once in each round, none twice


def damage_last_round(folder: Path, stage: str) -> int:
    rounds = open_store(folder / "runs" / "r").stage(stage)
    number = rounds.round_numbers()[-1]
    path = rounds.folder / f"round-{number:04d}" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    return number


def test_a_damaged_round_is_repeated_from_the_one_before_and_gives_the_same_model(tmp_path, unbroken):
    sites = three_sites()
    run(tmp_path, sites, until="vqgan")
    assert damage_last_round(tmp_path, "vqgan") == 2
    told: list[str] = []
    summary, store = run(tmp_path, sites, options=RunOptions(notify=told.append, approval_wait_s=1.0))
    assert any("E_CHECKPOINT" in text for text in told)
    assert store.stage("vqgan").read_round(2).facts["model_sha256"] == unbroken["vqgan"]["model_sha256"]
    assert summary["stages"]["release"]["weights_sha256"] == unbroken["release"]["weights_sha256"]


def test_a_finished_run_is_not_run_again(tmp_path, unbroken):
    sites = three_sites()
    run(tmp_path, sites, until="encode")
    for site in sites.values():
        site.asked.clear()
    summary, _ = run(tmp_path, sites, until="encode")
    assert set(sites["leuven"].asked) == {"query.hello", "query.plan"}
    assert summary["stages"]["encode"]["resumed"]
    assert summary["stages"]["freeze"]["tokenizer_sha256"] == unbroken["freeze"]["tokenizer_sha256"]


def test_metrics_hold_each_round_once_whatever_was_repeated(tmp_path):
    sites = three_sites()
    run(tmp_path, sites, until="vqgan")
    damage_last_round(tmp_path, "vqgan")
    _, store = run(tmp_path, sites, until="vqgan")
    keys = [(line["stage"], line["round"], line["site"]) for line in store.metrics.lines()]
    assert len(keys) == len(set(keys))
    assert ("vqgan", 2, "") in keys


def test_wire_rounds_never_repeat_over_restarts(tmp_path):
    sites = three_sites()
    seen: list[int] = []
    for site in sites.values():
        site.tamper["query.hello"] = lambda envelope, body: (seen.append(envelope.round), (envelope, body))[1]
    run(tmp_path, sites, until="hello")
    run(tmp_path, sites, until="hello")
    assert sorted(seen) == [1, 1, 1, 2, 2, 2]
