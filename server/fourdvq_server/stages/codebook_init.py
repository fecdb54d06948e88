"""Stage codebook_init: one codebook from the sites' k-means centroids, all seen through the same untrained encoder.

Sites send counts and vector sums of heavy centroids; raw encoder vectors, from which a scan could be redrawn, stay.
"""

from __future__ import annotations

from typing import Any

import torch

from fourdvq.federation.codebook import CodebookStats, initial_codebook
from fourdvq.models.vqgan import codebook_state
from fourdvq.training.update import split_for_wire
from fourdvq.training.vqgan import initial_model, initial_weights
from fourdvq.wire.messages import CodebookInitTask, CodebookSums
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.model_state import with_codebook

NAME = "codebook_init"


def run(context: StageContext) -> dict[str, Any]:
    """Write round 1: the untrained weights with the first codebook. Raises TemporaryStop E_QUORUM."""
    plan, stage = context.plan, context.store.stage(NAME)
    weights, carry = split_for_wire(initial_weights(plan), plan.federation.wire_dtype)
    facts: dict[str, Any] = {"centroids": {}, "failed": {}}
    if plan.model.quantiser == "fsq":
        codebook = codebook_state(initial_model(plan))  # a fixed grid: there is nothing to ask
    else:
        task = CodebookInitTask(
            seed=plan.seed, n_codes=plan.model.n_codes, code_dim=plan.model.code_dim, weights=weights
        )
        replies = context.ask(stage, "init", task, context.trainers, quorum=plan.federation.quorum)
        sums = {site: body for site, body in replies.bodies().items() if isinstance(body, CodebookSums)}
        stats = [CodebookStats(torch.from_numpy(b.counts), torch.from_numpy(b.sums)) for b in sums.values()]
        codebook = initial_codebook(stats, n_codes=plan.model.n_codes, seed=plan.seed)
        facts["centroids"] = {site: int((body.counts > 0).sum()) for site, body in sums.items()}
        facts["failed"] = replies.failed
    model = with_codebook(weights, carry, codebook)
    facts["model_sha256"] = model.sha256
    stage.write_round(1, model.tensors(), facts)
    stage.forget_replies()
    return facts
