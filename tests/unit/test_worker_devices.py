"""A worker of several processes: it answers as one does, and any process that dies costs one reply, not the site."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import replace

import pytest
import torch

from fourdvq.errors import ConfigError
from fourdvq.training import precision
from fourdvq.training.hardware import Hardware
from fourdvq.training.precision import SelfCheck
from fourdvq.training.vqgan import initial_weights
from fourdvq.wire.messages import Refusal, VqganUpdate
from fourdvq_client.round_states import RoundStates
from fourdvq_client.site_log import site_logger
from fourdvq_client.worker import make_worker
from fourdvq_client.workspace import Workspace, open_workspace
from site_cases import Caller, codebook, prepared_site, tiny_plan, tiny_task


def two_scan_plan():
    plan = tiny_plan()
    return replace(plan, vqgan=replace(plan.vqgan, accumulate=2), gan=replace(plan.gan, loss="none"))


def with_train(root, text):
    """The site of `root` with a `train:` line in its site.yaml."""
    path = root / "site.yaml"
    path.write_text(path.read_text() + f"\ntrain: {text}\n")
    return root


@pytest.mark.slow
def test_two_processes_answer_as_one_and_survive_the_death_of_either(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    plan = two_scan_plan()
    task = tiny_task(plan, initial_weights(plan), codebook())
    callers = [
        Caller(prepared_site(tmp_path / "one"), plan),
        Caller(with_train(prepared_site(tmp_path / "two"), "{devices: 2}"), plan, worker="process"),
    ]
    for caller in callers:
        caller.introduce()
    alone, together = (caller.ask(task) for caller in callers)
    assert isinstance(together, VqganUpdate)
    assert together.scans == alone.scans
    assert (together.code_counts == alone.code_counts).all()
    for name, tensor in alone.delta.items():
        torch.testing.assert_close(together.delta[name], tensor, rtol=1e-3, atol=2e-5)
    site = callers[1].site
    states = RoundStates(site.workspace.runs / "run-1" / "checkpoints" / "vqgan")
    assert states.start_of("")[0]
    team = [member.process.pid for member in site.worker._team]
    assert len(team) == 2
    os.kill(team[1], signal.SIGKILL)
    first = callers[1].ask(task)
    second = callers[1].ask(task) if isinstance(first, Refusal) else first
    assert first == Refusal(code="OUT_OF_MEMORY") or isinstance(first, VqganUpdate)
    assert isinstance(second, VqganUpdate)
    assert not set(team) & {member.process.pid for member in site.worker._team}
    site.close()
    assert site.worker.pid is None


def test_how_a_machine_trains_is_read_from_site_yaml(tmp_path):
    line = "{devices: 2, memory: low, micro_batch: 3, compile: never}"
    root = with_train(prepared_site(tmp_path / "site"), line)
    _, config = open_workspace(root)
    assert config.train == Hardware(devices=2, memory="low", micro_batch=3, compile="never")
    path = root / "site.yaml"
    path.write_text(path.read_text().replace("devices: 2", "devices: 0"))
    with pytest.raises(ConfigError, match="devices 0"):
        open_workspace(root)


def test_several_devices_without_processes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="worker inline"):
        make_worker("inline", Workspace(tmp_path), "cpu", Hardware(devices=2))


def test_a_machine_with_wrong_16_bit_arithmetic_says_so_in_the_site_s_log(tmp_path, monkeypatch, caplog):
    plan = two_scan_plan()
    plan = replace(plan, vqgan=replace(plan.vqgan, precision="bf16"))
    caller = Caller(prepared_site(tmp_path / "site"), plan)
    caller.introduce()
    wrong = SelfCheck(False, "conv3d", 0.5, "torch X, cuDNN Y")
    monkeypatch.setattr(precision, "check_bf16", lambda _device: wrong)
    precision.self_check.cache_clear()
    logger = site_logger(caller.site.workspace)
    monkeypatch.setattr(logger, "propagate", True)
    try:
        with caplog.at_level(logging.WARNING, logger=logger.name):
            assert isinstance(caller.ask(tiny_task(plan, initial_weights(plan), codebook())), VqganUpdate)
    finally:
        precision.self_check.cache_clear()
    (line,) = (r.getMessage() for r in caplog.records if r.name == logger.name and "W_BF16" in r.getMessage())
    assert "conv3d differs from float32 by 0.500 (torch X, cuDNN Y)" in line


def test_memory_that_ran_out_leaves_as_its_code_and_the_next_round_starts_from_the_last_good_state(tmp_path):
    plan = two_scan_plan()
    caller = Caller(prepared_site(tmp_path / "site"), plan)
    caller.introduce()
    task = tiny_task(plan, initial_weights(plan), codebook())
    first = caller.ask(task)
    assert isinstance(first, VqganUpdate)
    states = RoundStates(caller.site.workspace.runs / "run-1" / "checkpoints" / "vqgan")
    name, kept = states.start_of("")
    warm = caller.site.worker._warm.trainer

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    warm.model.register_forward_hook(full)
    # The same parent again would start from the state before; another parent goes on from the warm trainer.
    moved = {n: t + 0.01 for n, t in initial_weights(plan).items()}
    assert caller.ask(tiny_task(plan, moved, codebook())) == Refusal(code="OUT_OF_MEMORY")
    assert caller.site.worker._warm is None
    again, still = states.start_of("")
    assert again == name
    assert all(torch.equal(t, still.tensors[n]) for n, t in kept.tensors.items())
    assert isinstance(caller.ask(tiny_task(plan, moved, codebook())), VqganUpdate)


def test_scans_of_another_size_than_the_plan_s_model_are_refused_before_training(tmp_path):
    plan = two_scan_plan()
    plan = replace(plan, model=replace(plan.model, size=(16, 32, 48)))
    caller = Caller(prepared_site(tmp_path / "site"), plan)
    caller.introduce()
    reply = caller.ask(tiny_task(plan, initial_weights(plan), codebook()))
    assert isinstance(reply, Refusal)
    assert reply.code in ("PROFILE_MISMATCH", "DATA_INVALID")
