"""What an answer of a survival analysis may be: the class that its request has, in shapes that the plan can ask for.

The disclosure rules themselves were applied before anything was summed (`fourdvq.survival.disclosure`); this is the
last look before the door. Pure; `egress.clear` calls it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fourdvq.errors import Refused, WireError
from fourdvq.plan import Plan
from fourdvq.survival.disclosure import Policy
from fourdvq.survival.messages import RiskSums, Sums, answer_type
from fourdvq.survival.selection import REPLICATES_AT_ONCE as MOST_REPLICATES
from fourdvq.survival.shared import HORIZON_DAYS
from fourdvq.wire.masked import KEY_BYTES, masked_sums
from fourdvq.wire.messages import (
    COX_REPLIES,
    CoxKey,
    CoxKeysTask,
    CoxReply,
    CoxTask,
    MaskedReply,
    Reply,
    RiskReply,
    Task,
)


def check_cox(reply: Reply, task: Task | None, plan: Plan | None) -> int:
    """Bytes of the arrays of a sound reply. Raises Refused E_EGRESS with the rule as its place, NONFINITE for values
    that are not finite. What masked sums hold cannot be judged, nor read: their names and shapes are."""
    if isinstance(reply, CoxKey):
        return _key(reply, task)
    if not isinstance(task, CoxTask) or plan is None:
        raise _refuse("type", f"{type(reply).__name__} for {type(task).__name__}")
    declared = answer_type(task.request, plan.survival.baseline)
    if type(reply) is MaskedReply:
        return _size(_hidden(reply, declared), plan)
    wanted = RiskReply if declared is RiskSums else COX_REPLIES[type(task).kind]
    if type(reply) is not wanted or not isinstance(reply, CoxReply):
        raise _refuse("type", f"{type(reply).__name__} for {type(task).__name__}")
    if type(reply.sums) is not declared:
        raise _refuse("type", f"sums of class {type(reply.sums).__name__}")
    arrays = reply.sums.arrays()
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise Refused("NONFINITE", where="cox_stats")
    return _size(arrays.values(), plan)


def _key(reply: CoxKey, task: Task | None) -> int:
    if type(reply) is not CoxKey or type(task) is not CoxKeysTask:
        raise _refuse("type", f"{type(reply).__name__} for {type(task).__name__}")
    if reply.public_key.shape != (KEY_BYTES,) or reply.public_key.dtype != np.uint8:
        raise _refuse("cox_stats", "a public key of another form")
    return KEY_BYTES


def _hidden(reply: MaskedReply, declared: type[Sums]) -> Iterable[np.ndarray]:
    try:
        return masked_sums(reply, declared).arrays.values()
    except WireError as error:
        raise _refuse("cox_stats", error.found) from None


def _size(arrays: Iterable[np.ndarray], plan: Plan) -> int:
    """Bytes of the arrays. Raises Refused E_EGRESS if one has an axis that no analysis of the plan has."""
    survival, n_codes = plan.survival, plan.model.n_codes
    replicates = max(1, min(survival.permutations, MOST_REPLICATES))
    p = 1 + survival.rule.top + len(survival.covariates)  # of the model of the selected codes
    models = (n_codes + 1) * survival.folds * replicates
    bins = int(HORIZON_DAYS // Policy().bin_days) + 1
    longest = max(models, n_codes + p, 1 + p + p * (p + 1) // 2, bins)
    found = list(arrays)
    if any(size > longest for array in found for size in array.shape):
        raise _refuse("cox_stats", "an array longer than the models that were asked for")
    return sum(array.nbytes for array in found)


def _refuse(rule: str, found: str) -> Refused:
    return Refused("E_EGRESS", where=rule, found=found)
