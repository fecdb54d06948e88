"""Survival analysis of hospitals that only have a table of biomarkers, each file a site under the default rules.

All files lie here, so nothing is hidden from the person who runs this; the sites still compute apart and under their
rules, and the result is what the same hospitals would get over a network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from fourdvq.config import to_plain
from fourdvq.data.files import write_atomic
from fourdvq.errors import ConfigError, Refused, SurvivalError
from fourdvq.plan import PaperRule, SurvivalSpec
from fourdvq.survival.curves import CurveRun, RiskGroupRun, steps_of
from fourdvq.survival.disclosure import Policy, RunRegister, small_count
from fourdvq.survival.kaplan_meier import KmCurve
from fourdvq.survival.messages import HelloRequest, combine
from fourdvq.survival.run import CoxRun, ModelRun, Settings
from fourdvq.survival.selection import Selection, SelectionRun
from fourdvq.survival.small_sample import Assessment, assess_model
from fourdvq.survival.state import CoxSiteState
from fourdvq.survival.table import CoxSite
from fourdvq_server.biomarker_files import RECORD, write_biomarkers
from fourdvq_server.biomarker_tables import TableSites
from fourdvq_server.prognosis_facts import PH_TRANSFORM, group_facts, model_facts, score_of
from fourdvq_server.stages.survival import SHARED, TABLE, biomarker_rows
from fourdvq_server.store import write_json

R = TypeVar("R")
KEY = b"tables in one place"  # all rows lie here: folds need no secret, only to be the same every time
CURVE, MODEL = "kaplan_meier.svg", "model.json"
LABELS = {"age": "age, per 10 years", "sex": "sex, male", "smoking": "smoking, ever"}


@dataclass(frozen=True)
class TableOptions:
    """How to analyse. `rules`: the default disclosure policy of every site, or none for data that are one's own."""

    folds: int = 5
    baseline: Literal["site", "shared"] = "site"
    permutations: int = 99
    rules: Literal["policy", "off"] = "policy"
    rule: PaperRule = dataclasses.field(default_factory=PaperRule)

    @property
    def policy(self) -> Policy | None:
        return Policy() if self.rules == "policy" else None


def select_over_tables(tables: TableSites, options: TableOptions, out: Path) -> tuple[dict[str, Any], list[Path]]:
    """The selection's record and the files written into `out`. Raises Refused with site and rule where a site says no,
    SurvivalError for a table that breaks a rule."""
    hello = HelloRequest(folds=options.folds, baseline=options.baseline)
    settings = Settings.under(options.policy)
    run = SelectionRun(hello, settings, rule=options.rule, permutations=options.permutations)
    states = _states(tables.sites, options)
    _drive(run, states)
    selection = run.finished([state.card() for state in states])
    curve, no_curve = _curve(tables.sites, options, settings)
    further, no_model = _prognosis(tables, options, settings, selection.selected)
    record = {**_record(tables, options, selection, (no_curve, no_model)), **further}
    out.mkdir(parents=True, exist_ok=True)
    table = selection.table.assign(biomarker=[tables.biomarkers[code] for code in selection.table["code"]])
    write_atomic(out / TABLE, table.to_csv(index=False).encode())
    write_json(out / RECORD, record)
    files = [out / TABLE, out / RECORD, *write_biomarkers(out, record)]
    if curve is not None:
        write_atomic(out / CURVE, _curve_chart(curve).encode())
        files.append(out / CURVE)
    return record, files


def assess_over_tables(tables: TableSites, names: Sequence[str], options: TableOptions, out: Path) -> dict[str, Any]:
    """One Cox model of the named biomarkers and the covariates, with what an honest reader needs beside its C.

    Raises ConfigError E_VALUE for a biomarker that no table has, else as `select_over_tables`.
    """
    unknown = [name for name in names if name not in tables.biomarkers]
    if unknown or len(set(names)) < len(names):
        found = unknown[0] if unknown else "one biomarker twice"
        raise ConfigError("E_VALUE", where="--model", found=found, wanted=", ".join(tables.biomarkers))
    if options.baseline == "shared":
        raise ConfigError("E_VALUE", where="--model with --baseline", found="shared", wanted="site")
    columns = [tables.biomarkers.index(name) for name in names]
    chosen = [dataclasses.replace(site, X=site.X[:, columns]) for site in tables.sites]
    found_model = assess_model(
        chosen, replicates=min(options.permutations, 200), key=KEY, disclosure=options.policy or "off"
    )
    labels = (*names, *(LABELS[name] for name in chosen[0].names))
    record = {"sites": _sites(tables), "rules": options.rules, **_model_record(found_model, labels)}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MODEL, record)
    return record


def _states(sites: Sequence[CoxSite], options: TableOptions) -> list[CoxSiteState]:
    return [CoxSiteState(site, options.policy or "off", KEY, register=RunRegister()) for site in sites]


