"""What a reply may hold, by type: counts, shapes, clipping, rounding, suppression. Pure; `guard.release` calls it.

K codes, c code dimension. What comes out is a new reply, made of declared fields with allowed values only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fourdvq.errors import CODES, Refused
from fourdvq.evaluation.conformal import counts_shape
from fourdvq.plan import EvaluationSpec, Plan
from fourdvq.tensors import Weights, first_nonfinite, form_difference, payload_sha256
from fourdvq.training.update import WIRE_DTYPES, clip_relative, to_wire
from fourdvq.wire.masked import peers_sha256
from fourdvq.wire.messages import (
    COX_REPLIES,
    CodebookInitTask,
    CodebookSums,
    ConformalCounts,
    ConformalTask,
    CoxFutureTask,
    CoxKey,
    CoxPeersTask,
    EncodeTask,
    EvalSummary,
    MaskedReply,
    OdeUpdate,
    PlanAck,
    Receipt,
    Refusal,
    ReleaseTask,
    Reply,
    Report,
    RiskReply,
    SiteCard,
    Task,
    VqganTask,
    VqganUpdate,
)
from fourdvq_client.cox_egress import check_cox
from fourdvq_client.policy import SitePolicy, WireDtype

# Bits of precision behind the point: of two dtypes the coarser one has the last word.
_PRECISION: dict[WireDtype, int] = {"float32": 23, "float16": 10, "bfloat16": 7}
_JSON_ALLOWANCE = 65_536  # names and numbers of a reply beside its tensors
_REPORT_ALLOWANCE = 4_000_000  # as the form of the message field
EVAL_ROWS = frozenset(
    {
        "reconstruction", "cohort", "model", "model_residual", "persistence", "persistence_decoded", "linear_latent",
        "noise_control", "ceiling", "population_change", "paper_pooled",
    }
)  # fmt: skip
_EVAL_MODES = frozenset({"reconstruction", "extrapolation", "interpolation"})
_LONG_ID = 5
_HASH = re.compile(r"[0-9a-f]{40,64}")  # its digits may look like a date
_EVAL_PLACE = re.compile(r"(lung|whole)(/([0-9.]{1,6}(-[0-9.]{1,6}|\+)|slow|fast))?|")


@dataclass(frozen=True)
class Outcome:
    """What a handler made: the reply, and how many distinct patients and scans stand behind it.

    `code_patients` (K,) counts, for each code, the patients in whom it was seen: without it no codebook sums leave.
    """

    reply: Reply
    patients: int = 0
    scans: int = 0
    code_patients: np.ndarray | None = None


@dataclass(frozen=True)
class Context:
    """What the rules look at: the task, its plan, the policy in force, and identifiers that must not appear."""

    task: Task | None
    plan: Plan | None
    policy: SitePolicy
    identifiers: Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Cleared:
    """A reply that may leave, and the most bytes that it may take."""

    reply: Reply
    max_bytes: int


def clear(outcome: Outcome, context: Context) -> Cleared:
    """The reply as it may leave. Raises Refused with the rule as its place: TOO_FEW_PATIENTS or E_EGRESS."""
    reply = outcome.reply
    if isinstance(reply, Refusal):
        return Cleared(Refusal(code=reply.code), _JSON_ALLOWANCE)
    rule = _RULES.get(type(reply))
    if rule is None or type(reply).egress not in context.policy.egress.kinds:
        raise _refuse("kinds", f"a reply of kind {getattr(type(reply), 'egress', 'unknown')}")
    return rule(outcome, context)


def wire_dtype(plan: Plan | None, policy: SitePolicy) -> WireDtype:
    """The coarser of what the plan asks for and what the policy allows."""
    ours = policy.egress.wire_dtype
    asked = plan.federation.wire_dtype if plan is not None else ours
    return min(asked, ours, key=lambda name: _PRECISION[name])


def round_significant(value: float, digits: int) -> float:
    """`value` with so many significant decimal digits. Raises Refused E_EGRESS if it is not finite."""
    if not math.isfinite(value):
        raise _refuse("metrics", "a value that is not finite")
    return float(f"{value:.{digits - 1}e}")


def round_up(count: int, cell: int) -> int:
    """The next multiple of `cell`: up, so that a count used in a round never exceeds the count on the site card."""
    return -(-count // cell) * cell


def require_patients(outcome: Outcome, patients: int, scans: int = 0) -> None:
    """Raise Refused TOO_FEW_PATIENTS unless so many distinct patients and scans took part."""
    if outcome.patients < patients or outcome.scans < scans:
        # The numbers stay here: the rule's name alone goes into the audit line.
        raise Refused("TOO_FEW_PATIENTS", where="min_patients" if outcome.patients < patients else "min_scans")


def _vqgan(outcome: Outcome, context: Context) -> Cleared:
    reply, task = _pair(outcome, context, VqganUpdate, VqganTask)
    _require_round(outcome, context)
    delta = _delta(reply.delta, task.weights, context)
    counts, sums = _code_sums(reply.code_counts, reply.code_sums, len(task.codes), outcome, context)
    cleared = VqganUpdate(
        delta=delta,
        code_counts=counts,
        code_sums=sums,
        scans=_count(reply.scans, outcome.scans),
        losses=_metrics(reply.losses, context),
    )
    return Cleared(cleared, _size(delta, context, extra=counts.nbytes + sums.nbytes))


def _ode(outcome: Outcome, context: Context) -> Cleared:
    reply, task = _pair(outcome, context, OdeUpdate)
    _require_round(outcome, context)
    delta = _delta(reply.delta, task.weights, context)
    losses = _metrics(reply.losses, context)
    cleared = OdeUpdate(delta=delta, patients=_count(reply.patients, outcome.patients), losses=losses)
    return Cleared(cleared, _size(delta, context))


def _codebook(outcome: Outcome, context: Context) -> Cleared:
    reply, task = _pair(outcome, context, CodebookSums, CodebookInitTask)
    _require_round(outcome, context)
    rows = len(reply.counts) if reply.counts.ndim == 1 else -1
    if not 0 < rows <= task.n_codes or reply.sums.ndim != 2 or reply.sums.shape[1] != task.code_dim:
        raise _refuse("codebook_stats", "counts or sums of another shape")
    counts, sums = _code_sums(reply.counts, reply.sums, rows, outcome, context)
    size = int(context.policy.egress.max_bytes_factor * (counts.nbytes + sums.nbytes)) + _JSON_ALLOWANCE
    return Cleared(CodebookSums(counts=counts, sums=sums), size)


def _card(outcome: Outcome, context: Context) -> Cleared:
    reply, _ = _pair(outcome, context, SiteCard)
    cell = context.policy.egress.min_cell
    unknown = [code for code in reply.refused if code not in CODES]
    if unknown or min([reply.patients, reply.scans, reply.train_scans, *reply.refused.values()]) < 0:
        raise _refuse("site_card", "a reason that is not a code, or a negative count")
    if reply.role != context.policy.role:
        raise _refuse("site_card", "another role than the policy's")
    cleared = SiteCard(
        role=reply.role,
        version=reply.version,
        code=reply.code,
        profile=reply.profile,
        device=reply.device,
        ode=reply.ode,
        patients=round_up(reply.patients, cell),
        scans=round_up(reply.scans, cell),
        train_scans=round_up(reply.train_scans, cell),
        refused={code: n // cell * cell for code, n in sorted(reply.refused.items()) if n >= cell},
    )
    return Cleared(cleared, _JSON_ALLOWANCE)


def _ack(outcome: Outcome, context: Context) -> Cleared:
    reply, _ = _pair(outcome, context, PlanAck)
    return Cleared(PlanAck(approved=bool(reply.approved)), _JSON_ALLOWANCE)


def _receipt(outcome: Outcome, context: Context) -> Cleared:
    """The hash must be one that the coordinator sent: a free field of 64 digits could carry anything."""
    reply, task = _pair(outcome, context, Receipt)
    if isinstance(task, CoxPeersTask) and reply.sha256 != peers_sha256(task.sites, task.public_keys):
        raise _refuse("receipt", "a sha256 that is not the list's")
    known = {EncodeTask: "tokenizer_sha256", CoxFutureTask: "tokenizer_sha256"}.get(type(task))
    if known is not None and reply.sha256 != getattr(task, known):
        raise _refuse("receipt", "a sha256 that is not the task's")
    if isinstance(task, ReleaseTask) and reply.sha256 != payload_sha256(task.weights):
        raise _refuse("receipt", "a sha256 that is not the release's")
    n_codes = context.plan.model.n_codes if context.plan is not None else 0
    if not 0 <= reply.code_usage <= n_codes or reply.scans < 0:
        raise _refuse("receipt", "a count out of range")
    scans = round_up(reply.scans, context.policy.egress.min_cell)
    return Cleared(Receipt(sha256=reply.sha256, scans=scans, code_usage=reply.code_usage), _JSON_ALLOWANCE)


def _summary(outcome: Outcome, context: Context) -> Cleared:
    """Rows of fewer than `min_cell` items are withheld; n, mean and spread are rounded, and the sums made from them.

    Rounding the sums themselves would drown a spread that is small beside its mean.
    """
    reply, _ = _pair(outcome, context, EvalSummary)
    rules = context.policy
    require_patients(outcome, rules.cohort.min_patients_per_summary)
    columns = (reply.n, reply.total, reply.total_sq)
    if any(column.shape != (len(reply.rows),) or not np.isfinite(column).all() for column in columns):
        raise _refuse("eval_summary", "columns of another length, or values that are not finite")
    cell, digits = rules.egress.min_cell, rules.egress.sig_digits
    rows, n, total, total_sq = [], [], [], []
    for i, row in enumerate(reply.rows):
        count = int(reply.n[i])
        if not allowed_row(row, rules.egress.metrics) or count < cell:
            continue
        rounded = max(cell, round(count / cell) * cell)
        mean, mean_sq = _rounded_moments(float(reply.total[i]) / count, float(reply.total_sq[i]) / count, digits)
        rows.append(row)
        n.append(rounded)
        total.append(rounded * mean)
        total_sq.append(rounded * mean_sq)
    cleared = EvalSummary(
        rows=tuple(rows),
        n=np.array(n, dtype=np.int64),
        total=np.array(total, dtype=np.float64),
        total_sq=np.array(total_sq, dtype=np.float64),
        patients=round_up(_count(reply.patients, outcome.patients), cell),
    )
    return Cleared(cleared, _JSON_ALLOWANCE + 128 * len(rows))


def _conformal(outcome: Outcome, context: Context) -> Cleared:
    """Counts over the plan's own bins; a horizon of fewer than `min_cell` patients leaves as zeros."""
    reply, _ = _pair(outcome, context, ConformalCounts, ConformalTask)
    rules = context.policy
    require_patients(outcome, rules.cohort.min_patients_per_summary)
    spec = context.plan.evaluation if context.plan is not None else EvaluationSpec()
    counts = reply.counts
    if counts.shape != counts_shape(spec) or counts.dtype != np.int64 or (counts < 0).any():
        raise _refuse("eval_summary", "counts of another shape or type, or below zero")
    patients = _count(reply.patients, outcome.patients)
    by_horizon = counts.sum(axis=2)
    if (by_horizon.sum(axis=1) != patients).any():
        raise _refuse("eval_summary", "counts that are not one a patient")
    kept = np.where((by_horizon >= rules.egress.min_cell)[:, :, None], counts, 0)
    cleared = ConformalCounts(counts=kept, patients=round_up(patients, rules.egress.min_cell))
    return Cleared(cleared, _JSON_ALLOWANCE + kept.nbytes)


