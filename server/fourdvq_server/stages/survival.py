"""Stage survival: select prognostic codes over all training sites as if their patients stood in one table.

The mathematics is `fourdvq.survival.SelectionRun`, which asks and listens; this module carries its requests to the
sites and their sums back. A site that is lost or refuses in any step ends the analysis, because sums over a changed
cohort are wrong; a new one starts without it and both stand in the record. Every step is journaled: an interrupted
coordinator makes the run again and feeds it the recorded sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

from fourdvq.config import to_plain
from fourdvq.data.files import write_atomic
from fourdvq.plan import Plan, SurvivalSpec
from fourdvq.survival.disclosure import Policy
from fourdvq.survival.messages import MESSAGES, HelloRequest, Message, Sums, combine
from fourdvq.survival.run import Settings
from fourdvq.survival.selection import PaperRule, Selection, SelectionRun
from fourdvq.wire.messages import COX_TASKS, CoxReply
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.freeze import frozen_model
from fourdvq_server.store import StageStore, write_json

NAME = "survival"
KIND_OF: dict[type[Message], str] = {request: f"query.{action}" for action, (request, _) in MESSAGES.items()}
TABLE, RECORD = "selection.csv", "selection.json"


@dataclass
class Analysis:
    """One attempt: who took part, what became of it, and who ended it."""

    number: int
    sites: list[str]
    messages: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    selection: Selection | None = None


def run(context: StageContext) -> dict[str, Any]:
    """The selection, or why there is none. Never fails a run: survival needs more patients than training does."""
    stage = context.store.stage(NAME)
    _, tokenizer = frozen_model(context)
    attempts: list[Analysis] = []
    sites = list(context.trainers)
    while sites:
        attempt = Analysis(len(attempts) + 1, sites)
        attempts.append(attempt)
        _attempt(context, stage, tokenizer, attempt)
        if attempt.selection is not None:
            break
        sites = [site for site in sites if site not in attempt.failed]
    facts = _facts(context.plan, attempts)
    _write(stage, attempts, facts)
    if facts["codes"]:
        context.record(NAME, 1, {"": {"selected": float(len(facts["selected"])), "withheld": float(facts["withheld"])}})
    stage.forget_replies()
    return facts


def _attempt(context: StageContext, stage: StageStore, tokenizer: str, attempt: Analysis) -> None:
    spec = context.plan.survival
    run = SelectionRun(
        hello_of(context, tokenizer, len(attempt.sites)),
        Settings.under(Policy()),
        rule=PaperRule(**to_plain(spec.rule)),
        permutations=spec.permutations,
    )
    while (request := run.request()) is not None:
        sums, failed = _step(context, stage, tokenizer, attempt, request)
        if sums is None:
            attempt.failed = failed
            context.notify(
                f"survival analysis {attempt.number} ended: {', '.join(f'{s} {c}' for s, c in failed.items())}"
            )
            return
        attempt.messages += 1
        run.update(sums)
    attempt.selection = run.finished([])


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


def _step(
    context: StageContext, stage: StageStore, tokenizer: str, attempt: Analysis, request: Message
) -> tuple[Sums | None, dict[str, str]]:
    """The sum of all sites' answers, or the sites that did not answer."""
    kind = KIND_OF[type(request)]
    task = COX_TASKS[kind](analysis=attempt.number, tokenizer_sha256=tokenizer, request=request)
    exchange = f"analysis-{attempt.number}-step-{attempt.messages + 1:03d}"
    replies = context.ask(stage, exchange, task, attempt.sites, quorum=0)
    context.progress(NAME, attempt.messages + 1, 0, kind.removeprefix("query.cox_"))
    if replies.failed:
        return None, replies.failed
    return combine(cast(CoxReply, body).sums for body in replies.bodies().values()), {}


def _facts(plan: Plan, attempts: list[Analysis]) -> dict[str, Any]:
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
        "analyses": [{"sites": a.sites, "ended_by": a.failed} for a in attempts],
        "warnings": list(done.warnings) if done is not None else [],
    }


def biomarker_rows(selection: Selection) -> list[dict[str, Any]]:
    """One object per code that was fitted in every fold, best mean concordance first; ratios are per SD.

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
                "concordance": float(part["c"].mean()),
                "worst_concordance": float(part["c"].min()),
                "selected": code in selection.selected,
            }
        )
    return sorted(
        rows, key=lambda row: (not row["selected"], -row["concordance"] if math.isfinite(row["concordance"]) else 1.0)
    )


def _geometric(values: Any) -> float:
    return float(math.exp(sum(math.log(v) for v in values) / len(values)))


def _why(plan: Plan, attempts: list[Analysis], rows: list[dict[str, Any]]) -> str:
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
    ordered = [r for r in strict if r["worst_concordance"] > rule.min_c]
    return (
        f"{len(done.selected)} of {rule.top}: of {plan.model.n_codes} codes {len(done.withheld)} were withheld by the "
        f"sites' rules, {len(rows)} fitted in all {plan.survival.folds} folds, {len(hazard)} raise the hazard, "
        f"{len(strict)} with p < {rule.max_p} in every fold, {len(ordered)} also with C > {rule.min_c}; "
        "the rule was not relaxed"
    )


def _write(stage: StageStore, attempts: list[Analysis], facts: dict[str, Any]) -> None:
    """selection.csv (a row per code and fold) and selection.json beside the stage's result."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    done = attempts[-1].selection if attempts else None
    if done is not None:
        write_atomic(stage.folder / TABLE, done.table.to_csv(index=False).encode())
        facts = {**facts, **done.record()}
    write_json(stage.folder / RECORD, facts)
