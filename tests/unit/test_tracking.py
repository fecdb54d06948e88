"""MLflow hears everything once, later if need be, and no run waits for it."""

from __future__ import annotations

import json
import time

import pytest

from fourdvq_server.tracking import MlflowStore, Outbox, Tracker


@pytest.fixture(scope="module")
def client_of(tmp_path_factory):
    """One store for the module: making its schema takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    store = MlflowStore(folder / "mlflow.db", folder / "artifacts", "fourdvq")
    from mlflow.tracking import MlflowClient

    return store, MlflowClient(tracking_uri=store.uri)


def tell_a_run(folder, name, store, clock=lambda: 1000.0):
    tracker = Tracker(folder, name, store, clock=clock).start()
    tracker.begin({"plan.seed": "3"}, {"version": "0.1.0"})
    tracker.site("leuven", "train")
    for number in (1, 2):
        tracker.log_metrics("vqgan", number, "", {"loss_rec": 1.0 / number})
        tracker.log_metrics("vqgan", number, "leuven", {"share": 0.5})
    plan = folder / "plan.json"
    plan.write_text("{}")
    tracker.artifact(plan)
    tracker.end("FINISHED", {"rounds": 2.0})
    return tracker


def runs_of(client, name):
    experiment = client.get_experiment_by_name("fourdvq")
    found = client.search_runs([experiment.experiment_id], f"tags.`fourdvq.run` = '{name}'")
    return {run.data.tags["fourdvq.key"]: run for run in found}


def test_a_run_becomes_a_parent_with_a_nested_run_per_stage_and_per_site(tmp_path, client_of):
    store, client = client_of
    assert tell_a_run(tmp_path, "r1", store).close() == 0
    runs = runs_of(client, "r1")
    assert set(runs) == {"parent", "stage/vqgan", "site/leuven"}
    parent = runs["parent"]
    assert parent.data.params == {"plan.seed": "3"}
    assert parent.info.status == "FINISHED"
    assert all(r.data.tags["mlflow.parentRunId"] == parent.info.run_id for k, r in runs.items() if k != "parent")
    assert runs["site/leuven"].data.tags["role"] == "train"
    history = client.get_metric_history(runs["stage/vqgan"].info.run_id, "loss_rec")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5)]
    assert (store.artifacts / parent.info.run_id / "artifacts" / "plan.json").is_file()


def test_telling_everything_twice_changes_nothing(tmp_path, client_of):
    store, client = client_of
    tell_a_run(tmp_path, "r2", store).close()
    outbox = tmp_path / "outbox"
    # As after a crash before anything was confirmed, with the table of run ids lost as well.
    (outbox / "done.json").unlink()
    (outbox / "runs.json").unlink()
    tell_a_run(tmp_path, "r2", store).close()
    runs = runs_of(client, "r2")
    assert set(runs) == {"parent", "stage/vqgan", "site/leuven"}
    assert len(client.get_metric_history(runs["stage/vqgan"].info.run_id, "loss_rec")) == 2


def test_a_store_that_cannot_be_reached_costs_no_time_and_is_told_later(tmp_path, client_of):
    store, client = client_of
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder is needed")
    broken = MlflowStore(blocked / "mlflow.db", store.artifacts)
    started = time.monotonic()
    tracker = tell_a_run(tmp_path, "r3", broken)
    assert time.monotonic() - started < 1.0
    assert tracker.close(timeout_s=10.0) > 0
    assert Tracker(tmp_path, "r3", store).start().close() == 0
    assert set(runs_of(client, "r3")) == {"parent", "stage/vqgan", "site/leuven"}


def test_an_event_is_on_disk_before_anybody_is_told(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.add({"key": "a", "type": "metrics"})
    outbox.add({"key": "a", "type": "metrics"})
    assert [json.loads(line)["key"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == ["a"]
    assert len(Outbox(tmp_path)) == 1


def test_an_experiment_without_a_store_tracks_nothing_and_runs_all_the_same(tmp_path):
    tracker = tell_a_run(tmp_path, "r", None)
    assert tracker.close() == 0
    assert not (tmp_path / "outbox").exists()
