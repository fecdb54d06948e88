"""Rounds of stage 1 for the training experiments, with the library's own arithmetic: as the coordinator runs them over
sites, or with one trainer whose codes move at the end of a round as the coordinator would move them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourdvq.federation.aggregate import SERVER_OPTIMIZERS, weighted_mean
from fourdvq.federation.codebook import CodebookState, CodebookStats, initial_codebook, next_codebook, revive_dead
from fourdvq.models.vqgan import VQGAN3d, load_codebook, load_generator
from fourdvq.plan import Plan
from fourdvq.training.codebook_init import kmeans_stats
from fourdvq.training.sampling import ScanSource
from fourdvq.training.seeds import derive_seed
from fourdvq.training.update import split_for_wire
from fourdvq.training.vqgan import VqganTrainer, initial_model, initial_weights


@dataclass
class Server:
    """What the coordinator keeps between rounds; `weights` are float32 and nothing is lost of them on the way."""

    weights: dict[str, Tensor]
    codebook: CodebookState
    dead_for: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict)


def trainer_of(plan: Plan, name: str) -> VqganTrainer:
    """A site's trainer; `name` chooses its random streams."""
    return VqganTrainer(plan, seed=derive_seed(plan.seed, "site", name))


def first_server(plan: Plan, scans: Mapping[str, ScanSource]) -> Server:
    """Initial weights and the codebook that the sites' centroids give."""
    model, n_codes = initial_model(plan), plan.model.n_codes
    centroids = [
        kmeans_stats(model, source, n_codes=n_codes, seed=derive_seed(plan.seed, "codes", name), min_vectors=1)
        for name, source in scans.items()
    ]
    codebook = initial_codebook(centroids, n_codes=n_codes, seed=plan.seed)
    return Server(initial_weights(plan), codebook, torch.zeros(n_codes, dtype=torch.int64))


def over_the_wire(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 tensors as they arrive after a way in bfloat16."""
    return split_for_wire(tensors, "bfloat16")[0]


def federate(
    plan: Plan,
    scans: Mapping[str, ScanSource],
    server: Server,
    shares: Mapping[str, float],
    *,
    averaged: bool = False,
) -> VQGAN3d:
    """The plan's rounds over the sites; `shares` are the sites' weights. The model as it goes down after the last one.

    `averaged`: every site moves its own codes and the mean of the codes is the next codebook, as if they were weights.
    """
    spec = plan.federation
    trainers = {name: trainer_of(plan, name) for name in scans}
    step = SERVER_OPTIMIZERS[spec.server_optimizer](lr=spec.server_lr)
    for number in range(1, spec.rounds + 1):
        sent = over_the_wire(server.weights)
        updates, stats = [], []
        for name, trainer in trainers.items():
            trainer.load_global(sent, server.codebook)
            done = trainer.train(
                scans[name],
                steps=spec.local_steps,
                global_step=(number - 1) * spec.local_steps,
                decay_per_round=spec.codebook_round_decay,
            )
            updates.append((shares[name], over_the_wire(done.delta)))
            stats.append(done.stats)
        server.weights, server.optimizer = step.apply(server.weights, weighted_mean(updates), server.optimizer)
        if averaged:
            _average(plan, server, stats)
        else:
            _merge(plan, number, server, stats)
    return _model(plan, over_the_wire(server.weights), server.codebook)


def train_alone(plan: Plan, trainer: VqganTrainer, scans: ScanSource, server: Server, *, copies: int = 1) -> VQGAN3d:
    """The plan's rounds with one trainer; `server` gives its start.

    `copies` puts its codebook sums, a mean over scans, on the scale of as many sites' sums.
    """
    spec = plan.federation
    trainer.load_global(server.weights, server.codebook)
    for number in range(1, spec.rounds + 1):
        done = trainer.train(
            scans,
            steps=spec.local_steps,
            global_step=(number - 1) * spec.local_steps,
            decay_per_round=spec.codebook_round_decay,
        )
        _merge(plan, number, server, [CodebookStats(done.stats.counts * copies, done.stats.sums * copies)])
        load_codebook(trainer.model, server.codebook)
    return trainer.model


def codes_used(model: VQGAN3d, scans: Sequence[Tensor]) -> int:
    """How many different codes x01 scans (1, D, H, W) need."""
    used: set[int] = set()
    with torch.no_grad():
        for x in scans:
            used.update(model.quantise(model.encode(x[None] - 0.5)).indices.flatten().tolist())
    return len(used)


def _merge(plan: Plan, number: int, server: Server, stats: Sequence[CodebookStats]) -> None:
    spec = plan.federation
    merged = next_codebook("ema", server.codebook, stats, decay=spec.codebook_round_decay)
    server.codebook, server.dead_for = revive_dead(
        merged, server.dead_for, share=spec.dead_code_share, rounds=spec.dead_code_rounds, seed=plan.seed + number
    )


def _average(plan: Plan, server: Server, stats: Sequence[CodebookStats]) -> None:
    decay = plan.federation.codebook_round_decay
    own = [next_codebook("ema", server.codebook, [one], decay=decay) for one in stats]
    codes = torch.stack([book.codes for book in own]).mean(dim=0)
    counts = torch.stack([book.counts for book in own]).mean(dim=0)
    server.codebook = CodebookState(codes, counts, codes.to(counts.dtype) * counts[:, None])


def _model(plan: Plan, weights: Mapping[str, Tensor], codebook: CodebookState) -> VQGAN3d:
    model = initial_model(plan)
    load_generator(model, dict(weights))
    load_codebook(model, codebook)
    return model.eval()
