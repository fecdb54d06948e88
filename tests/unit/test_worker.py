"""The two workers do the same; a process that dies costs one reply, not the site."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from fourdvq.training.vqgan import initial_model, initial_weights
from fourdvq.wire.messages import OdeTask, Refusal, VqganUpdate
from fourdvq_client.code_census import SomeScans, census_of_centroids
from fourdvq_client.round_states import RoundStates
from fourdvq_client.transfer import from_parcel, to_parcel
from site_cases import (
    Caller,
    codebook,
    ode_weights,
    prepared_site,
    tiny_plan,
    tiny_task,
    vqgan_update,
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def test_a_parcel_brings_back_the_same_message_in_any_precision():
    update = vqgan_update()
    half = VqganUpdate(
        delta={n: t.bfloat16() for n, t in update.delta.items()},
        code_counts=update.code_counts,
        code_sums=update.code_sums,
        scans=3,
        losses={"loss_rec": 0.5},
    )
    back = from_parcel(VqganUpdate, to_parcel(half))
    assert all(torch.equal(back.delta[n], half.delta[n]) for n in half.delta)
    assert (back.code_sums == half.code_sums).all()
    assert back.losses == half.losses


def test_a_worker_process_answers_as_the_inline_worker_and_survives_its_own_death(tmp_path):
    plan = tiny_plan()
    replies = {}
    for kind in ("inline", "process"):
        caller = Caller(prepared_site(tmp_path / kind), plan, worker=kind)
        caller.introduce()
        replies[kind] = caller.ask(tiny_task(plan, initial_weights(plan), codebook()))
    inline, process = replies["inline"], replies["process"]
    assert isinstance(process, VqganUpdate)
    for name, tensor in inline.delta.items():
        torch.testing.assert_close(process.delta[name], tensor, rtol=1e-4, atol=1e-6)
    # A refusal inside the process keeps its code.
    task = OdeTask(steps=1, tokenizer_sha256="0" * 64, weights=ode_weights(plan))
    assert caller.ask(task) == Refusal(code="MODEL_REJECTED")
    # The kernel's answer to no memory: killed without a word. The next job starts a new process from the saved state.
    killed = caller.site.worker.pid
    os.kill(killed, signal.SIGKILL)
    nxt = tiny_task(plan, initial_weights(plan), codebook())
    first = caller.ask(nxt)
    second = caller.ask(nxt) if isinstance(first, Refusal) else first
    assert first == Refusal(code="OUT_OF_MEMORY") or isinstance(first, VqganUpdate)
    assert isinstance(second, VqganUpdate)
    assert caller.site.worker.pid != killed
    assert all(torch.equal(second.delta[n], process.delta[n]) for n in process.delta)
    caller.site.close()
    assert caller.site.worker.pid is None


def test_a_job_of_another_kind_is_a_bug_that_leaves_as_a_code(tmp_path):
    caller = Caller(prepared_site(tmp_path / "site"), tiny_plan())
    from fourdvq_client.worker import Job

    task = OdeTask(steps=1, tokenizer_sha256="", weights={})
    with pytest.raises(TypeError):
        caller.site.worker.train_vqgan(Job(task, caller.envelope(task), caller.plan, 0))


# --- patients per code --------------------------------------------------------------------------------------------


class Scans:
    """Two patients with two scans each; the second patient's are all air."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        air = torch.zeros(1, 8, 8, 8)
        return air if index > 1 else torch.rand(1, 8, 8, 8, generator=generator)

    def patient_of(self, index):
        return "ab"[index // 2]


def small_model():
    from site_cases import SMALL

    return initial_model(SMALL).eval()


def test_the_census_of_centroids_sees_which_patients_share_one():
    from fourdvq.training.codebook_init import kmeans_stats

    model, scans = small_model(), SomeScans(Scans(), [0, 1, 2, 3])
    stats = kmeans_stats(model, scans, n_codes=4, seed=0, min_vectors=1)
    counted = census_of_centroids(model, scans, stats)
    assert counted.shape == (4,)
    assert set(counted[(stats.counts > 0).numpy()].tolist()) <= {1, 2}
    alone = census_of_centroids(model, SomeScans(Scans(), [0, 1]), stats)
    assert alone.max() == 1


# --- states over rounds -------------------------------------------------------------------------------------------


def test_a_round_starts_from_the_newest_state_that_answered_another_parent(tmp_path):
    from fourdvq.training.checkpoint import TrainState

    states = RoundStates(tmp_path)
    assert states.start_of("w0") == ("", None)
    for number, parent in ((1, "w0"), (2, "w1"), (3, "w1")):  # round 3 repeats round 2
        states.save(number, parent, TrainState({"x": torch.tensor([float(number)])}, {}))
    assert states.start_of("w2")[0] == "000003"
    assert states.start_of("w1")[0] == "000001"
    states.save(4, "w2", TrainState({"x": torch.zeros(1)}, {}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000002", "000003", "000004"]
