"""Stage survival: select prognostic codes over all training sites as if their patients stood in one table.

The mathematics is `fourdvq.survival.SelectionRun`; `cox_exchange` carries its requests. A site that is lost or refuses
ends the analysis, a new one starts without it under fresh masks, and both stand in the record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourdvq.data.files import write_atomic
from fourdvq.plan import Plan, SurvivalSpec
from fourdvq.survival.disclosure import Policy
from fourdvq.survival.messages import HelloRequest
from fourdvq.survival.pictures import pictures_of
from fourdvq.survival.run import Settings
from fourdvq.survival.selection import Selection, SelectionRun
from fourdvq_server.biomarker_files import PICTURES, RECORD, write_biomarkers
from fourdvq_server.prognosis_facts import known
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.cox_exchange import Analysis, Exchange
from fourdvq_server.stages.freeze import frozen_model
from fourdvq_server.stages.prognosis import prognosis
from fourdvq_server.store import StageStore, write_json

NAME = "survival"
TABLE = "selection.csv"
SHARED = (
    "one baseline hazard for all sites: sums over risk sets left the sites, times were rounded to a coarse public "
    "grid, and estimates differ from those with one baseline per site"
)


@dataclass
class Attempt(Analysis):
    """An analysis and what came of it."""

    selection: Selection | None = None


def run(context: StageContext) -> dict[str, Any]:
    """The selection, or why there is none. Never fails a run: survival needs more patients than training does."""
    model, tokenizer = frozen_model(context)
    exchange = Exchange(context, context.store.stage(NAME), tokenizer)
    attempts = select(context, exchange)
    done = attempts[-1].selection if attempts else None
    codes = done.selected if done is not None else ()
    sites = attempts[-1].sites if attempts else []
    further = prognosis(exchange, hello_of(context, tokenizer, len(sites)), codes, sites)
    pictures = pictures_of(model.build(context.plan), codes, context.plan.window_hu) if codes else b""
    return report(context, attempts, further, pictures)


def select(context: StageContext, exchange: Exchange) -> list[Attempt]:
    """Analyses of ever fewer sites until one came to its end."""
    spec = context.plan.survival
    if spec.baseline == "shared":
        context.notify(f"survival.baseline=shared: {SHARED}")
    attempts: list[Attempt] = []
    sites = list(context.trainers)
    while sites:
        attempt = Attempt(len(attempts) + 1, sites)
        attempts.append(attempt)
        analysis = SelectionRun(
            hello_of(context, exchange.tokenizer, len(sites)),
            Settings.under(Policy()),
            rule=spec.rule,
            permutations=spec.permutations,
        )
        if exchange.converse(attempt, analysis):
            attempt.selection = analysis.finished([])
            break
        sites = [site for site in sites if site not in attempt.failed]
    return attempts


def report(
    context: StageContext, attempts: list[Attempt], further: dict[str, Any] | None = None, pictures: bytes = b""
) -> dict[str, Any]:
    """The stage's facts, with its files written and MLflow told. `further`: of `prognosis`; `pictures`: a PNG."""
    stage = context.store.stage(NAME)
    facts = {**_facts(context.plan, attempts), **(further or {})}
    for path in _write(stage, attempts, facts, pictures):
        context.metrics.artifact(path, NAME)
    if facts["codes"]:
        context.record(NAME, 1, {"": _figures(facts)})
    stage.forget_replies()
    return facts


def _figures(facts: dict[str, Any]) -> dict[str, float]:
    """What MLflow shows."""
    figures = {"selected": float(len(facts["selected"])), "withheld": float(facts["withheld"])}
    groups, model = facts.get("risk_groups") or {}, facts.get("model") or {}
    if groups.get("logrank_p") is not None:
        figures["logrank_p"] = groups["logrank_p"]
    tests = [row["ph_p"] for row in model.get("coefficients", ()) if row["ph_p"] is not None]
    return figures | ({"smallest_ph_p": min(tests)} if tests else {})