def _rounded_moments(mean: float, mean_sq: float, digits: int) -> tuple[float, float]:
    spread = round_significant(math.sqrt(max(0.0, mean_sq - mean * mean)), digits)
    mean = round_significant(mean, digits)
    return mean, mean * mean + spread * spread


def _report(outcome: Outcome, context: Context) -> Cleared:
    reply, _ = _pair(outcome, context, Report)
    found = find_identifier(reply.report_json, context.identifiers())
    if found:
        raise Refused("E_IDENTIFIER", where="report", found=found)
    return Cleared(Report(report_json=reply.report_json), _REPORT_ALLOWANCE + _JSON_ALLOWANCE)


def _cox(outcome: Outcome, context: Context) -> Cleared:
    return Cleared(outcome.reply, check_cox(outcome.reply, context.task, context.plan) + _JSON_ALLOWANCE)


_RULES: dict[type[Reply], Callable[[Outcome, Context], Cleared]] = {
    VqganUpdate: _vqgan,
    OdeUpdate: _ode,
    CodebookSums: _codebook,
    SiteCard: _card,
    PlanAck: _ack,
    Receipt: _receipt,
    EvalSummary: _summary,
    ConformalCounts: _conformal,
    Report: _report,
    **dict.fromkeys((*COX_REPLIES.values(), RiskReply, MaskedReply, CoxKey), _cox),
}


