"""One codebook out of the sites' sums: exact for a frozen encoder, unlike a mean of codes.

K codes, c channels, T micro-batches in a round, g decay per micro-batch. A site assigns vectors to the codes of the
round's start and keeps, in float64, n <- g n + counts and u <- g u + sums. The whole round's decay is D = g^T, and
    N <- D N + (1 - g) sum_sites n        m <- D m + (1 - g) sum_sites u        e = m / smoothed N
which is what pooled training with the same codes would have. What a site sends is already divided by
sum_t g^(T-t) = (1 - D) / (1 - g): a mean over the round, in vectors per micro-batch, so that the merge needs D alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fourdvq.errors import ConfigError, ModelError, WireError

LAPLACE_EPS = 1e-7  # code
SPLIT_STEP = 0.05  # of the codes' standard deviation, between a revived code and the one it was split from
LLOYD_ROUNDS = 10


@dataclass(frozen=True)
class CodebookState:
    """The global codebook: codes (K, c) float32, running counts (K,) and sums (K, c) float64, in vectors per scan."""

    codes: Tensor
    counts: Tensor
    sums: Tensor


@dataclass(frozen=True)
class CodebookStats:
    """What a site sends: per code the mean count (K,) and mean vector sum (K, c) over its micro-batches, float64.

    Additive: the stats of two sites added are the stats of their union.
    """

    counts: Tensor
    sums: Tensor

    def __add__(self, other: CodebookStats) -> CodebookStats:
        return CodebookStats(self.counts + other.counts, self.sums + other.sums)


class RunningStats:
    """Collects a round's stats at a site: `add` after every micro-batch, `result` at the end."""

    def __init__(self, n_codes: int, code_dim: int, *, decay_per_round: float, micro_batches: int):
        check_decay(decay_per_round)
        self.decay = decay_per_round ** (1.0 / micro_batches)
        # With g = 1 nothing is forgotten and the weights are 1/T each.
        forgets = self.decay < 1.0
        self.scale = (1.0 - self.decay) / (1.0 - decay_per_round) if forgets else 1.0 / micro_batches
        self.counts = torch.zeros(n_codes, dtype=torch.float64)
        self.sums = torch.zeros(n_codes, code_dim, dtype=torch.float64)

    def add(self, counts: Tensor, sums: Tensor) -> None:
        """Add the counts (K,) and sums (K, c) of one micro-batch, from any device."""
        self.counts = self.counts * self.decay + counts.to("cpu", torch.float64)
        self.sums = self.sums * self.decay + sums.to("cpu", torch.float64)

    def result(self) -> CodebookStats:
        """The decayed mean over the round's micro-batches."""
        return CodebookStats(self.counts * self.scale, self.sums * self.scale)


def merge_codebooks(
    state: CodebookState, stats: Iterable[CodebookStats], *, decay: float, eps: float = LAPLACE_EPS
) -> CodebookState:
    """The codebook after a round; `decay` is the whole round's D = g^T. Site order does not matter.

    Raises WireError E_MESSAGE for stats of another shape, negative counts or non-finite values, ConfigError for a
    decay outside (0, 1].
    """
    check_decay(decay)
    total = _add_up(state, stats)
    counts = decay * state.counts + (1.0 - decay) * total.counts
    sums = decay * state.sums + (1.0 - decay) * total.sums
    return CodebookState(_codes(counts, sums, eps, fallback=state.codes), counts, sums)


def track_codebook(
    state: CodebookState, stats: Iterable[CodebookStats], *, decay: float, codes: Tensor
) -> CodebookState:
    """Update the usage alone and set `codes` (K, c): for codes learnt by gradient or fixed, which no sums may move."""
    check_decay(decay)
    total = _add_up(state, stats)
    counts = decay * state.counts + (1.0 - decay) * total.counts
    return CodebookState(codes.float().clone(), counts, codes.double() * counts[:, None])


def next_codebook(
    quantiser: Literal["ema", "loss", "fsq"],
    state: CodebookState,
    stats: Iterable[CodebookStats],
    *,
    decay: float,
    learnt_codes: Tensor | None = None,
) -> CodebookState:
    """The codebook after a round for any quantiser; `learnt_codes` are the averaged weights' codes for "loss"."""
    if quantiser == "ema":
        return merge_codebooks(state, stats, decay=decay)
    codes = learnt_codes if quantiser == "loss" and learnt_codes is not None else state.codes
    return track_codebook(state, stats, decay=decay, codes=codes)


def initial_codebook(stats: Iterable[CodebookStats], *, n_codes: int, seed: int) -> CodebookState:
    """A codebook from the sites' k-means centroids (count and vector sum each; a count of 0 is an unused row).

    Weighted k-means++ and Lloyd steps over the centroids, seeded; the order of sites and rows does not matter. With
    fewer than K centroids the heaviest are split. Raises ModelError E_WEIGHTS if there is no centroid at all.
    """
    weights, points = _centroids(stats)
    if not len(weights):
        raise ModelError("E_WEIGHTS", where="codebook initialisation", found="no centroid", wanted="at least one")
    generator = torch.Generator().manual_seed(seed)
    codes = kmeans_centres(points, weights, n_codes=n_codes, generator=generator)
    nearest = torch.cdist(points, codes).argmin(dim=1)
    counts = torch.zeros(len(codes), dtype=torch.float64).index_add_(0, nearest, weights)
    sums = torch.zeros(len(codes), points.shape[1], dtype=torch.float64)
    sums.index_add_(0, nearest, points * weights[:, None])
    missing = torch.zeros(n_codes - len(codes), dtype=torch.float64)
    counts = torch.cat([counts, missing])
    sums = torch.cat([sums, missing[:, None].expand(-1, sums.shape[1])])
    seeded = CodebookState(_codes(counts, sums, LAPLACE_EPS, fallback=torch.zeros(sums.shape)), counts, sums)
    return _split_into(seeded, [int(k) for k in (counts == 0).nonzero()[:, 0]], generator)


