"""Stage plan: send the plan, and go on when the people at the sites have approved it. Runs again on resume."""

from __future__ import annotations

from typing import Any

from fourdvq_server.admission import wait_for_approval
from fourdvq_server.stages.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Fill `context.ready`. Raises TemporaryStop E_NO_APPROVAL when a bounded wait ends without the quorum."""
    wait_for_approval(context, context.approval_wait_s)
    return {"plan": context.plan.hash, "approved_by": context.members, "refused": dict(context.refused)}