def allowed_row(row: str, metrics: tuple[str, ...]) -> bool:
    """Whether a row is `row/mode/metric[/region[/horizon]]` in words of the evaluation, with an allowed metric."""
    parts = row.split("/", 3)
    if len(parts) < 3 or parts[0] not in EVAL_ROWS or parts[1] not in _EVAL_MODES or parts[2] not in metrics:
        return False
    return bool(_EVAL_PLACE.fullmatch(parts[3] if len(parts) == 4 else ""))


def find_identifier(text: str, identifiers: Iterable[str]) -> str:
    """What a key or text value of the JSON text holds: a path, a date, a patient; empty if none of them."""
    try:
        words = [word for word in _texts(json.loads(text)) if not _HASH.fullmatch(word)]
    except ValueError:
        return "text that is not JSON"
    if any(re.search(r"(?<![\w.<])(/[\w.+~-]+){2,}|[A-Za-z]:\\", word) for word in words):
        return "a path"
    if any(re.search(r"(?<!\d)(19|20)\d\d[-./]?[01]\d[-./]?[0-3]\d(?!\d)", word) for word in words):
        return "a date"
    known = {i for i in identifiers if i}
    # A short id, such as 12, is also a number: it counts only where it stands alone.
    long = sorted((re.escape(i) for i in known if len(i) >= _LONG_ID), key=len, reverse=True)
    inside = re.compile(rf"(?<![0-9A-Za-z])(?:{'|'.join(long)})(?![0-9A-Za-z])") if long else None
    if any(word in known or (inside is not None and inside.search(word)) for word in words):
        return "a patient"
    return ""


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _pair(outcome: Outcome, context: Context, reply: type[Any], task: type[Any] | None = None) -> tuple[Any, Any]:
    """The reply and its task, with exactly these types: a subclass could carry more fields than were declared."""
    if (
        type(outcome.reply) is not reply
        or context.task is None
        or (task is not None and type(context.task) is not task)
    ):
        raise _refuse("type", f"{type(outcome.reply).__name__} for {type(context.task).__name__}")
    return outcome.reply, context.task


