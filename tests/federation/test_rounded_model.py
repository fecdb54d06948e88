"""The model that goes down to sites in 16 bits: what travels, what the coordinator keeps, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch

from coordinator_runs import run
from fourdvq.training.update import apply, global_norm, join_from_wire
from fourdvq.training.vqgan import initial_weights
from fourdvq_server.stages.model_state import from_round
from memory_sites import MemorySite

COMMON = ("federation.quorum=1", "federation.rounds=3", "evaluation.every_rounds=0")


def stages(folder, dtype: str):
    _, store = run(folder, {"leuven": MemorySite("leuven", scans=6, seed=1)}, *COMMON, f"federation.wire_dtype={dtype}",
                   until="vqgan")  # fmt: skip
    return store


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    return stages(tmp_path_factory.mktemp("bfloat16"), "bfloat16")


def test_every_model_that_sites_get_is_exact_in_bfloat16_and_the_remainder_stays_with_the_coordinator(rounded):
    first = from_round(rounded.stage("codebook_init").read_round(1))
    exact = join_from_wire(first.weights, first.carry)
    assert all(torch.equal(exact[n], t) for n, t in initial_weights(rounded.plan).items())
    for number in (1, 2, 3):
        model = from_round(rounded.stage("vqgan").read_round(number))
        assert all(torch.equal(t, t.bfloat16().float()) for t in model.weights.values())
        assert 0 < global_norm(model.carry) < 2**-8 * global_norm(model.weights)


def test_the_joined_model_moves_by_exactly_what_the_only_site_sent(rounded):
    """Whose delta is against the rounded weights: the remainder is neither lost nor counted twice."""
    for number in (2, 3):
        before, after = (from_round(rounded.stage("vqgan").read_round(n)) for n in (number - 1, number))
        whole, following = join_from_wire(before.weights, before.carry), join_from_wire(after.weights, after.carry)
        moved = {n: following[n] - whole[n] for n in whole}
        sent = {n: t.bfloat16().float() for n, t in moved.items()}  # a bfloat16 delta, up to float32 rounding of sums
        back = apply(whole, sent)
        assert global_norm({n: back[n] - following[n] for n in back}) <= 1e-6 * global_norm(following)


def test_a_round_needs_about_half_the_bytes_down_that_float32_needs(rounded, tmp_path):
    def down(store) -> float:
        return store.stage("vqgan").round_facts(3)["metrics"]["leuven"]["bytes_down"]

    assert 0.45 < down(rounded) / down(stages(tmp_path, "float32")) < 0.65
