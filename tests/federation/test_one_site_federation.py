"""A federation of one site is local training on the same round schedule."""

from __future__ import annotations

import pytest
import torch

from coordinator_runs import run
from fourdvq.federation.codebook import merge_codebooks, revive_dead
from fourdvq.training.update import apply, global_norm
from fourdvq.training.vqgan import VqganTrainer
from fourdvq_server.stages.model_state import from_round
from memory_sites import MemorySite, Scans

ONE_SITE = ("federation.quorum=1", "federation.wire_dtype=float32", "federation.rounds=3", "evaluation.every_rounds=0")


@pytest.mark.usefixtures("one_thread")  # as the sites of a local grid train: the order of a sum depends on it
def test_one_site_federation_equals_local_training_to_float_precision(tmp_path):
    site = MemorySite("leuven", scans=6, seed=1)
    _, store = run(tmp_path, {"leuven": site}, *ONE_SITE, until="vqgan")
    plan = store.plan
    federated = from_round(store.stage("vqgan").read_round(3))

    start = from_round(store.stage("codebook_init").read_round(1))
    trainer = VqganTrainer(plan, seed=1)
    trainer.load_global(start.weights, start.codebook)
    codebook, dead_for = start.codebook, start.dead_for
    scans = Scans(6, plan.model.size, 100)
    steps = plan.federation.local_steps
    weights = start.weights
    for number in (1, 2, 3):
        done = trainer.train(
            scans,
            steps=steps,
            global_step=(number - 1) * steps,
            decay_per_round=plan.federation.codebook_round_decay,
        )
        codebook = merge_codebooks(codebook, [done.stats], decay=plan.federation.codebook_round_decay)
        codebook, dead_for = revive_dead(
            codebook,
            dead_for,
            share=plan.federation.dead_code_share,
            rounds=plan.federation.dead_code_rounds,
            seed=plan.seed + number,
        )
        # Nothing is averaged and nothing travels. Start + (end - start) is rounded as anywhere: without that last digit
        # the two are as near as 1e-5, because a code that flips in one of them makes it grow.
        weights = apply(weights, done.delta)
        trainer.load_global(weights, codebook)

    local = trainer.weights()
    moved = global_norm({name: tensor - local[name] for name, tensor in federated.weights.items()})
    assert moved <= 1e-6 * global_norm(local)
    torch.testing.assert_close(federated.codebook.codes, codebook.codes, rtol=0, atol=1e-6)
    torch.testing.assert_close(federated.codebook.counts, codebook.counts, rtol=1e-9, atol=1e-9)
