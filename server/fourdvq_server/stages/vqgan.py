"""Stage vqgan: rounds of local training, the weighted mean of what changed, and one codebook from all sites' sums.

A round is complete on disk before the next begins. Validation scans are scored with the candidate model inside the
round, so that its figures are part of the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fourdvq.evaluation.summary import combine
from fourdvq.federation.aggregate import AGGREGATORS, SERVER_OPTIMIZERS, site_shares
from fourdvq.federation.codebook import CodebookStats, next_codebook, revive_dead
from fourdvq.plan import Plan
from fourdvq.tensors import Weights
from fourdvq.training.update import join_from_wire, relative_norm, split_for_wire
from fourdvq.wire.messages import ReconstructionTask, VqganTask, VqganUpdate
from fourdvq_server.admission import late_joiners
from fourdvq_server.rounds import Replies
from fourdvq_server.stages import codebook_init
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.model_state import GlobalModel, from_round
from fourdvq_server.summaries import means, row_sums

NAME = "vqgan"


def run(context: StageContext) -> dict[str, Any]:
    """Go on after the last sound round. Raises TemporaryStop E_QUORUM or CANCELLED; a resumed run repeats the round."""
    stage, spec = context.store.stage(NAME), context.plan.federation
    last, damaged = stage.last_round()
    for text in damaged:
        context.notify(f"a round cannot be read and is repeated: {text}")
    start = last or context.store.stage(codebook_init.NAME).read_round(1)
    done, model = (last.number if last else 0), from_round(start)
    record_rounds(context, NAME)
    for number in range(done + 1, spec.rounds + 1):
        late_joiners(context)
        model = _round(context, number, model)
        context.progress(NAME, number, spec.rounds, "")
    return {"rounds": spec.rounds, "model_sha256": model.sha256}


def record_rounds(context: StageContext, name: str) -> None:
    """Tell metrics.jsonl and MLflow about finished rounds that a killed run may not have told them."""
    stage = context.store.stage(name)
    for number in stage.round_numbers():
        context.record(name, number, stage.round_facts(number).get("metrics", {}))


def shared_update(
    plan: Plan, weights: Weights, optimizer: dict[str, torch.Tensor], parts: Mapping[str, tuple[float, Weights]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Weights]:
    """Aggregate the sites' (share, delta) and take the server's step: next weights, optimiser state, mean delta."""
    spec = plan.federation
    # Sites may send different precisions, each as its policy allows: the mean is taken of float32.
    updates = [(share, {n: t.float() for n, t in delta.items()}) for _, (share, delta) in sorted(parts.items())]
    mean = AGGREGATORS[spec.aggregator](updates)
    following, state = SERVER_OPTIMIZERS[spec.server_optimizer](lr=spec.server_lr).apply(weights, mean, optimizer)
    return following, state, mean


def shares_of(context: StageContext, used: Mapping[str, int], registered: Mapping[str, int]) -> dict[str, float]:
    """Each site's share of the mean, capped as the plan says."""
    spec = context.plan.federation
    # A site's card rounds its counts up to the policy's cell, so what was used in a round is never above them.
    known = {site: max(1, registered[site]) for site in used}
    return site_shares(used, known, cap_two=spec.weight_cap_two, cap_many=spec.weight_cap_many, capped=spec.weight_cap)


def traffic(replies: Replies) -> dict[str, dict[str, float]]:
    """Bytes and seconds per site, as metrics."""
    return {
        site: {
            "bytes_down": float(replies.bytes_down.get(site, 0)),
            "bytes_up": float(received.bytes_up),
            "seconds": received.seconds,
        }
        for site, received in replies.good.items()
    }


