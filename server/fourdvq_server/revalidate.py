"""Score a run's model again, any round of stage 1, any sites, at any time; the run itself is not changed.

runs/<run>/validations/<n>.json     what was asked and what came back
runs/<run>/validate-request.json    a question waiting for the ServerApp that is started to ask it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourdvq.errors import ConfigError
from fourdvq.evaluation.summary import combine
from fourdvq.wire.messages import ReconstructionTask
from fourdvq_server.stages import approval, hello, validate, vqgan
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.model_state import from_round
from fourdvq_server.store import RunStore, read_json, write_json
from fourdvq_server.summaries import interval_rows, plain_sums, row_sums

_REQUEST = "validate-request.json"


@dataclass(frozen=True)
class Question:
    """`round` 0 is the frozen model with its ODE; another number is that round of stage 1, reconstruction alone.

    No `sites` means all that are there.
    """

    round: int = 0
    sites: tuple[str, ...] = ()


def put_question(store: RunStore, question: Question) -> None:
    """Leave a question for the ServerApp. Raises ConfigError E_RUN for a round that the run does not have."""
    if question.round and question.round not in store.stage(vqgan.NAME).round_numbers():
        raise ConfigError("E_RUN", where=store.name, found=f"round {question.round}", wanted="a finished round")
    if not question.round and not store.stage("ode").is_done:
        raise ConfigError("E_RUN", where=store.name, found="no finished stage ode", wanted="a trained model")
    write_json(store.folder / _REQUEST, asdict(question))


def take_question(store: RunStore) -> Question | None:
    """The waiting question, once."""
    path = store.folder / _REQUEST
    data = read_json(path, None)
    path.unlink(missing_ok=True)
    return Question(round=int(data["round"]), sites=tuple(data["sites"])) if data else None


def answer(context: StageContext, question: Question) -> dict[str, Any]:
    """Ask the sites and write validations/<n>.json. TemporaryStop E_QUORUM as for a run."""
    hello.run(context)
    approval.run(context)
    sites = [site for site in context.members if not question.sites or site in question.sites]
    folder = context.store.folder / "validations"
    number = len(list(folder.glob("*.json"))) + 1
    exchange = f"again-{number:04d}"
    if question.round:
        scored = _one_round(context, question.round, sites, exchange)
    else:
        scored = _whole(context, sites, exchange)
    result = {"question": asdict(question), "number": number, **scored}
    write_json(folder / f"{number:04d}.json", result)
    context.store.stage(validate.NAME).forget_replies()
    return result


def validations(store: RunStore) -> list[Path]:
    """What was asked again so far, oldest first."""
    return sorted((store.folder / "validations").glob("*.json"))


def _whole(context: StageContext, sites: Sequence[str], exchange: str) -> dict[str, Any]:
    scored = validate.score(context, sites, exchange=exchange)
    del scored["metrics"]
    return scored


def _one_round(context: StageContext, number: int, sites: Sequence[str], exchange: str) -> dict[str, Any]:
    model = from_round(context.store.stage(vqgan.NAME).read_round(number))
    task = ReconstructionTask(
        split="test", model_sha256=model.sha256, weights=model.generator, **model.codebook_fields()
    )
    replies = context.ask(context.store.stage(validate.NAME), exchange, task, sites, quorum=0)
    by_site = {site: row_sums(body) for site, body in replies.bodies().items()}
    return {
        "sites": {s: {"role": context.sites[s].role, "sums": plain_sums(sums)} for s, sums in by_site.items()},
        "groups": {"all": interval_rows(combine(s for sums in by_site.values() for s in sums))},
        "tables": {},
        "failed": {site: {"reconstruction": code} for site, code in replies.failed.items()},
    }
