"""The messages between coordinator and site: flat, frozen, versioned. What is not declared here cannot cross.

A message type `<train|evaluate|query>.<action>` has one task class (down) and one reply class (up). A field is a
number, a word from a fixed list, a text of a declared form (`fourdvq.wire.forms`), an array, or a set of named tensors;
no form admits a patient id, a path or a date. Additive replies define `+`: the sum of the sites' messages is the
message of the union of their patients.

Axis letters: K codes, c code dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch

from fourdvq.survival.messages import MESSAGES as COX_MESSAGES
from fourdvq.survival.messages import RiskSums
from fourdvq.wire import PROTOCOL as PROTOCOL
from fourdvq.wire.forms import Code, Json, Nonce, RowName, RunId, Sha256, SiteName, Version
from fourdvq.wire.narrow import NARROW

Tensors = Mapping[str, torch.Tensor]
Model = Annotated[Tensors, NARROW]  # float32 weights, sent in 16 bits where nothing is lost by it
Role = Literal["train", "external"]
Cohort = Literal["train", "test"]


@dataclass(frozen=True)
class TaskEnvelope:
    """What every task carries. `parent` is the payload sha256 of the weights it starts from, empty without weights."""

    protocol: int
    run: RunId
    round: int  # counted over the whole run
    task_id: Nonce
    plan: Sha256
    parent: Sha256
    profile: Sha256
    code: Sha256  # of the coordinator's library: which package made the task


@dataclass(frozen=True)
class ReplyEnvelope:
    """What every reply carries. `audit_head` hashes the site's last audit line; `eps_after` is its spent privacy."""

    protocol: int
    run: RunId
    round: int
    task_id: Nonce
    plan: Sha256
    parent: Sha256
    site: SiteName
    payload_sha256: Sha256
    audit_head: Sha256
    eps_after: float


class Task:
    """Base of all task bodies. `kind` is the Flower message type."""

    kind: ClassVar[str]
    trains: ClassVar[bool] = False  # refused by sites of role `external`


class Reply:
    """Base of all reply bodies. `egress` is the kind of data that leaves, as the site's policy names it."""

    egress: ClassVar[str]


@dataclass(frozen=True)
class Refusal(Reply):
    """The only thing that a site says about a failure."""

    egress: ClassVar[str] = "refusal"
    code: Code


@dataclass(frozen=True)
class Receipt(Reply):
    """Done. `sha256` is of what was received or stored; counts are rounded by the guard."""

    egress: ClassVar[str] = "receipt"
    sha256: Sha256
    scans: int = 0
    code_usage: int = 0  # number of codes in use at the site


# --- joining -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HelloTask(Task):
    kind: ClassVar[str] = "query.hello"


@dataclass(frozen=True)
class SiteCard(Reply):
    """Who answers. Counts are rounded to the policy's `min_cell` before they leave."""

    egress: ClassVar[str] = "site_card"
    role: Role
    version: Version
    code: Sha256
    profile: Sha256
    device: Literal["cpu", "cuda"]
    ode: bool  # has patients with two or more scans
    patients: int
    scans: int
    train_scans: int
    refused: Mapping[str, int] = field(default_factory=dict)  # scans per reason code


@dataclass(frozen=True)
class PlanTask(Task):
    kind: ClassVar[str] = "query.plan"
    plan_json: Json
    profile_json: Json


@dataclass(frozen=True)
class PlanAck(Reply):
    egress: ClassVar[str] = "plan_ack"
    approved: bool


# --- stage 1 -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodebookInitTask(Task):
    kind: ClassVar[str] = "query.codebook_init"
    trains: ClassVar[bool] = True
    seed: int
    n_codes: int
    code_dim: int
    weights: Model  # of the untrained generator: all sites look through the same encoder


