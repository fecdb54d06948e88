"""Federated Cox regression and biomarker selection: no patient row, survival time or risk set leaves a site.

One protocol, one implementation, three thin drivers (the calls below, the demo, the network):

    coordinator                                     every site
    run = SelectionRun(...) or ModelRun(...)        state = CoxSiteState(table, policy, key)
    while (request := run.request()) is not None:
        request  ------------------------------->   state.answer(request)   rules, then sums of its own rows
        run.update(combine(answers))   <---------   Sums: frozen arrays, additive, none as long as the patients
    run.result()

Requests and sums are declared in `messages` (`MESSAGES` maps a message name to its two classes; `arrays()`, `scalars()`
and `from_parts()` take them apart and check them). The order is hello, moments, scale, (grid), then evaluations until
Newton's method has converged, pair counts, correlations, permutations. A site refuses with E_COX_RULE and the name of
the rule. `masking` hides the sites' parts of every sum. A run is a deterministic function of the sums it was given: to
resume it, make it again and feed it the recorded ones.
"""

from fourdvq.survival.disclosure import Policy
from fourdvq.survival.fit import CoxBatch, CoxResult, fit_cox_batch, fit_federated_cox
from fourdvq.survival.run import ModelRun, Settings
from fourdvq.survival.selection import PaperRule, Selection, SelectionRun, select_biomarkers
from fourdvq.survival.state import CoxSiteState
from fourdvq.survival.table import CoxSite

__all__ = [
    "CoxBatch",
    "CoxResult",
    "CoxSite",
    "CoxSiteState",
    "ModelRun",
    "PaperRule",
    "Policy",
    "Selection",
    "SelectionRun",
    "Settings",
    "fit_cox_batch",
    "fit_federated_cox",
    "select_biomarkers",
]
