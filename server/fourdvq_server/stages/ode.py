"""Stage ode: rounds of local training of the latent disease ODE on cached codes, averaged by patients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fourdvq.errors import TemporaryStop
from fourdvq.training.latent_ode import initial_ode
from fourdvq.training.update import relative_norm
from fourdvq.wire.messages import OdeTask, OdeUpdate
from fourdvq_server.admission import late_joiners
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.encode import ode_trainers
from fourdvq_server.stages.freeze import frozen_model
from fourdvq_server.stages.vqgan import record_rounds, shared_update, shares_of, traffic

NAME = "ode"


def run(context: StageContext) -> dict[str, Any]:
    """Go on after the last sound round. TemporaryStop E_QUORUM, also where no site has longitudinal data."""
    stage, rounds = context.store.stage(NAME), context.plan.federation.ode_rounds
    last, damaged = stage.last_round()
    for text in damaged:
        context.notify(f"a round cannot be read and is repeated: {text}")
    if last is None:
        weights = {name: tensor.detach().clone() for name, tensor in initial_ode(context.plan).state_dict().items()}
        optimizer, done = {}, 0
        stage.write_round(0, {"weights": weights, "server_state": {}}, {})
    else:
        weights, optimizer, done = dict(last.tensors["weights"]), dict(last.tensors["server_state"]), last.number
    record_rounds(context, NAME)
    _, tokenizer = frozen_model(context)
    for number in range(done + 1, rounds + 1):
        late_joiners(context)
        weights, optimizer = _round(context, number, tokenizer, weights, optimizer)
        context.progress(NAME, number, rounds, "")
    return {"rounds": rounds}


def trained_ode(context: StageContext) -> dict[str, Tensor]:
    """Weights after the last round."""
    return dict(context.store.stage(NAME).need_last_round().tensors["weights"])


def _round(
    context: StageContext, number: int, tokenizer: str, weights: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    plan, stage = context.plan, context.store.stage(NAME)
    sites = ode_trainers(context)
    if not sites:
        raise TemporaryStop("E_QUORUM", where="stage ode", found="no training site has patients with two scans")
    # Longitudinal data may be at fewer sites than stage 1 needs.
    quorum = min(plan.federation.quorum, len(sites))
    task = OdeTask(steps=plan.federation.ode_local_steps, tokenizer_sha256=tokenizer, weights=weights)
    replies = context.ask(stage, f"round-{number:04d}", task, sites, quorum=quorum, total=plan.federation.ode_rounds)
    updates = {site: body for site, body in replies.bodies().items() if isinstance(body, OdeUpdate)}
    shares = shares_of(
        context, {s: u.patients for s, u in updates.items()}, {s: context.sites[s].patients for s in updates}
    )
    parts = {site: (shares[site], update.delta) for site, update in updates.items()}
    following, state, mean = shared_update(plan, weights, optimizer, parts)
    metrics: dict[str, dict[str, float]] = traffic(replies)
    for site, update in updates.items():
        metrics[site] |= {"share": shares[site], "patients": float(update.patients), **update.losses}
    common = set.intersection(*(set(u.losses) for u in updates.values()))
    losses = {name: sum(shares[s] * updates[s].losses[name] for s in sorted(updates)) for name in sorted(common)}
    metrics[""] = {"sites": float(len(updates)), "update_norm": relative_norm(mean, weights), **losses}
    facts = {"shares": shares, "failed": replies.failed, "reused": list(replies.reused), "metrics": metrics}
    stage.write_round(number, {"weights": following, "server_state": state}, facts)
    stage.forget_replies()
    context.record(NAME, number, metrics)
    return following, state