def hello_of(context: StageContext, tokenizer: str, sites: int) -> HelloRequest:
    """What the sites are told the analysis is."""
    spec: SurvivalSpec = context.plan.survival
    return HelloRequest(
        folds=spec.folds,
        fold_mode=spec.fold_mode,
        baseline=spec.baseline,
        ties=spec.ties,
        covariates=spec.covariates,
        run=context.store.name,
        sites=sites,
        codebook_sha256=tokenizer,
    )


def _facts(plan: Plan, attempts: list[Attempt]) -> dict[str, Any]:
    done = attempts[-1].selection if attempts else None
    rows = biomarker_rows(done) if done is not None else []
    selected = list(done.selected) if done is not None else []
    return {
        "selected": selected,
        "why": _why(plan, attempts, rows),
        "codes": rows,
        "withheld": len(done.withheld) if done is not None else 0,
        "rounds": done.rounds if done is not None else 0,
        "messages": sum(a.messages for a in attempts),
        "analyses": [{"sites": a.sites, "masked": a.masked, "ended_by": a.failed} for a in attempts],
        "baseline": plan.survival.baseline,
        "warnings": [*([SHARED] if plan.survival.baseline == "shared" else []), *(done.warnings if done else ())],
    }


def biomarker_rows(selection: Selection) -> list[dict[str, Any]]:
    """One object per code that was fitted in every fold, selected ones first, then by mean concordance; per SD.

    The hazard ratio and its interval are geometric means over the folds, p is the largest of them.
    """
    rows = []
    for code in sorted(set(selection.table["code"].tolist())):
        part = selection.table[selection.table["code"] == code]
        if not (part["status"] == "ok").all():
            continue
        rows.append(
            {
                "code": code,
                "hazard_ratio": _geometric(part["hr"]),
                "low": _geometric(part["hr_low"]),
                "high": _geometric(part["hr_high"]),
                "worst_p": float(part["p"].max()),
                "concordance": known(part["c"].mean()),
                "worst_concordance": known(part["c"].min()),
                "selected": code in selection.selected,
            }
        )
    return sorted(rows, key=lambda row: (not row["selected"], -(row["concordance"] or -1.0)))


def _geometric(values: Any) -> float:
    return float(math.exp(sum(math.log(v) for v in values) / len(values)))


def _why(plan: Plan, attempts: list[Attempt], rows: list[dict[str, Any]]) -> str:
    """Why fewer codes than asked for were selected; empty if all were found."""
    rule = plan.survival.rule
    done = attempts[-1].selection if attempts else None
    if done is None:
        ended = "; ".join(f"{s} {c}" for a in attempts for s, c in a.failed.items()) or "no training site"
        return f"no analysis came to its end: {ended}"
    if len(done.selected) >= rule.top:
        return ""
    hazard = [r for r in rows if r["low"] > 0 and r["hazard_ratio"] > rule.min_hr]
    strict = [r for r in hazard if r["worst_p"] < rule.max_p]
    ordered = [r for r in strict if (r["worst_concordance"] or 0.0) > rule.min_c]
    return (
        f"{len(done.selected)} of {rule.top}: of {plan.model.n_codes} codes {len(done.withheld)} were withheld by the "
        f"sites' rules, {len(rows)} fitted in all {plan.survival.folds} folds, {len(hazard)} raise the hazard, "
        f"{len(strict)} with p < {rule.max_p} in every fold, {len(ordered)} also with C > {rule.min_c}; "
        "the rule was not relaxed"
    )


def _write(stage: StageStore, attempts: list[Attempt], facts: dict[str, Any], pictures: bytes) -> list[Path]:
    """selection.csv (a row per code and fold), selection.json, and what `biomarker_files` makes of them."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    done = attempts[-1].selection if attempts else None
    files = []
    if done is not None:
        write_atomic(stage.folder / TABLE, done.table.to_csv(index=False).encode())
        files.append(stage.folder / TABLE)
        facts = {**facts, **done.record()}
    write_json(stage.folder / RECORD, facts)
    if pictures:
        write_atomic(stage.folder / PICTURES, pictures)
        files.append(stage.folder / PICTURES)
    return [*files, stage.folder / RECORD, *write_biomarkers(stage.folder, facts)]
