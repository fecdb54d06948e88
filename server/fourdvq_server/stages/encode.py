"""Stage encode: every site turns its approved scans into codes with the frozen tokenizer and keeps them."""

from __future__ import annotations

from typing import Any

from fourdvq.wire.messages import EncodeTask, Receipt
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.freeze import frozen_model

NAME = "encode"


def run(context: StageContext) -> dict[str, Any]:
    """Receipts of the sites; those that could not encode take no part in what follows. TemporaryStop E_QUORUM."""
    stage = context.store.stage(NAME)
    model, tokenizer = frozen_model(context)
    task = EncodeTask(tokenizer_sha256=tokenizer, weights=model.generator, **model.codebook_fields())
    replies = context.ask(stage, "encode", task, context.members, quorum=1)
    receipts = {site: body for site, body in replies.bodies().items() if isinstance(body, Receipt)}
    facts = {
        "tokenizer_sha256": tokenizer,
        "sites": {site: {"scans": r.scans, "code_usage": r.code_usage} for site, r in receipts.items()},
        "failed": replies.failed,
    }
    context.record(
        NAME, 1, {site: {"scans": float(r.scans), "code_usage": float(r.code_usage)} for site, r in receipts.items()}
    )
    stage.forget_replies()
    return facts


def ode_trainers(context: StageContext) -> list[str]:
    """Training sites with longitudinal data."""
    return [site for site in context.trainers if context.sites[site].ode]