@dataclass(frozen=True)
class CodebookSums(Reply):
    """Per centroid the number of encoder vectors (K,) and their sum (K, c), float64. A list, not additive by index."""

    egress: ClassVar[str] = "codebook_stats"
    counts: np.ndarray
    sums: np.ndarray


@dataclass(frozen=True)
class VqganTask(Task):
    """One round of stage 1: `steps` optimiser steps from `weights`, with `codes` fixed during the round."""

    kind: ClassVar[str] = "train.vqgan"
    trains: ClassVar[bool] = True
    steps: int
    global_step: int
    discriminator: bool
    weights: Model
    codes: np.ndarray  # (K, c) float32
    code_counts: np.ndarray  # (K,) float64
    code_sums: np.ndarray  # (K, c) float64


@dataclass(frozen=True)
class VqganUpdate(Reply):
    """Weight delta, and the decayed counts (K,) and sums (K, c) of the encoder vectors per code over the round."""

    egress: ClassVar[str] = "delta"
    delta: Tensors
    code_counts: np.ndarray
    code_sums: np.ndarray
    scans: int
    losses: Mapping[str, float]

    def __add__(self, other: VqganUpdate) -> VqganUpdate:
        return VqganUpdate(
            delta=_mean_tensors(self.delta, self.scans, other.delta, other.scans),
            code_counts=self.code_counts + other.code_counts,
            code_sums=self.code_sums + other.code_sums,
            scans=self.scans + other.scans,
            losses=_mean_numbers(self.losses, self.scans, other.losses, other.scans),
        )


@dataclass(frozen=True)
class EncodeTask(Task):
    """Encode all approved scans with the frozen tokenizer and keep the codes."""

    kind: ClassVar[str] = "query.encode"
    tokenizer_sha256: Sha256
    weights: Model
    codes: np.ndarray
    code_counts: np.ndarray
    code_sums: np.ndarray


# --- stage 2 -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OdeTask(Task):
    kind: ClassVar[str] = "train.ode"
    trains: ClassVar[bool] = True
    steps: int
    tokenizer_sha256: Sha256
    weights: Model


@dataclass(frozen=True)
class OdeUpdate(Reply):
    egress: ClassVar[str] = "delta"
    delta: Tensors
    patients: int
    losses: Mapping[str, float]

    def __add__(self, other: OdeUpdate) -> OdeUpdate:
        return OdeUpdate(
            delta=_mean_tensors(self.delta, self.patients, other.delta, other.patients),
            patients=self.patients + other.patients,
            losses=_mean_numbers(self.losses, self.patients, other.losses, other.patients),
        )


# --- evaluation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReconstructionTask(Task):
    """Score reconstructions of the scans of one split with a candidate or released generator."""

    kind: ClassVar[str] = "evaluate.reconstruction"
    split: Literal["validation", "test"]
    model_sha256: Sha256
    weights: Model
    codes: np.ndarray
    code_counts: np.ndarray
    code_sums: np.ndarray


@dataclass(frozen=True)
class TrajectoryTask(Task):
    """Score generated future or in-between scans of test patients; `query.encode` delivered the frozen tokenizer."""

    kind: ClassVar[str] = "evaluate.trajectory"
    split: Literal["validation", "test"]
    mode: Literal["extrapolation", "interpolation"]
    model_sha256: Sha256
    tokenizer_sha256: Sha256
    weights: Model  # of the latent ODE


@dataclass(frozen=True)
class EvalSummary(Reply):
    """Per row its number of items, their sum and sum of squares: three arrays of the length of `rows`."""

    egress: ClassVar[str] = "eval_summary"
    rows: tuple[RowName, ...]
    n: np.ndarray  # (R,) int64
    total: np.ndarray  # (R,) float64
    total_sq: np.ndarray  # (R,) float64
    patients: int

    def __add__(self, other: EvalSummary) -> EvalSummary:
        rows = tuple(sorted(set(self.rows) | set(other.rows)))
        columns = {
            name: sum(_by_row(part, name, rows) for part in (self, other)) for name in ("n", "total", "total_sq")
        }
        return EvalSummary(rows=rows, **columns, patients=self.patients + other.patients)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ConformalTask(Task):
    """Count the errors of predicted numbers on the patients of one split over the plan's public bins."""

    kind: ClassVar[str] = "evaluate.conformal"
    split: Literal["validation", "test"]
    model_sha256: Sha256
    tokenizer_sha256: Sha256
    weights: Model  # of the latent ODE


