"""Stage longitudinal: does a generated scan tell as much about survival as the real one, or only what the last told?

The model of the selected codes and the covariates was fitted on training patients in stage survival and is frozen. Test
patients with three scans get three risk scores from it: from their real third scan, from the one generated from the
first two, and from the second one carried forward, as a person without a model would. Those with a scan about a year
after the second get two scores from the change of the codes over that year, real and generated. C counts pairs within
sites and comes with an interval, and so does the difference from the real scans; time counts from the scan that the
score needs. Source: paper section 3; the frozen model is ours (docs/reference/survival.md).

Test sets are small, and the sites' rules refuse small sets by design: the stage then says so and the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fourdvq.survival.curves import FrozenScore, PairedRun
from fourdvq.survival.longitudinal import Interval, PairedConcordance
from fourdvq.wire.messages import CoxFutureTask
from fourdvq_server.prognosis_facts import known, score_of
from fourdvq_server.stages import survival
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.cox_exchange import Desk, Exchange
from fourdvq_server.stages.freeze import frozen_model
from fourdvq_server.stages.ode import trained_ode
from fourdvq_server.store import write_json

NAME = "longitudinal"
RECORD = "longitudinal.json"
# What the scores are made from, and whose codes: the first is what the others are compared with.
SOURCES: Mapping[str, tuple[str, ...]] = {"level": ("real", "generated", "carried"), "change": ("real", "generated")}
_FIRST_NUMBER = 101  # analyses of this stage are counted apart from those of stage survival
NOTE = (
    "frozen model, held-out patients, pairs within sites; intervals by the infinitesimal jackknife from sums, 95 %; "
    "change: the model of the levels applied to follow-up minus second scan, per training SD of the levels"
)


def run(context: StageContext) -> dict[str, Any]:
    """C of every source, or why there is none. Never fails a run."""
    stage = context.store.stage(NAME)
    selection = context.store.stage(survival.NAME).result or {}
    codes, model = tuple(selection.get("selected", ())), selection.get("model") or {}
    if not codes:
        return _nothing(codes, "no code was selected, so there is no model to freeze")
    if not model:
        return _nothing(codes, "the model of the selected codes could not be fitted")
    _, tokenizer = frozen_model(context)
    facts = compare(context, Exchange(context, stage, tokenizer), codes, model)
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_json(stage.folder / RECORD, facts)
    context.metrics.artifact(stage.folder / RECORD, NAME)
    context.record(NAME, 1, {"": _figures(facts)})
    stage.forget_replies()
    return facts


def compare(
    context: StageContext, exchange: Exchange, codes: tuple[int, ...], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Score the test patients of every site under the frozen model (`prognosis_facts.model_facts`)."""
    desk = Desk(exchange, _FIRST_NUMBER)
    sites = _with_future(desk, list(context.members))
    score = score_of(model)
    parts = {feature: _part(desk, codes, score, sites, feature) for feature in SOURCES}
    level = parts["level"]
    return {
        "codes": list(codes),
        "why": level["why"],
        "concordance": {source: row["c"] for source, row in level["sources"].items()},
        "sites": level["sites"],
        "origin": context.plan.survival.test_origin,
        "banner": model["banner"],
        "ended": desk.ended,
        "note": NOTE,
        **parts,
    }


def _part(desk: Desk, codes: tuple[int, ...], score: FrozenScore, sites: list[str], feature: str) -> dict[str, Any]:
    """One feature over ever fewer sites until an analysis came to its end."""
    k = len(codes)
    if feature == "change":  # no change is the middle of its scale; covariates keep theirs
        score = replace(score, mean=np.concatenate([np.zeros(k), score.mean[k:]]))
    while sites:
        run = PairedRun(_hello(desk, codes, len(sites), feature), score)
        if desk.over(sites, f"{NAME} {feature}", run) is not None:
            return _found(run.result(), sites, SOURCES[feature])
        sites = [site for site in sites if site not in desk.attempts[-1].failed]
    why = "the test patients' sites did not answer: small sets are refused by design"
    return {"why": why, "sites": [], "sources": {}, "differences": {}}


def _found(found: PairedConcordance, sites: list[str], sources: tuple[str, ...]) -> dict[str, Any]:
    return {
        "why": "" if found.pairs else "no comparable pair, so there is no C",
        "sites": sites,
        "patients": found.patients,
        "deaths": found.deaths,
        "pairs": found.pairs,
        "sources": {name: _row(c) for name, c in zip(sources, found.concordance, strict=True)},
        "differences": {f"real - {n}": _row(d) for n, d in zip(sources[1:], found.differences, strict=True)},
    }


def _row(found: Interval) -> dict[str, float | None]:
    return {"c": known(found.value), "low": known(found.low), "high": known(found.high)}


def _with_future(desk: Desk, sites: list[str]) -> list[str]:
    """The sites that generated the later scans of their test patients."""
    context = desk.exchange.context
    task = CoxFutureTask(tokenizer_sha256=desk.exchange.tokenizer, weights=trained_ode(context))
    replies = context.ask(desk.exchange.stage, "future", task, sites, quorum=0)
    if replies.failed:
        desk.ended.append({"purpose": "generate", "sites": sites, "ended_by": dict(replies.failed)})
    return [site for site in sites if site in replies.good]


def _hello(desk: Desk, codes: tuple[int, ...], sites: int, feature: str) -> Any:
    """All test patients in one fold, with all sources of their codes side by side."""
    hello = survival.hello_of(desk.exchange.context, desk.exchange.tokenizer, sites)
    return replace(
        hello,
        folds=0,
        codes=codes,
        purpose=NAME,
        baseline="site",
        cohort="test",
        source="paired",
        feature=feature,  # type: ignore[arg-type]
        versions=len(SOURCES[feature]),
    )


def _nothing(codes: tuple[int, ...], why: str) -> dict[str, Any]:
    return {"codes": list(codes), "why": why, "concordance": {}}


def _figures(facts: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow shows."""
    figures = {}
    for feature in SOURCES:
        for source, row in facts[feature]["sources"].items():
            if row["c"] is not None:
                figures["_".join(("c", source, *(("change",) if feature == "change" else ())))] = row["c"]
    return figures
