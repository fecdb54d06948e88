"""One bad site costs its own reply and nothing else: each fault has a code, and the round goes on without it."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from coordinator_runs import experiment, run, stages_until, three_sites
from fourdvq.errors import ConfigError, TemporaryStop
from fourdvq_server.app import RunOptions, allow_to_run, new_run, run_experiment
from fourdvq_server.local_grid import LocalGrid
from fourdvq_server.project import Project
from fourdvq_server.store import Control, RunStore, open_store
from memory_sites import relabel, retouch

QUORUM_ONE = ("federation.quorum=1", "federation.rounds=1", "evaluation.every_rounds=0")


def first_round(store: RunStore) -> dict:
    return store.stage("vqgan").read_round(1).facts


def _nan(delta):
    broken = {name: tensor.clone() for name, tensor in delta.items()}
    next(iter(broken.values())).view(-1)[0] = float("nan")
    return broken


def _broadcastable(delta):
    name = next(n for n, t in delta.items() if t.ndim == 1 and len(t) > 1)
    return {**delta, name: delta[name][:1]}


FAULTS = {
    "an update with NaN": (retouch(delta=_nan), "E_NONFINITE"),
    "a shape that would broadcast": (retouch(delta=_broadcastable), "E_MESSAGE"),
    "a tensor too many": (retouch(delta=lambda d: {**d, "extra": torch.zeros(1)}), "E_MESSAGE"),
    "finer numbers than the plan allows": (
        retouch(delta=lambda d: {n: t.double() for n, t in d.items()}),
        "E_MESSAGE",
    ),
    "a negative code count": (retouch(code_counts=lambda c: c - 1e6), "E_MESSAGE"),
    "infinite code sums": (retouch(code_sums=lambda s: s * float("inf")), "E_NONFINITE"),
    "no scans": (retouch(scans=lambda n: 0), "E_MESSAGE"),
    "another protocol": (relabel(protocol=99), "PROTOCOL_MISMATCH"),
    "another run": (relabel(run="other"), "E_REPLY"),
    "an old round": (relabel(round=1), "E_REPLY"),
    "another plan": (relabel(plan="0" * 64), "E_REPLY"),
    "weights it did not start from": (relabel(parent="0" * 64), "PARENT_MISMATCH"),
    "another site's name": (relabel(site="leuven"), "E_SITE_NAME"),
    "content changed after hashing": (relabel(payload_sha256="0" * 64), "E_PAYLOAD"),
}


@pytest.fixture(scope="module")
def one_fault_a_round(tmp_path_factory) -> dict[str, dict]:
    """Facts of a run in which southampton breaks another rule in every round."""
    sites = three_sites()
    faults = iter(FAULTS.values())
    sites["southampton"].tamper["train.vqgan"] = lambda envelope, body: next(faults)[0](envelope, body)
    overrides = ("federation.quorum=1", f"federation.rounds={len(FAULTS)}", "federation.local_steps=1")
    _, store = run(tmp_path_factory.mktemp("faults"), sites, *overrides, "evaluation.every_rounds=0", until="vqgan")
    stage = store.stage("vqgan")
    return {fault: stage.read_round(n).facts for n, fault in enumerate(FAULTS, start=1)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.replace(" ", "-"))
def test_a_bad_reply_is_put_aside_with_its_code_and_the_other_site_carries_the_round(one_fault_a_round, fault):
    facts = one_fault_a_round[fault]
    assert facts["failed"] == {"southampton": FAULTS[fault][1]}
    assert facts["shares"] == {"leuven": 1.0}


def test_the_round_without_the_bad_site_is_the_round_of_the_good_site_alone(tmp_path):
    sites = three_sites()
    sites["southampton"].tamper["train.vqgan"] = retouch(delta=_nan)
    _, with_fault = run(tmp_path / "fault", sites, *QUORUM_ONE, until="vqgan")
    sites = three_sites()
    # The same codebook for both: only the round differs.
    sites["southampton"].before["train.vqgan"] = _crash
    _, alone = run(tmp_path / "alone", sites, *QUORUM_ONE, until="vqgan")
    assert first_round(with_fault)["model_sha256"] == first_round(alone)["model_sha256"]


def _crash() -> None:
    raise RuntimeError("patient LEU-004217 in /data/secret")


def test_a_site_that_dies_in_a_round_is_lost_with_a_code_and_its_text_reaches_no_file(tmp_path, caplog):
    sites = three_sites()
    sites["southampton"].before["train.vqgan"] = _crash
    _, store = run(tmp_path, sites, *QUORUM_ONE, until="vqgan")
    assert first_round(store)["failed"] == {"southampton": "INTERNAL"}
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"LEU-004217" not in written


def test_an_update_coarser_than_the_plan_is_taken(tmp_path):
    sites = three_sites()
    coarser = retouch(delta=lambda d: {n: t.to(torch.bfloat16) for n, t in d.items()})
    sites["southampton"].tamper["train.vqgan"] = coarser
    _, store = run(tmp_path, sites, *QUORUM_ONE, "federation.wire_dtype=float32", until="vqgan")
    assert first_round(store)["failed"] == {}


def test_too_few_valid_replies_stop_the_run_with_the_reasons(tmp_path):
    sites = three_sites()
    sites["southampton"].tamper["train.vqgan"] = retouch(delta=_nan)
    with pytest.raises(TemporaryStop) as stop:
        run(tmp_path, sites, until="vqgan")
    assert stop.value.code == "E_QUORUM"
    assert "southampton E_NONFINITE" in stop.value.found


def test_a_straggler_misses_the_round_and_its_late_reply_is_not_used(tmp_path):
    sites = three_sites()
    heard = threading.Event()
    told: list[str] = []

    def sleep_once():
        if not heard.is_set():
            heard.wait(30)

    def notify(text: str) -> None:
        told.append(text)
        if "no reply" in text:
            heard.set()

    sites["southampton"].before["train.vqgan"] = sleep_once
    overrides = ("federation.quorum=1", "federation.rounds=2", "federation.deadline_s=3", "evaluation.every_rounds=0")
    options = RunOptions(notify=notify)
    # Sites work side by side here, or the sleeper would hold up the other one.
    project = Project(tmp_path)
    new_run(project, experiment(*overrides), name="r")
    with LocalGrid(sites) as grid:
        run_experiment(grid, project, "r", dataclasses.replace(options, stages=stages_until("vqgan")))
    stage = open_store(tmp_path / "runs" / "r").stage("vqgan")
    assert stage.read_round(1).facts["failed"] == {"southampton": "TIMEOUT"}
    assert stage.read_round(2).facts["failed"] == {}
    assert any("southampton" in text and "STALE_ROUND" in text for text in told)


def test_a_site_that_is_not_there_is_said_to_be_unreachable(tmp_path):
    with pytest.raises(TemporaryStop) as stop:
        run(
            tmp_path,
            three_sites(),
            until="hello",
            offline=["southampton"],
            options=RunOptions(roles={"leuven": "train", "southampton": "train"}),
        )
    assert stop.value.code == "E_QUORUM"


def test_a_site_in_another_role_than_it_was_admitted_with_is_kept_out(tmp_path):
    roles = {"leuven": "train", "southampton": "train", "external": "train"}
    _, store = run(tmp_path, three_sites(), until="hello", options=RunOptions(roles=roles))
    result = store.stage("hello").result
    assert result is not None
    assert result["refused"] == {"external": "E_ROLE"}
    assert set(result["sites"]) == {"leuven", "southampton"}


def test_a_site_that_is_not_registered_is_never_asked(tmp_path):
    sites = three_sites()
    run(tmp_path, sites, until="plan", options=RunOptions(roles={"leuven": "train", "southampton": "train"}))
    assert sites["external"].asked == []


def test_a_site_with_another_profile_does_not_train(tmp_path):
    sites = three_sites()
    sites["southampton"].profile = "f" * 64
    options = RunOptions(approval_wait_s=0.2)
    _, store = run(tmp_path, sites, *QUORUM_ONE, until="vqgan", options=options)
    assert "train.vqgan" not in sites["southampton"].asked
    plan = store.stage("plan").result
    assert plan is not None
    assert plan["refused"] == {"southampton": "PROFILE_MISMATCH"}


def test_the_run_waits_until_the_quorum_has_approved(tmp_path):
    sites = three_sites()
    for site in sites.values():
        site.approved = False
    with pytest.raises(TemporaryStop) as stop:
        run(tmp_path, sites, until="plan", options=RunOptions(approval_wait_s=0.2))
    assert stop.value.code == "E_NO_APPROVAL"
    asked = []

    def approve(names):
        asked.append(list(names))
        for name in names:
            sites[name].approved = True

    run(tmp_path, sites, until="plan", options=RunOptions(on_unapproved=approve))
    assert asked == [["external", "leuven", "southampton"]]


def test_a_site_that_approves_later_joins_the_next_round(tmp_path):
    sites = three_sites()
    sites["southampton"].approved = False
    sites["leuven"].before["train.vqgan"] = lambda: setattr(sites["southampton"], "approved", True)
    _, store = run(tmp_path, sites, "federation.quorum=1", until="vqgan")
    stage = store.stage("vqgan")
    assert sorted(stage.read_round(1).facts["shares"]) == ["leuven"]
    assert sorted(stage.read_round(2).facts["shares"]) == ["leuven", "southampton"]


def test_a_larger_site_is_capped_and_a_site_cannot_claim_more_than_it_registered(tmp_path):
    sites = three_sites()
    sites["leuven"].n_scans = 40
    sites["southampton"].tamper["train.vqgan"] = retouch(scans=lambda n: 10**9)
    _, store = run(tmp_path, sites, "federation.local_steps=8", "federation.rounds=1", until="vqgan")
    shares = first_round(store)["shares"]
    # leuven used 8 of 40 scans; southampton's claim counts as its 4 registered scans.
    assert shares == pytest.approx({"leuven": 8 / 12, "southampton": 4 / 12})


def test_batch_norm_over_two_sites_is_refused_before_any_work(tmp_path):
    sites = three_sites()
    with pytest.raises(ConfigError) as error:
        run(tmp_path, sites, "model.norm=batch", until="vqgan")
    assert error.value.code == "E_NORM"
    assert set(sites["leuven"].asked) == {"query.hello"}


def test_a_median_of_two_sites_is_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError) as error:
        run(tmp_path, three_sites(), "federation.aggregator=median", until="vqgan")
    assert error.value.code == "E_UNSUPPORTED"


def test_an_audit_log_that_was_put_back_is_noticed(tmp_path):
    sites = three_sites()
    sites["southampton"].tamper["train.vqgan"] = relabel(audit_head="a" * 64)
    _, store = run(tmp_path, sites, "federation.quorum=1", "evaluation.every_rounds=0", until="vqgan")
    stage = store.stage("vqgan")
    assert stage.read_round(1).facts["failed"] == {}
    assert stage.read_round(2).facts["failed"] == {"southampton": "E_AUDIT"}


def test_a_run_that_a_person_stops_says_so_and_goes_on_when_resumed(tmp_path):
    sites = three_sites()

    def stop():
        open_store(tmp_path / "runs" / "r").set_control(Control(stop=True))

    sites["leuven"].before["train.vqgan"] = stop
    with pytest.raises(TemporaryStop) as stopped:
        run(tmp_path, sites, until="vqgan")
    assert stopped.value.code == "CANCELLED"
    del sites["leuven"].before["train.vqgan"]
    allow_to_run(Project(tmp_path), "r")
    summary, store = run(tmp_path, sites, until="vqgan")
    assert summary["stages"]["vqgan"]["rounds"] == 2
    assert store.status["state"] == "done"
