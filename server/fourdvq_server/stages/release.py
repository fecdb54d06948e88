"""Stage release: write the bundle, then send it to every site that is there. Others get it when they next connect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fourdvq import __version__
from fourdvq.config import canonical_json
from fourdvq.tensors import payload_sha256
from fourdvq.wire.messages import PROTOCOL, Receipt, ReleaseTask
from fourdvq_server.bundle import released_weights, write_bundle
from fourdvq_server.stages import freeze, survival, validate
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.freeze import frozen_model
from fourdvq_server.stages.ode import trained_ode
from fourdvq_server.store import RunStore

NAME = "release"


def run(context: StageContext) -> dict[str, Any]:
    """Write releases/<run>/ and collect receipts. Raises ModelError E_RELEASE if the version names another model."""
    model, _ = frozen_model(context)
    codebook = {name: getattr(model.codebook, name) for name in ("codes", "counts", "sums")}
    weights = released_weights(model.generator, codebook, trained_ode(context))
    sites = {name: vars(info) for name, info in context.sites.items()}
    card = make_card(context.store, sites, payload_sha256(weights))
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


def make_card(store: RunStore, sites: Mapping[str, Mapping[str, Any]], weights_sha256: str) -> dict[str, Any]:
    """The facts of the model card. No date: equal runs give equal cards."""
    frozen = store.stage(freeze.NAME).read_round(1).facts
    scores = store.stage(validate.NAME).result or {}
    biomarkers = store.stage(survival.NAME).result or {}
    return {
        "version": store.name,
        "run": store.name,
        "plan_name": store.plan.name,
        "plan_sha256": store.plan.hash,
        "profile_sha256": store.plan.profile_sha256,
        "tokenizer_sha256": frozen["tokenizer_sha256"],
        "weights_sha256": weights_sha256,
        "round": frozen["round"],
        "chosen_by": frozen["chosen_by"],
        "package": __version__,
        "protocol": PROTOCOL,
        "model": {"size": list(store.plan.model.size), "n_codes": store.plan.model.n_codes},
        "sites": {
            name: {key: info[key] for key in ("role", "patients", "scans")} for name, info in sorted(sites.items())
        },
        "tables": scores.get("tables", {}),
        "biomarkers": {
            **{key: biomarkers.get(key) for key in ("selected", "why", "withheld")},
            # A code without a comparable pair in any fold has no concordance to show.
            "codes": [row for row in biomarkers.get("codes", ()) if row["concordance"] is not None],
        },
    }