def _round(context: StageContext, number: int, model: GlobalModel) -> GlobalModel:
    plan, stage = context.plan, context.store.stage(NAME)
    steps = plan.federation.local_steps
    global_step = (number - 1) * steps
    task = VqganTask(
        steps=steps,
        global_step=global_step,
        discriminator=discriminator_in(plan, global_step),
        weights=model.weights,
        **model.codebook_fields(),
    )
    exchange = f"round-{number:04d}"
    replies = context.ask(
        stage, exchange, task, context.trainers, quorum=plan.federation.quorum, total=plan.federation.rounds
    )
    updates = {site: body for site, body in replies.bodies().items() if isinstance(body, VqganUpdate)}
    shares = shares_of(
        context, {s: u.scans for s, u in updates.items()}, {s: context.sites[s].train_scans for s in updates}
    )
    candidate, mean = _aggregate(plan, number, model, updates, shares)
    metrics: dict[str, dict[str, float]] = traffic(replies)
    for site, update in updates.items():
        metrics[site] |= {"share": shares[site], "scans": float(update.scans), **update.losses}
        metrics[site]["relative_norm"] = relative_norm(update.delta, model.weights)
    metrics[""] = {
        "sites": float(len(updates)),
        "global_step": float(global_step + steps),
        "codes_alive": float((candidate.dead_for == 0).sum()),
        "update_norm": relative_norm(mean, model.weights),
        **_mean_losses(updates, shares),
        **_score_validation(context, number, candidate),
    }
    facts = {
        "global_step": global_step + steps,
        "shares": shares,
        "failed": replies.failed,
        "reused": list(replies.reused),
        "metrics": metrics,
        "model_sha256": candidate.sha256,
    }
    stage.write_round(number, candidate.tensors(), facts)
    stage.forget_replies()
    context.record(NAME, number, metrics)
    return candidate


def discriminator_in(plan: Plan, global_step: int) -> bool:
    """Whether the discriminators are on at some step of the round that starts at `global_step`."""
    return plan.gan.loss != "none" and global_step + plan.federation.local_steps > plan.gan.start_step


def _aggregate(
    plan: Plan, number: int, model: GlobalModel, updates: Mapping[str, VqganUpdate], shares: Mapping[str, float]
) -> tuple[GlobalModel, Weights]:
    parts = {site: (shares[site], update.delta) for site, update in updates.items()}
    before = join_from_wire(model.weights, model.carry)
    following, optimizer, mean = shared_update(plan, before, model.optimizer, parts)
    weights, carry = split_for_wire(following, plan.federation.wire_dtype)
    stats = [
        CodebookStats(torch.from_numpy(updates[s].code_counts), torch.from_numpy(updates[s].code_sums))
        for s in sorted(updates)
    ]
    spec = plan.federation
    codebook = next_codebook(
        plan.model.quantiser,
        model.codebook,
        stats,
        decay=spec.codebook_round_decay,
        learnt_codes=weights.get("codebook.codes"),
    )
    dead_for = model.dead_for
    if plan.model.quantiser == "ema":
        codebook, dead_for = revive_dead(
            codebook, dead_for, share=spec.dead_code_share, rounds=spec.dead_code_rounds, seed=plan.seed + number
        )
    return GlobalModel(weights, codebook, dead_for, optimizer, carry), mean


def _mean_losses(updates: Mapping[str, VqganUpdate], shares: Mapping[str, float]) -> dict[str, float]:
    """Losses that every site let out, weighted like the update."""
    common = set.intersection(*(set(update.losses) for update in updates.values()))
    return {name: sum(shares[s] * updates[s].losses[name] for s in sorted(updates)) for name in sorted(common)}


def _score_validation(context: StageContext, number: int, candidate: GlobalModel) -> dict[str, float]:
    """Mean reconstruction figures over the sites' validation scans; none where no site has any."""
    every = context.plan.evaluation.every_rounds
    if every <= 0 or (number % every and number != context.plan.federation.rounds):
        return {}
    task = ReconstructionTask(
        split="validation",
        model_sha256=candidate.sha256,
        weights=candidate.generator,
        **candidate.codebook_fields(),
    )
    stage = context.store.stage(NAME)
    # Nobody is needed here: a site may have too few validation patients for its policy.
    replies = context.ask(
        stage,
        f"round-{number:04d}-validation",
        task,
        context.trainers,
        quorum=0,
        total=context.plan.federation.rounds,
    )
    sums = combine(row for body in replies.bodies().values() for row in row_sums(body))
    return {f"validation/{name}": value for name, value in means(sums).items()}