def _require_round(outcome: Outcome, context: Context) -> None:
    cohort = context.policy.cohort
    require_patients(outcome, cohort.min_patients_per_round, cohort.min_scans_per_round)


def _delta(delta: Weights, weights: Weights, context: Context) -> dict[str, torch.Tensor]:
    difference = form_difference(delta, weights)
    if difference:
        raise _refuse("delta", f"tensor {difference[0]}: {difference[1]} for {difference[2]}")
    if first_nonfinite(delta):
        raise Refused("NONFINITE", where="delta")
    clipped = clip_relative(delta, weights, context.policy.egress.max_rel_update)
    return to_wire(clipped, wire_dtype(context.plan, context.policy))


def _code_sums(
    counts: np.ndarray, sums: np.ndarray, n_codes: int, outcome: Outcome, context: Context
) -> tuple[np.ndarray, np.ndarray]:
    """Counts (K,) and sums (K, c) with the codes of too few patients set to 0."""
    right = counts.shape == (n_codes,) and sums.ndim == 2 and len(sums) == n_codes
    if not right or counts.dtype != np.float64 or sums.dtype != np.float64:
        raise _refuse("codebook_stats", "counts or sums of another shape or type")
    if not (np.isfinite(counts).all() and np.isfinite(sums).all()):
        raise Refused("NONFINITE", where="codebook_stats")
    if (counts < 0).any():
        raise _refuse("codebook_stats", "a negative count")
    seen, least = outcome.code_patients, context.policy.egress.codebook_min_patients
    if seen is None or seen.shape != (n_codes,):
        raise _refuse("codebook_min_patients", "no count of patients per code")
    kept = seen >= least
    return np.where(kept, counts, 0.0), np.where(kept[:, None], sums, 0.0)


def _metrics(values: Mapping[str, float], context: Context) -> dict[str, float]:
    rules = context.policy.egress
    return {n: round_significant(float(values[n]), rules.sig_digits) for n in rules.metrics if n in values}


def _count(stated: int, counted: int) -> int:
    if stated != counted or stated < 0:
        raise _refuse("counts", "a reply that states another number than was counted")
    return stated


def _size(delta: Weights, context: Context, extra: int = 0) -> int:
    width = torch.empty(0, dtype=WIRE_DTYPES[wire_dtype(context.plan, context.policy)]).element_size()
    shared = sum(t.numel() for t in delta.values()) * width
    names = sum(len(name) + 96 for name in delta)  # safetensors' own header, one entry a tensor
    return int(context.policy.egress.max_bytes_factor * shared) + extra + names + _JSON_ALLOWANCE


def _refuse(rule: str, found: str) -> Refused:
    return Refused("E_EGRESS", where=rule, found=found)
