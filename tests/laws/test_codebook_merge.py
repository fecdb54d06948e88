"""One codebook out of many sites' sums: equal to pooling, blind to order, never re-seeded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdvq.errors import ConfigError, ModelError, WireError
from fourdvq.federation.codebook import (
    CodebookState,
    CodebookStats,
    RunningStats,
    initial_codebook,
    merge_codebooks,
    next_codebook,
    revive_dead,
)
from fourdvq.models.codebook import assignment_sums, nearest_codes

K, C = 12, 3
DECAY = 0.37


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start() -> CodebookState:
    codes, counts = random(K, C, seed=0), torch.full((K,), 20.0, dtype=torch.float64)
    return CodebookState(codes, counts, codes.double() * counts[:, None])


def batches(site: int, n: int) -> list[torch.Tensor]:
    """Latents of a frozen encoder, micro-batch by micro-batch; sites differ in location and size."""
    return [random(150 + 50 * site, C, seed=100 * site + t) + 0.6 * site for t in range(n)]


def site_stats(state: CodebookState, micro_batches: list[torch.Tensor], planned: int) -> CodebookStats:
    running = RunningStats(K, C, decay_per_round=DECAY, micro_batches=planned)
    for vectors in micro_batches:
        running.add(*assignment_sums(vectors, nearest_codes(vectors, state.codes), K))
    return running.result()


def pooled_by_one_hot(state: CodebookState, micro_batches: list[list[torch.Tensor]], g: float) -> torch.Tensor:
    """The textbook update, written out: after each micro-batch N, m <- g N + (1 - g) one-hot sums, then smoothing."""
    counts, sums = state.counts.clone(), state.sums.clone()
    for together in micro_batches:
        vectors = torch.cat(together).double()
        distances = torch.cdist(vectors, state.codes.double())
        one_hot = torch.nn.functional.one_hot(distances.argmin(1), K).double()
        counts = g * counts + (1 - g) * one_hot.sum(0)
        sums = g * sums + (1 - g) * one_hot.T @ vectors
    total = counts.sum()
    return sums / ((counts + 1e-7) / (total + K * 1e-7) * total)[:, None]


def test_merged_sites_equal_pooled_training_and_averaged_codes_do_not():
    state, steps = start(), 40
    sites = [batches(0, steps), batches(1, steps)]
    pooled = pooled_by_one_hot(state, [list(pair) for pair in zip(*sites, strict=True)], DECAY ** (1 / steps))
    stats = [site_stats(state, site, steps) for site in sites]
    merged = merge_codebooks(state, stats, decay=DECAY).codes.double()
    averaged = torch.stack([merge_codebooks(state, [one], decay=DECAY).codes for one in stats]).mean(0).double()
    assert float((merged - pooled).abs().max()) < 1e-6
    assert float((averaged - pooled).abs().max()) > 1e-2


def test_a_site_that_stops_early_is_aligned_at_the_end_of_the_round():
    state, steps = start(), 40
    late = batches(1, 25)
    together = [[a] + ([late[t - 15]] if t >= 15 else []) for t, a in enumerate(batches(0, steps))]
    pooled = pooled_by_one_hot(state, together, DECAY ** (1 / steps))
    stats = [site_stats(state, batches(0, steps), steps), site_stats(state, late, steps)]
    assert float((merge_codebooks(state, stats, decay=DECAY).codes.double() - pooled).abs().max()) < 1e-6


def test_one_micro_batch_is_the_textbook_running_average():
    state, vectors = start(), batches(1, 1)
    merged = merge_codebooks(state, [site_stats(state, vectors, 1)], decay=DECAY)
    pooled = pooled_by_one_hot(state, [vectors], DECAY)
    torch.testing.assert_close(merged.codes.double(), pooled, rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 3))
def test_neither_the_order_of_sites_nor_their_grouping_matters(order, cut):
    state = start()
    stats = [site_stats(state, batches(s, 3), 3) for s in range(4)]
    whole = merge_codebooks(state, stats, decay=DECAY)
    shuffled = [stats[i] for i in order]
    grouped = [sum(shuffled[1:cut], shuffled[0]), sum(shuffled[cut + 1 :], shuffled[cut])]
    for other in (merge_codebooks(state, shuffled, decay=DECAY), merge_codebooks(state, grouped, decay=DECAY)):
        torch.testing.assert_close(other.counts, whole.counts, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.codes, whole.codes, rtol=0, atol=1e-6)


def test_the_sum_of_two_sites_stats_is_the_stats_of_their_union():
    state = start()
    a, b = batches(0, 5), batches(1, 5)
    union = site_stats(state, [torch.cat(pair) for pair in zip(a, b, strict=True)], 5)
    total = site_stats(state, a, 5) + site_stats(state, b, 5)
    torch.testing.assert_close(total.counts, union.counts, rtol=1e-12, atol=0)
    torch.testing.assert_close(total.sums, union.sums, rtol=0, atol=1e-9)


def test_with_no_forgetting_a_round_changes_nothing_and_stats_are_plain_means():
    state = start()
    running = RunningStats(K, C, decay_per_round=1.0, micro_batches=4)
    for _ in range(4):
        running.add(torch.full((K,), 3.0), torch.ones(K, C))
    assert torch.equal(running.result().counts, torch.full((K,), 3.0, dtype=torch.float64))
    assert torch.equal(merge_codebooks(state, [running.result()], decay=1.0).counts, state.counts)


def test_a_code_without_vectors_keeps_its_place():
    state = start()
    nothing = CodebookStats(torch.zeros(K, dtype=torch.float64), torch.zeros(K, C, dtype=torch.float64))
    merged = merge_codebooks(state, [nothing], decay=DECAY)
    torch.testing.assert_close(merged.codes, state.codes, rtol=1e-6, atol=1e-6)
    empty = CodebookState(state.codes, torch.zeros_like(state.counts), torch.zeros_like(state.sums))
    assert torch.equal(merge_codebooks(empty, [nothing], decay=DECAY).codes, state.codes)


@pytest.mark.parametrize("case", ["shape", "negative", "nan", "integer"])
def test_stats_that_cannot_be_are_refused(case):
    counts, sums = torch.ones(K, dtype=torch.float64), torch.zeros(K, C, dtype=torch.float64)
    bad = {
        "shape": CodebookStats(counts[:1], sums),
        "negative": CodebookStats(-counts, sums),
        "nan": CodebookStats(counts, sums * math.nan),
        "integer": CodebookStats(counts.long(), sums),
    }[case]
    with pytest.raises(WireError, match="E_MESSAGE"):
        merge_codebooks(start(), [bad], decay=DECAY)


@pytest.mark.parametrize("decay", [0.0, -0.1, 1.1, math.nan])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ConfigError, match="E_VALUE"):
        merge_codebooks(start(), [], decay=decay)


def clusters(site: int) -> CodebookStats:
    """Ten centroids around each of K far apart places, half of them at each site, and an unused row."""
    places = 50.0 * random(K, C, seed=9)
    points = torch.cat([places + random(K, C, seed=10 * site + i) for i in range(5)]).double()
    counts = torch.linspace(100, 200, len(points), dtype=torch.float64)
    none = torch.zeros(1, dtype=torch.float64)
    return CodebookStats(
        torch.cat([counts, none]), torch.cat([points * counts[:, None], torch.zeros(1, C, dtype=torch.float64)])
    )


def test_the_first_codebook_finds_the_clusters_of_both_sites_and_is_consistent():
    state = initial_codebook([clusters(0), clusters(1)], n_codes=K, seed=0)
    places = 50.0 * random(K, C, seed=9)
    assert float(torch.cdist(places, state.codes).min(dim=1).values.max()) < 2.0
    torch.testing.assert_close(state.codes.double(), state.sums / state.counts[:, None], rtol=1e-6, atol=1e-6)
    assert float(state.counts.sum()) == pytest.approx(float((clusters(0).counts + clusters(1).counts).sum()))


def test_the_first_codebook_does_not_depend_on_the_order_of_sites():
    forth, back = (
        initial_codebook(s, n_codes=K, seed=0) for s in ([clusters(0), clusters(1)], [clusters(1), clusters(0)])
    )
    assert torch.equal(forth.codes, back.codes)


def test_with_fewer_centroids_than_codes_the_heaviest_are_split():
    counts = torch.tensor([8.0, 1.0, 0.0], dtype=torch.float64)
    points = torch.tensor([[1.0, 0], [0, 5.0], [0, 0]], dtype=torch.float64)
    state = initial_codebook([CodebookStats(counts, points * counts[:, None])], n_codes=4, seed=0)
    assert len(torch.unique(state.codes, dim=0)) == 4
    assert float(state.counts.sum()) == pytest.approx(9.0)
    with pytest.raises(ModelError, match="no centroid"):
        initial_codebook([CodebookStats(counts * 0, points)], n_codes=4, seed=0)


def test_a_code_dead_for_two_rounds_gets_half_of_the_most_used_and_no_other_code_moves():
    state = start()
    counts = state.counts.clone()
    counts[3], counts[7] = 1e-4, 90.0
    state = CodebookState(state.codes, counts, state.codes.double() * counts[:, None])
    once, dead_for = revive_dead(state, torch.zeros(K, dtype=torch.int64), share=0.0026, rounds=2, seed=0)
    assert torch.equal(once.codes, state.codes)
    assert dead_for.nonzero().flatten().tolist() == [3]
    twice, dead_for = revive_dead(once, dead_for, share=0.0026, rounds=2, seed=0)
    assert int(dead_for.sum()) == 0
    moved = (twice.codes != state.codes).any(dim=1).nonzero().flatten().tolist()
    assert moved == [3, 7]
    assert twice.counts[3] == twice.counts[7] == 45.0
    assert float((twice.codes[3] - state.codes[7]).norm()) < float(state.codes.std())
    torch.testing.assert_close(twice.sums, twice.codes.double() * twice.counts[:, None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantiser", ["loss", "fsq"])
def test_sums_do_not_move_codes_that_are_learnt_by_gradient_or_fixed(quantiser):
    state = start()
    stats = [site_stats(state, batches(1, 3), 3)]
    learnt = state.codes + 1.0
    after = next_codebook(quantiser, state, stats, decay=DECAY, learnt_codes=learnt)
    assert torch.equal(after.codes, learnt if quantiser == "loss" else state.codes)
    torch.testing.assert_close(after.counts, merge_codebooks(state, stats, decay=DECAY).counts)
