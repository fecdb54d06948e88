"""How a site's patients are shared out between training, validation and test; needs the policy and the last plan."""

from __future__ import annotations

from fourdvq.plan import SplitSpec
from fourdvq_client.approval import LATEST, find_plan
from fourdvq_client.policy import load_policy
from fourdvq_client.workspace import Workspace


def split_shares(workspace: Workspace) -> SplitSpec:
    """All test at an external site; else the shares of the plan that came last, or the defaults before any came."""
    if load_policy(workspace.policy_yaml).rules.role == "external":
        return SplitSpec(train=0.0, validation=0.0, test=1.0)
    return find_plan(workspace, LATEST).splits if (workspace.plans / LATEST).is_file() else SplitSpec()