def _drive(run: CoxRun[R], states: Sequence[CoxSiteState]) -> R:
    """Ask every site and add; a refusal also names its site, which nobody outside this machine learns."""
    while (request := run.request()) is not None:
        answers = []
        for state in states:
            try:
                answers.append(state.answer(request))
            except Refused as refusal:
                where = f"{state.site.name}: {refusal.where}"
                fix = "a larger table, or --rules off for data that are your own"
                raise Refused(refusal.code, where=where, wanted="see docs/reference/survival.md", fix=fix) from None
        run.update(combine(answers))
    return run.result()


def _curve(sites: Sequence[CoxSite], options: TableOptions, settings: Settings) -> tuple[KmCurve | None, str]:
    """The survival curve of all sites on bins that every site accepts, or why there is none."""
    try:
        run = CurveRun(HelloRequest(folds=0, purpose="km"), settings)
        return _drive(run, _states(sites, options)), ""
    except Refused as refusal:
        return None, f"no Kaplan-Meier curve: {refusal.where}"


def _prognosis(
    tables: TableSites, options: TableOptions, settings: Settings, codes: tuple[int, ...]
) -> tuple[dict[str, Any], str]:
    """The model of the selected biomarkers and its risk groups, or why one of them is missing."""
    found: dict[str, Any] = {"model": {}, "risk_groups": {}}
    if not codes:
        return found, ""
    names = [*(tables.biomarkers[code] for code in codes), *(LABELS[name] for name in tables.sites[0].names)]
    ridge = SurvivalSpec().ridge
    hello = HelloRequest(folds=0, codes=codes, purpose="multivariable")
    try:
        fitted = _drive(ModelRun(hello, settings, ridge=ridge, ph=PH_TRANSFORM), _states(tables.sites, options))
        if fitted.fits.status[0, -1] != "ok":
            return found, f"no model of the selected biomarkers: {fitted.fits.status[0, -1]}"
        found["model"] = model_facts(fitted, names, ridge)
        groups = RiskGroupRun(dataclasses.replace(hello, purpose="km"), settings, score_of(found["model"]))
        found["risk_groups"] = group_facts(_drive(groups, _states(tables.sites, options)))
    except (Refused, SurvivalError) as error:
        return found, f"no {'risk groups' if found['model'] else 'model'} of the selected biomarkers: {error.where}"
    return found, ""


def _curve_chart(curve: KmCurve) -> str:
    from fourdvq.reports.charts import step_chart

    years, values = steps_of(curve)
    titles = {"survival": "all sites", "low": "95 % low", "high": "95 % high"}
    shown = {titles[name]: (years, series) for name, series in values.items()}
    return step_chart(shown, title="Survival on bins that every site accepts", x_label="years", y_label="alive")


def _record(tables: TableSites, options: TableOptions, selection: Selection, missing: Sequence[str]) -> dict[str, Any]:
    rows = [{**row, "code": tables.biomarkers[row["code"]]} for row in biomarker_rows(selection)]
    notes = [SHARED] if options.baseline == "shared" else []
    notes += [] if options.rules == "policy" else ["disclosure rules are off: for data that are one's own"]
    notes += [f"{s}: {n} left out, {why}" for s, part in _left_out(tables).items() for why, n in part.items()]
    if len(tables.sites) > 1:
        notes.append("C counts pairs within sites")
    found, wanted = len(selection.selected), options.rule.top
    return {
        **selection.record(),
        "selected": [tables.biomarkers[code] for code in selection.selected],
        "withheld": [tables.biomarkers[code] for code in selection.withheld],
        "why": "" if found >= wanted else f"{found} of {wanted}; {len(rows)} biomarkers were fitted in all folds",
        "codes": rows,
        "warnings": [*notes, *selection.warnings, *(text for text in missing if text)],
        "analyses": [{"sites": [site.name for site in tables.sites], "masked": False, "ended_by": {}}],
        "rules": options.rules,
        "rule": to_plain(options.rule),
        "folds": options.folds,
        "baseline": options.baseline,
        "sites": _sites(tables),
    }


def _sites(tables: TableSites) -> dict[str, dict[str, str]]:
    return {s.name: {"patients": small_count(len(s.t)), "deaths": small_count(int(s.e.sum()))} for s in tables.sites}


def _left_out(tables: TableSites) -> dict[str, dict[str, str]]:
    return {
        site: {reason: small_count(count) for reason, count in part.items()} for site, part in tables.left_out.items()
    }


def _model_record(found: Assessment, names: Sequence[str]) -> dict[str, Any]:
    def number(value: Any) -> float | None:
        return float(value) if np.isfinite(value) else None

    rows = [
        {"name": name, "coef": number(coef), "se": number(se), "p": number(p), "unpenalised_coef": number(plain)}
        for name, coef, se, p, plain in zip(names, found.coef, found.se, found.p, found.unpenalised_coef, strict=True)
    ]
    kept = ("ridge", "concordance", "unpenalised_c", "cross_validated", "permutation_p", "epv")
    return {
        "banner": found.banner,
        "model": rows,
        **{name: number(getattr(found, name)) for name in kept},
        **{n: getattr(found, n) for n in ("cross_validation", "replicates", "patients", "deaths", "parameters")},
    }
