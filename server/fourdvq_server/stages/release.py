"""Stage release: write the bundle, then send it to every site that is there. Others get it when they next connect."""

from __future__ import annotations

from typing import Any

from fourdvq import __version__
from fourdvq.config import canonical_json
from fourdvq.tensors import payload_sha256
from fourdvq.wire.messages import PROTOCOL, Receipt, ReleaseTask
from fourdvq_server.bundle import released_weights, write_bundle
from fourdvq_server.stages import freeze, validate
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.freeze import frozen_model
from fourdvq_server.stages.ode import trained_ode

NAME = "release"


def run(context: StageContext) -> dict[str, Any]:
    """Write releases/<run>/ and collect receipts. Raises ModelError E_RELEASE if the version names another model."""
    model, _ = frozen_model(context)
    codebook = {name: getattr(model.codebook, name) for name in ("codes", "counts", "sums")}
    weights = released_weights(model.generator, codebook, trained_ode(context))
    card = card_of(context, payload_sha256(weights))
    folder = context.releases / context.store.name
    write_bundle(folder, weights, card, context.plan.to_json(), context.store.profile)
    stage = context.store.stage(NAME)
    task = ReleaseTask(card_json=canonical_json(card), weights=weights)
    replies = context.ask(stage, NAME, task, sorted(context.sites), quorum=0)
    received = [s for s, b in replies.bodies().items() if isinstance(b, Receipt) and b.sha256 == card["weights_sha256"]]
    stage.forget_replies()
    return {
        "version": card["version"],
        "folder": str(folder),
        "weights_sha256": card["weights_sha256"],
        "received_by": received,
        "failed": replies.failed,
    }


def card_of(context: StageContext, weights_sha256: str) -> dict[str, Any]:
    """The facts of the model card. No date: equal runs give equal cards."""
    frozen = context.store.stage(freeze.NAME).read_round(1).facts
    scores = context.store.stage(validate.NAME).result or {}
    return {
        "version": context.store.name,
        "run": context.store.name,
        "plan_name": context.plan.name,
        "plan_sha256": context.plan.hash,
        "profile_sha256": context.plan.profile_sha256,
        "tokenizer_sha256": frozen["tokenizer_sha256"],
        "weights_sha256": weights_sha256,
        "round": frozen["round"],
        "chosen_by": frozen["chosen_by"],
        "package": __version__,
        "protocol": PROTOCOL,
        "model": {"size": list(context.plan.model.size), "n_codes": context.plan.model.n_codes},
        "sites": {
            name: {"role": info.role, "patients": info.patients, "scans": info.scans}
            for name, info in sorted(context.sites.items())
        },
        "tables": scores.get("tables", {}),
    }
