"""What a site answers when stage 1 cannot go on: one code, nothing half-written, and the last good state kept."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fourdvq.training.checkpoint import load_state
from fourdvq.training.vqgan import initial_weights
from fourdvq.wire.messages import Refusal, VqganUpdate
from fourdvq_client.bench import PERCEPTUAL_FILE
from fourdvq_client.round_states import RoundStates
from site_cases import Caller, codebook, prepared_site, tiny_plan, tiny_task


def quiet_plan(**training):
    plan = tiny_plan(local_steps=4)
    return replace(plan, gan=replace(plan.gan, loss="none"), vqgan=replace(plan.vqgan, **{"accumulate": 2, **training}))


def introduced(root, plan):
    caller = Caller(prepared_site(root), plan)
    caller.introduce()
    return caller


def checkpoints(caller):
    return caller.site.workspace.runs / "run-1" / "checkpoints" / "vqgan"


def moved_task(plan, by):
    """A round that starts from other weights than the first."""
    return tiny_task(plan, {n: t + by for n, t in initial_weights(plan).items()}, codebook())


@pytest.mark.parametrize("file", ["missing", "another"])
def test_a_perceptual_file_that_is_not_the_plan_s_stops_the_round_before_it_begins(tmp_path, file):
    plan = quiet_plan(perceptual="vgg_lpips", perceptual_sha256=hashlib.sha256(b"the right one").hexdigest())
    caller = introduced(tmp_path / "site", plan)
    if file == "another":
        save_file({"x": torch.zeros(1)}, caller.site.workspace.models / PERCEPTUAL_FILE)
    assert caller.ask(tiny_task(plan, initial_weights(plan), codebook())) == Refusal(code="MODEL_REJECTED")
    assert not checkpoints(caller).exists()


def test_a_site_without_an_approved_scan_trains_nothing(tmp_path):
    plan = quiet_plan()
    caller = introduced(tmp_path / "site", plan)
    (caller.site.workspace.prep / "review.csv").unlink()
    reply = caller.ask(tiny_task(plan, initial_weights(plan), codebook()))
    assert reply == Refusal(code="DATA_INVALID")
    assert not checkpoints(caller).exists()


def test_losses_that_stay_infinite_leave_as_a_code_and_the_next_round_starts_from_the_last_good_state(tmp_path):
    plan = quiet_plan()
    caller = introduced(tmp_path / "site", plan)
    assert isinstance(caller.ask(tiny_task(plan, initial_weights(plan), codebook())), VqganUpdate)
    name, kept = RoundStates(checkpoints(caller)).start_of("")

    def diverged(_module, _inputs, output):
        return replace(output, recon=output.recon * torch.inf)

    caller.site.worker._warm.trainer.model.register_forward_hook(diverged)
    assert caller.ask(moved_task(plan, 0.01)) == Refusal(code="NONFINITE")
    again, still = RoundStates(checkpoints(caller)).start_of("")
    assert again == name
    assert all(torch.equal(t, still.tensors[n]) for n, t in kept.tensors.items())
    # The site's own trainer was dropped; the one that is made from the state on disk is sound.
    assert isinstance(caller.ask(moved_task(plan, 0.02)), VqganUpdate)


def test_a_checkpoint_that_was_cut_short_is_passed_over_for_the_one_before(tmp_path):
    plan = quiet_plan()
    caller = introduced(tmp_path / "site", plan)
    for by in (0.0, 0.01):
        assert isinstance(caller.ask(moved_task(plan, by)), VqganUpdate)
    older, newest = sorted(checkpoints(caller).iterdir())
    (tensors,) = newest.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100])
    caller.site.worker.drop_warm()
    wanted = load_state(older).meta["global_step"]
    name, state = RoundStates(checkpoints(caller)).start_of("another parent")
    assert (name, state.meta["global_step"]) == (older.name, wanted)
    assert isinstance(caller.ask(moved_task(plan, 0.02)), VqganUpdate)