def revive_dead(
    state: CodebookState, dead_for: Tensor, *, share: float, rounds: int, seed: int
) -> tuple[CodebookState, Tensor]:
    """Give codes that stayed below `share` of the mean count for `rounds` rounds half of the most used code's region.

    `dead_for` (K,) int64: rounds each code has been dead, counted here. Only the coordinator does this, between
    rounds: a site that restarted a code from its own vectors would send a patient's latents.
    """
    dead = state.counts < share * state.counts.mean()
    dead_for = torch.where(dead, dead_for + 1, torch.zeros_like(dead_for))
    revived = [int(k) for k in (dead_for >= rounds).nonzero()[:, 0]]
    state = _split_into(state, revived, torch.Generator().manual_seed(seed))
    dead_for[revived] = 0
    return state, dead_for


def kmeans_centres(points: Tensor, weights: Tensor, *, n_codes: int, generator: torch.Generator) -> Tensor:
    """Weighted k-means++ and Lloyd: points (N, c), weights (N,) -> at most K centres (K', c) of positive weight."""
    centres = points[_draw(weights, generator)][None]
    nearest_sq = (points - centres[0]).square().sum(dim=1)
    while len(centres) < n_codes and bool((weights * nearest_sq > 0).any()):
        pick = points[_draw(weights * nearest_sq, generator)]
        centres = torch.cat([centres, pick[None]])
        nearest_sq = torch.minimum(nearest_sq, (points - pick).square().sum(dim=1))
    for _ in range(LLOYD_ROUNDS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        mass = torch.zeros(len(centres), dtype=points.dtype, device=points.device).index_add_(0, nearest, weights)
        moved = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        centres = torch.where(mass[:, None] > 0, moved / mass.clamp_min(1e-300)[:, None], centres)
    return centres


def check_decay(decay: float) -> None:
    """ConfigError E_VALUE unless 0 < decay <= 1."""
    if not (math.isfinite(decay) and 0.0 < decay <= 1.0):
        raise ConfigError("E_VALUE", where="codebook decay", found=str(decay), wanted="above 0, at most 1")


def check_stats(stats: CodebookStats, n_codes: int, code_dim: int) -> None:
    """WireError E_MESSAGE unless counts (K,) >= 0 and sums (K, c) are finite floats of exactly these shapes."""
    for name, tensor, shape in (("counts", stats.counts, (n_codes,)), ("sums", stats.sums, (n_codes, code_dim))):
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise WireError("E_MESSAGE", where=f"codebook {name}", found=found, wanted=f"floats {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise WireError("E_MESSAGE", where=f"codebook {name}", found="NaN or infinity", wanted="finite values")
    if bool((stats.counts < 0).any()):
        raise WireError("E_MESSAGE", where="codebook counts", found="a negative count", wanted="0 or more")


def _add_up(state: CodebookState, stats: Iterable[CodebookStats]) -> CodebookStats:
    total = CodebookStats(torch.zeros_like(state.counts), torch.zeros_like(state.sums))
    for one in stats:
        check_stats(one, *state.codes.shape)
        total = total + CodebookStats(one.counts.double(), one.sums.double())
    return total


def _codes(counts: Tensor, sums: Tensor, eps: float, *, fallback: Tensor) -> Tensor:
    """Sums over Laplace-smoothed counts; a code that never had a vector keeps its place."""
    total = counts.sum()
    smoothed = (counts + eps) / (total + len(counts) * eps) * total
    used = counts > 0
    return torch.where(used[:, None], sums / torch.where(used, smoothed, 1.0)[:, None], fallback.double()).float()


def _centroids(stats: Iterable[CodebookStats]) -> tuple[Tensor, Tensor]:
    """Weights (N,) and points (N, c) of all used rows, sorted, so that the order of sites cannot matter."""
    rows = []
    for one in stats:
        check_stats(one, *one.sums.shape)
        used = one.counts > 0
        weights = one.counts[used].double()
        rows += torch.cat([weights[:, None], one.sums[used].double() / weights[:, None]], dim=1).tolist()
    table = torch.tensor(sorted(rows), dtype=torch.float64)
    return (table[:, 0], table[:, 1:].contiguous()) if len(rows) else (table, table)


def _split_into(state: CodebookState, empty: list[int], generator: torch.Generator) -> CodebookState:
    """Fill each row of `empty` with half of the then most used code, the two moved apart along a random direction."""
    codes, counts = state.codes.double().clone(), state.counts.clone()
    if not empty:
        return state
    filled = torch.ones(len(codes), dtype=torch.bool)
    filled[empty] = False
    spread = codes[filled].std(dim=0, correction=0) if bool(filled.any()) else codes.std(dim=0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    for k in empty:
        j = int(counts.argmax())
        step = torch.randn(codes.shape[1], generator=generator, dtype=torch.float64)
        step = SPLIT_STEP * spread * step / step.norm()
        codes[k], codes[j] = codes[j] + step, codes[j] - step
        counts[j] = counts[k] = counts[j] / 2
    sums = state.sums.clone()
    touched = (codes != state.codes.double()).any(dim=1)
    sums[touched] = codes[touched] * counts[touched, None]
    return CodebookState(codes.float(), counts, sums)


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    """An index with probability in proportion to `weights`; torch.multinomial allows at most 2^24 categories."""
    cumulative = weights.double().cumsum(0)
    point = torch.rand((), generator=generator, dtype=torch.float64).to(cumulative.device) * cumulative[-1]
    return int(torch.searchsorted(cumulative, point, right=True).clamp_max(len(weights) - 1))
