"""What the coordinator checks before it believes a reply. One bad reply is put aside with a code; the others count.

Source: the per-reply validator of docs/explanation/trust.md. A stock mean takes NaN, broadcasts a wrong shape and
believes any number of scans.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fourdvq.errors import WireError
from fourdvq.evaluation.conformal import counts_shape
from fourdvq.federation.aggregate import check_update
from fourdvq.federation.codebook import CodebookStats, check_stats
from fourdvq.plan import Plan
from fourdvq.tensors import first_nonfinite
from fourdvq.wire.body import body_sha256
from fourdvq.wire.messages import (
    PROTOCOL,
    CodebookInitTask,
    CodebookSums,
    ConformalCounts,
    EvalSummary,
    OdeTask,
    OdeUpdate,
    Reply,
    ReplyEnvelope,
    Task,
    TaskEnvelope,
    VqganTask,
    VqganUpdate,
)

# What a site may send where the plan asks for the key.
_COARSER = {
    "float32": {"float32", "float16", "bfloat16"},
    "float16": {"float16", "bfloat16"},
    "bfloat16": {"bfloat16"},
}


def check_reply(
    site: str, task: TaskEnvelope, envelope: ReplyEnvelope, body: Reply, *, last_audit_head: str | None
) -> None:
    """Raise WireError unless the reply belongs to this task and this site and its content is what was hashed."""
    if envelope.protocol != PROTOCOL:
        raise WireError("PROTOCOL_MISMATCH", where=site, found=str(envelope.protocol), wanted=str(PROTOCOL))
    if envelope.site != site:
        raise WireError("E_SITE_NAME", where=site, found=envelope.site, wanted=site)
    for name in ("run", "round", "task_id", "plan"):
        found, wanted = getattr(envelope, name), getattr(task, name)
        if found != wanted:
            raise WireError("E_REPLY", where=f"{site}: {name}", found=str(found), wanted=str(wanted))
    if envelope.parent != task.parent:
        raise WireError("PARENT_MISMATCH", where=site, found=envelope.parent[:12], wanted=task.parent[:12])
    if body_sha256(body) != envelope.payload_sha256:
        raise WireError("E_PAYLOAD", where=site, found="content of another sha256")
    if last_audit_head is not None and envelope.audit_head == last_audit_head:
        raise WireError("E_AUDIT", where=site, found="the audit head of an earlier reply")


def check_body(site: str, plan: Plan, task: Task, body: Reply) -> None:
    """Raise WireError unless names, shapes, types and values are what this task can have for an answer."""
    check = _CHECKS.get(type(body))
    if check:
        check(site, plan, task, body)


def _vqgan(site: str, plan: Plan, task: VqganTask, body: VqganUpdate) -> None:
    _delta(site, plan, body.delta, task.weights)
    stats = CodebookStats(torch.from_numpy(body.code_counts), torch.from_numpy(body.code_sums))
    _sums(site, stats, plan.model.n_codes, plan.model.code_dim)
    _count(site, "scans", body.scans)


def _ode(site: str, plan: Plan, task: OdeTask, body: OdeUpdate) -> None:
    _delta(site, plan, body.delta, task.weights)
    _count(site, "patients", body.patients)


def _codebook(site: str, _plan: Plan, task: CodebookInitTask, body: CodebookSums) -> None:
    if body.counts.ndim != 1 or len(body.counts) > task.n_codes:
        raise WireError("E_MESSAGE", where=f"{site}: counts", found=str(body.counts.shape), wanted=f"({task.n_codes},)")
    stats = CodebookStats(torch.from_numpy(body.counts), torch.from_numpy(body.sums))
    _sums(site, stats, len(body.counts), task.code_dim)
    if not body.counts.any():
        raise WireError("E_MESSAGE", where=f"{site}: counts", found="no vector at all", wanted="some vectors")


def _summary(site: str, _plan: Plan, _task: Task, body: EvalSummary) -> None:
    for name in ("n", "total", "total_sq"):
        values = getattr(body, name)
        if values.shape != (len(body.rows),):
            raise WireError("E_MESSAGE", where=f"{site}: {name}", found=str(values.shape), wanted="one per row")
        if not np.isfinite(values).all():
            raise WireError("E_NONFINITE", where=f"{site}: {name}", found="NaN or infinity")
    if len(set(body.rows)) != len(body.rows) or (body.n < 0).any() or (body.total_sq < 0).any():
        raise WireError("E_MESSAGE", where=f"{site}: rows", found="a repeated row or a negative count")


def _conformal(site: str, plan: Plan, _task: Task, body: ConformalCounts) -> None:
    counts, shape = body.counts, counts_shape(plan.evaluation)
    if counts.shape != shape or counts.dtype != np.int64:
        raise WireError("E_MESSAGE", where=f"{site}: counts", found=f"{counts.dtype}{counts.shape}", wanted=str(shape))
    if (counts < 0).any():
        raise WireError("E_MESSAGE", where=f"{site}: counts", found="a negative count")


_CHECKS: dict[type, Callable[[str, Plan, Any, Any], None]] = {
    VqganUpdate: _vqgan,
    OdeUpdate: _ode,
    CodebookSums: _codebook,
    EvalSummary: _summary,
    ConformalCounts: _conformal,
}


def _delta(site: str, plan: Plan, delta: Any, reference: Any) -> None:
    broken = first_nonfinite(delta)
    if broken:
        raise WireError("E_NONFINITE", where=f"{site}: {broken}", found="NaN or infinity")
    # A site's policy may be coarser than the plan, never finer; within one update there is one precision.
    found = {str(tensor.dtype).removeprefix("torch.") for tensor in delta.values()}
    coarser = _COARSER[plan.federation.wire_dtype]
    wanted = found.pop() if len(found) == 1 and found <= coarser else plan.federation.wire_dtype
    check_update(site, delta, reference, wire_dtype=wanted)


def _sums(site: str, stats: CodebookStats, n_codes: int, code_dim: int) -> None:
    if not bool(torch.isfinite(stats.counts).all() and torch.isfinite(stats.sums).all()):
        raise WireError("E_NONFINITE", where=f"{site}: codebook sums", found="NaN or infinity")
    check_stats(stats, n_codes, code_dim)


def _count(site: str, name: str, value: int) -> None:
    if not math.isfinite(value) or value <= 0:
        raise WireError("E_MESSAGE", where=f"{site}: {name}", found=str(value), wanted="a count above 0")
