"""Stage freeze: choose the round, fix encoder and codebook, and give them their name, the tokenizer_sha256.

From here on code k is code k at every site. The choice uses validation scans, which no reported figure is made from.
"""

from __future__ import annotations

import math
from typing import Any

from fourdvq.models.vqgan import tokenizer_sha256
from fourdvq.plan import Plan
from fourdvq_server.stages import vqgan
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.model_state import GlobalModel, from_round
from fourdvq_server.store import StageStore

NAME = "freeze"
SCORE = "validation/reconstruction/mse/whole"


def run(context: StageContext) -> dict[str, Any]:
    """Write round 1: the frozen model. Raises ModelError E_CHECKPOINT if no round of stage vqgan is sound."""
    rounds = context.store.stage(vqgan.NAME)
    number, reason = choose_round(context.plan, rounds)
    model = from_round(rounds.read_round(number))
    frozen = GlobalModel(model.generator, model.codebook, model.dead_for, {})
    facts: dict[str, Any] = {
        "round": number,
        "chosen_by": reason,
        "model_sha256": frozen.sha256,
        "tokenizer_sha256": tokenizer_sha256(frozen.build(context.plan)),
    }
    context.store.stage(NAME).write_round(1, frozen.tensors(), facts)
    context.notify(f"frozen: round {number} ({reason}), tokenizer {facts['tokenizer_sha256'][:12]}")
    return facts


def frozen_model(context: StageContext) -> tuple[GlobalModel, str]:
    """The frozen model and its tokenizer_sha256."""
    record = context.store.stage(NAME).read_round(1)
    return from_round(record), record.facts["tokenizer_sha256"]


def choose_round(plan: Plan, rounds: StageStore) -> tuple[int, str]:
    """The round with the smallest validation error after the discriminators started; the last where none is known.

    Raises ModelError E_CHECKPOINT if no round is sound.
    """
    scores = {}
    for number in rounds.round_numbers():
        facts = rounds.round_facts(number)
        score = facts.get("metrics", {}).get("", {}).get(SCORE, math.nan)
        started = plan.gan.loss == "none" or facts.get("global_step", 0) >= plan.gan.start_step
        if started and math.isfinite(score):
            scores[number] = score
    if scores:
        return min(scores, key=lambda number: (scores[number], -number)), "smallest validation error"
    return rounds.need_last_round().number, "last round"
