"""After the selection, in the same stage: one model of the selected codes and the covariates, and its risk groups.

Both are analyses of their own over the sites of the selection. A site that says no costs this part and never the
selection; what ended it stands in the record. The sites are told the model (`cox_result`), so that each can compute the
risk of its own patients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fourdvq.survival.curves import RiskGroupRun
from fourdvq.survival.disclosure import Policy
from fourdvq.survival.messages import HelloRequest
from fourdvq.survival.run import ModelRun, Settings
from fourdvq_server.prognosis_facts import PH_TRANSFORM, group_facts, model_facts, score_of
from fourdvq_server.stages.cox_exchange import Desk, Exchange

FIRST_NUMBER = 51  # analyses of this part are counted apart from those of the selection
DEATH_ON_DAY_0 = "DATA_INVALID"


def prognosis(exchange: Exchange, hello: HelloRequest, codes: tuple[int, ...], sites: list[str]) -> dict[str, Any]:
    """`model`, `risk_groups` (empty where there is none) and `ended`: what ended them, by purpose."""
    desk = Desk(exchange, FIRST_NUMBER)
    if not codes or not sites:
        return {"model": {}, "risk_groups": {}, "ended": []}
    hello = replace(hello, folds=0, codes=codes, sites=len(sites))
    model = _model(desk, replace(hello, purpose="multivariable"), sites)
    groups: dict[str, Any] = {}
    if model:
        run = RiskGroupRun(replace(hello, purpose="km", baseline="site"), Settings.under(Policy()), score_of(model))
        groups = group_facts(run.result()) if desk.over(sites, "km", run) else {}
    return {"model": model, "risk_groups": groups, "ended": desk.ended}


def _model(desk: Desk, hello: HelloRequest, sites: list[str]) -> dict[str, Any]:
    spec = desk.exchange.context.plan.survival
    names = [*(f"code_{code}" for code in hello.codes), *spec.covariates]
    for transform in (PH_TRANSFORM, ""):
        run = ModelRun(hello, Settings.under(Policy()), ridge=spec.ridge, ph=transform, announce=True)
        analysis = desk.over(sites, "multivariable", run)
        if analysis is not None:
            break
        # The logarithm of time does not exist for a death on day 0: again, without the test of proportional hazards.
        if set(desk.attempts[-1].failed.values()) != {DEATH_ON_DAY_0}:
            return {}
    else:
        return {}
    fitted = run.result()
    status = str(fitted.fits.status[0, -1])
    if status != "ok":
        desk.ended.append({"purpose": f"multivariable: {status}", "sites": sites, "ended_by": {}})
        return {}
    return model_facts(fitted, names, spec.ridge)