@dataclass(frozen=True)
class ConformalCounts(Reply):
    """Patients per number (`fourdvq.evaluation.scalars.SCALARS`), horizon and bin of the error, int64."""

    egress: ClassVar[str] = "eval_summary"
    counts: np.ndarray  # (scalars, horizons + 1, bins + 1)
    patients: int

    def __add__(self, other: ConformalCounts) -> ConformalCounts:
        return ConformalCounts(self.counts + other.counts, self.patients + other.patients)


# --- survival ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoxTask(Task):
    """One step of a survival analysis; the concrete classes, one a message type, are in `COX_TASKS`.

    Fields: `analysis` counts the analyses of the run (a new one begins when a site is lost), `tokenizer_sha256` fixes
    what a code means, `request` is one of the requests of `fourdvq.survival.messages`.
    """

    analysis: int
    tokenizer_sha256: Sha256
    request: Any


@dataclass(frozen=True)
class CoxReply(Reply):
    """The site's sums for one step; the concrete classes are in `COX_REPLIES`. Additive where the sums are."""

    egress: ClassVar[str] = "cox_stats"
    sums: Any

    def __add__(self, other: Self) -> Self:
        return dataclasses.replace(self, sums=self.sums + other.sums)


@dataclass(frozen=True)
class CoxKeysTask(Task):
    """Before an analysis of several sites: make a key pair for it and send the public half."""

    kind: ClassVar[str] = "query.cox_keys"
    analysis: int
    tokenizer_sha256: Sha256


@dataclass(frozen=True)
class CoxKey(Reply):
    """A raw X25519 public key (32,) uint8, used for one analysis."""

    egress: ClassVar[str] = "cox_stats"
    public_key: np.ndarray


@dataclass(frozen=True)
class CoxPeersTask(Task):
    """The sites of an analysis in order of name and their public keys (S, 32) uint8: from now on answers are masked.

    The receipt repeats the list's sha256 (`fourdvq.wire.masked.peers_sha256`).
    """

    kind: ClassVar[str] = "query.cox_peers"
    analysis: int
    tokenizer_sha256: Sha256
    sites: tuple[SiteName, ...]
    public_keys: np.ndarray


@dataclass(frozen=True)
class CoxFutureTask(Task):
    """Generate the third scan of the test patients from their first two, and keep its code shares for the analysis."""

    kind: ClassVar[str] = "query.cox_future"
    tokenizer_sha256: Sha256
    weights: Model  # of the latent ODE


@dataclass(frozen=True)
class MaskedReply(Reply):
    """The sums of one step under masks. `hidden`: int64 modulo 2^64, by array name of the sums; they tell something
    only when the answers of all `parties` sites to the same step (`counter`) are added."""

    egress: ClassVar[str] = "cox_stats"
    counter: int
    parties: int
    hidden: Tensors


def _cox_task(action: str, request: type) -> type[CoxTask]:
    name = "".join(word.title() for word in action.split("_")) + "Task"
    space = {"kind": f"query.{action}", "trains": action not in EXTERNAL_COX, "__module__": __name__}
    return dataclasses.make_dataclass(name, [("request", request)], bases=(CoxTask,), frozen=True, namespace=space)


def _cox_reply(action: str, sums: type) -> type[CoxReply]:
    name = "".join(word.title() for word in action.split("_")) + "Reply"
    return dataclasses.make_dataclass(
        name, [("sums", sums)], bases=(CoxReply,), frozen=True, namespace={"__module__": __name__}
    )


