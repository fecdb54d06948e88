"""A release made from the run folder alone, without asking any site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourdvq.errors import ConfigError
from fourdvq.tensors import payload_sha256
from fourdvq_server.bundle import read_bundle, released_weights, write_bundle
from fourdvq_server.stages import freeze, ode
from fourdvq_server.stages.model_state import from_round
from fourdvq_server.stages.release import make_card
from fourdvq_server.store import RunStore


def write_stored(store: RunStore, releases: Path, number: str = "best") -> tuple[Path, dict[str, Any]]:
    """Write and read back releases/<run>/; returns the folder and its card.

    Raises ConfigError E_RUN for a run that is not trained, E_UNSUPPORTED for another round than the frozen one: the
    ODE and every code refer to that round's tokenizer. ModelError E_RELEASE as `write_bundle`.
    """
    if not store.stage(ode.NAME).is_done or not store.stage(freeze.NAME).is_done:
        raise ConfigError("E_RUN", where=store.name, found="training is not finished", wanted="stage ode done")
    record = store.stage(freeze.NAME).read_round(1)
    if number not in ("best", str(record.facts["round"])):
        raise ConfigError(
            "E_UNSUPPORTED",
            where="--round",
            found=number,
            wanted=f"best, or {record.facts['round']}: the ODE was trained on that round's codes",
            fix="to release another round, run again with federation.rounds set to it",
        )
    model = from_round(record)
    codebook = {name: getattr(model.codebook, name) for name in ("codes", "counts", "sums")}
    weights = released_weights(
        model.generator, codebook, dict(store.stage(ode.NAME).need_last_round().tensors["weights"])
    )
    sites = (store.stage("hello").result or {}).get("sites", {})
    card = make_card(store, sites, payload_sha256(weights))
    folder = write_bundle(releases / store.name, weights, card, store.plan.to_json(), store.profile)
    read_bundle(folder)
    return folder, card
