"""Stage longitudinal: does a generated third scan tell as much about survival as the real one, or as the second one?

The model of the selected codes and the covariates is fitted on training patients and then frozen. Test patients with
three scans get three risk scores from it: from their real third scan, from the one generated from the first two, and
from the second one carried forward, as a person without a model would. C counts pairs within sites; time counts from
the third scan. Source: paper section 3, cross-sectional test; the frozen model is ours (docs/reference/survival.md).

Test sets are small, and the sites' rules refuse small sets by design: the stage then says so and the run goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fourdvq.survival.curves import FrozenRun, FrozenScore
from fourdvq.survival.disclosure import Policy
from fourdvq.survival.messages import HelloRequest
from fourdvq.survival.run import CoxRun, ModelResult, ModelRun, Settings
from fourdvq.survival.small_sample import banner
from fourdvq.wire.messages import CoxFutureTask
from fourdvq_server.stages import survival
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.cox_exchange import Analysis, Exchange
from fourdvq_server.stages.freeze import frozen_model
from fourdvq_server.stages.ode import trained_ode
from fourdvq_server.store import write_json

NAME = "longitudinal"
RECORD = "longitudinal.json"
SOURCES = ("real", "generated", "carried")
_FIRST_NUMBER = 101  # analyses of this stage are counted apart from those of the selection


@dataclass
class _Desk:
    """Numbers the analyses and keeps what ended those that did not finish."""

    context: StageContext
    exchange: Exchange
    attempts: list[Analysis]
    ended: list[dict[str, Any]]

    def over(self, sites: list[str], purpose: str, run: CoxRun[Any]) -> Analysis | None:
        """The finished analysis of these sites, or None with what ended it on record."""
        analysis = Analysis(_FIRST_NUMBER + len(self.attempts), sites)
        self.attempts.append(analysis)
        if self.exchange.converse(analysis, run):
            return analysis
        self.ended.append({"purpose": purpose, "sites": sites, "ended_by": analysis.failed})
        return None


def run(context: StageContext) -> dict[str, Any]:
    """C of the three sources, or why there is none. Never fails a run."""
    stage = context.store.stage(NAME)
    selection = context.store.stage(survival.NAME).result or {}
    codes = tuple(selection.get("selected", ()))
    if not codes:
        return {"codes": [], "why": "no code was selected, so there is no model to freeze", "concordance": {}}
    _, tokenizer = frozen_model(context)
    facts = compare(context, Exchange(context, stage, tokenizer), codes, selection["analyses"][-1]["sites"])
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_json(stage.folder / RECORD, facts)
    context.metrics.artifact(stage.folder / RECORD, NAME)
    known = {f"c_{source}": c for source, c in facts["concordance"].items() if c is not None}
    context.record(NAME, 1, {"": known})
    stage.forget_replies()
    return facts


def compare(context: StageContext, exchange: Exchange, codes: tuple[int, ...], trained_at: list[str]) -> dict[str, Any]:
    """Fit and freeze at the sites of the selection, then score the test patients of every site."""
    desk = _Desk(context, exchange, [], [])
    fitted, status = _fit(desk, codes, trained_at)
    if fitted is None:
        return _facts(desk, codes, None, {}, [], f"the model of the selected codes could not be fitted: {status}")
    sites = _with_future(desk, list(context.members))
    score = _score(fitted)
    concordance: dict[str, float] = {}
    while sites and not concordance:
        found = _concordance(desk, codes, score, sites, SOURCES[0])
        if found is None:
            sites = [site for site in sites if site not in desk.attempts[-1].failed]
        else:
            concordance[SOURCES[0]] = found
    for source in SOURCES[1:] if concordance else ():
        found = _concordance(desk, codes, score, sites, source)
        concordance[source] = math.nan if found is None else found
    why = "" if concordance else "the test patients' sites did not answer: small sets are refused by design"
    return _facts(desk, codes, fitted, concordance, sites, why)


def _fit(desk: _Desk, codes: tuple[int, ...], sites: list[str]) -> tuple[ModelResult | None, str]:
    """The model of the codes and covariates over all training patients, with the plan's ridge, and its status."""
    spec = desk.context.plan.survival
    run = ModelRun(_hello(desk, codes, len(sites), "multivariable"), Settings.under(Policy()), ridge=spec.ridge)
    if desk.over(sites, "multivariable", run) is None:
        return None, "a site ended it"
    fitted, status = run.result(), str(run.result().fits.status[0, 0])
    return (fitted if status == "ok" else None), status


def _with_future(desk: _Desk, sites: list[str]) -> list[str]:
    """The sites that generated the third scans of their test patients."""
    task = CoxFutureTask(tokenizer_sha256=desk.exchange.tokenizer, weights=trained_ode(desk.context))
    replies = desk.context.ask(desk.exchange.stage, "future", task, sites, quorum=0)
    if replies.failed:
        desk.ended.append({"purpose": "generate", "sites": sites, "ended_by": dict(replies.failed)})
    return [site for site in sites if site in replies.good]


def _concordance(
    desk: _Desk, codes: tuple[int, ...], score: FrozenScore, sites: list[str], source: str
) -> float | None:
    """C of one source over the sites; NaN without comparable pairs, None where a site ended it."""
    hello = replace(_hello(desk, codes, len(sites), NAME), cohort="test", source=source, baseline="site")  # type: ignore[arg-type]
    run = FrozenRun(hello, score)
    return None if desk.over(sites, f"{NAME} {source}", run) is None else run.result()


def _hello(desk: _Desk, codes: tuple[int, ...], sites: int, purpose: str) -> HelloRequest:
    """All rows in one fold, and one model of all codes and covariates."""
    hello = survival.hello_of(desk.context, desk.exchange.tokenizer, sites)
    return replace(hello, folds=0, codes=codes, purpose=purpose)


def _score(fitted: ModelResult) -> FrozenScore:
    scale = fitted.study.scale
    return FrozenScore(beta=fitted.fits.beta[0, 0, 1:], mean=scale.mean, sd=scale.sd)


def _facts(
    desk: _Desk,
    codes: tuple[int, ...],
    fitted: ModelResult | None,
    concordance: dict[str, float],
    sites: list[str],
    why: str,
) -> dict[str, Any]:
    known = {source: None if math.isnan(c) else c for source, c in concordance.items()}
    spec = desk.context.plan.survival
    facts: dict[str, Any] = {
        "codes": list(codes),
        "why": why or ("" if None not in known.values() else "a source without comparable pairs has no C"),
        "concordance": known,
        "sites": sites if concordance else [],
        "origin": spec.test_origin,
        "ended": desk.ended,
        "note": "frozen model, held-out patients, pairs within sites; no interval over several sites",
    }
    if fitted is not None:
        scale, beta = fitted.study.scale, fitted.fits.beta[0, 0, 1:]
        deaths, parameters = int(fitted.study.total.events[0]), len(beta)
        names = [*(f"code_{code}" for code in codes), *spec.covariates]
        rows = zip(names, beta.tolist(), scale.mean.tolist(), scale.sd.tolist(), strict=True)
        facts["model"] = {
            "ridge": spec.ridge,
            "coefficients": [dict(zip(("name", "beta_per_sd", "mean", "sd"), row, strict=True)) for row in rows],
            "deaths_per_parameter": deaths / parameters,
            "banner": banner(deaths, parameters),
        }
    return facts