# An external site sees frozen coefficients and returns pair counts, nothing else.
EXTERNAL_COX = frozenset({"cox_hello", "cox_scale", "cox_cindex", "cox_paired", "cox_result"})
COX_TASKS: dict[str, type[CoxTask]] = {f"query.{a}": _cox_task(a, request) for a, (request, _) in COX_MESSAGES.items()}
COX_REPLIES: dict[str, type[CoxReply]] = {f"query.{a}": _cox_reply(a, sums) for a, (_, sums) in COX_MESSAGES.items()}
RiskReply = _cox_reply("risk", RiskSums)  # to `query.cox_eval` where the baseline hazard is shared


# --- results to and from people ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportTask(Task):
    kind: ClassVar[str] = "query.report"


@dataclass(frozen=True)
class Report(Reply):
    """The share edition's facts that a person at the site looked at and submitted; empty object if there is none."""

    egress: ClassVar[str] = "report"
    report_json: Json


@dataclass(frozen=True)
class ReleaseTask(Task):
    """The released model: all weights (names prefixed `vqgan.`, `codebook.`, `ode.`) and its card."""

    kind: ClassVar[str] = "query.release"
    card_json: Json
    weights: Model


# Message type to what it asks and what may answer it (a Refusal always may). The order is that of an experiment.
_OTHER_TASKS: tuple[type[Task], ...] = (
    HelloTask,
    PlanTask,
    CodebookInitTask,
    VqganTask,
    EncodeTask,
    OdeTask,
    ReconstructionTask,
    TrajectoryTask,
    ConformalTask,
    ReportTask,
    ReleaseTask,
)
_COX_TASKS: tuple[type[Task], ...] = (CoxKeysTask, CoxPeersTask, CoxFutureTask, *COX_TASKS.values())
TASKS: dict[str, type[Task]] = {cls.kind: cls for cls in (*_OTHER_TASKS, *_COX_TASKS)}
REPLIES: dict[str, type[Reply]] = {
    "query.hello": SiteCard,
    "query.plan": PlanAck,
    "query.codebook_init": CodebookSums,
    "train.vqgan": VqganUpdate,
    "query.encode": Receipt,
    "train.ode": OdeUpdate,
    "evaluate.reconstruction": EvalSummary,
    "evaluate.trajectory": EvalSummary,
    "evaluate.conformal": ConformalCounts,
    "query.report": Report,
    "query.release": Receipt,
    "query.cox_keys": CoxKey,
    "query.cox_peers": Receipt,
    "query.cox_future": Receipt,
    **COX_REPLIES,
}
# Other answers that a message type may have; which one follows from the analysis, and no two have the same fields.
OTHER_REPLIES: dict[str, tuple[type[Reply], ...]] = {
    **{kind: (MaskedReply,) for kind in COX_REPLIES},
    "query.cox_eval": (RiskReply, MaskedReply),
}


def reply_types(kind: str) -> tuple[type[Reply], ...]:
    """What may answer a message type, beside a refusal."""
    return (REPLIES[kind], *OTHER_REPLIES.get(kind, ()))


def _mean_tensors(a: Tensors, wa: float, b: Tensors, wb: float) -> dict[str, torch.Tensor]:
    total = wa + wb
    return {k: ((a[k].double() * wa + b[k].double() * wb) / total).to(torch.float32) for k in a}


def _mean_numbers(a: Mapping[str, float], wa: float, b: Mapping[str, float], wb: float) -> dict[str, float]:
    return {k: (a[k] * wa + b[k] * wb) / (wa + wb) for k in a if k in b}


def _by_row(summary: EvalSummary, column: str, rows: tuple[str, ...]) -> np.ndarray:
    values = getattr(summary, column)
    place = {row: i for i, row in enumerate(summary.rows)}
    return np.array([values[place[row]] if row in place else 0 for row in rows], dtype=values.dtype)
