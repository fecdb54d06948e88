"""Sites in memory, for tests of the coordinator: real training on made-up scans, real messages, no files.

The edge is faked (who answers, when, and what is damaged on the way), never our own functions. A site keeps its
training state by the weights it was given, so that a question that is asked again gets the same answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message

from fourdvq.data.latents import LatentPatient
from fourdvq.errors import FourdvqError, wire_code
from fourdvq.evaluation.reconstruction import score_reconstruction
from fourdvq.federation.codebook import CodebookState
from fourdvq.models.vqgan import VQGAN3d, load_codebook, load_generator, tokenizer_sha256
from fourdvq.plan import Plan, plan_from
from fourdvq.tensors import payload_sha256
from fourdvq.training.codebook_init import kmeans_stats
from fourdvq.training.latent_ode import OdeTrainer
from fourdvq.training.update import to_wire
from fourdvq.training.vqgan import VqganTrainer, initial_model
from fourdvq.wire.body import body_sha256
from fourdvq.wire.flower import pack, unpack, unpack_envelope
from fourdvq.wire.messages import (
    PROTOCOL,
    TASKS,
    CodebookSums,
    EvalSummary,
    OdeUpdate,
    PlanAck,
    Receipt,
    Refusal,
    Reply,
    ReplyEnvelope,
    SiteCard,
    Task,
    TaskEnvelope,
    VqganUpdate,
)

TRAJECTORY_ROWS = ("model", "persistence", "persistence_decoded", "linear_latent", "noise_control", "ceiling")


class Scans:
    """Smooth random volumes (1, D, H, W) in [0, 1], two per patient."""

    def __init__(self, n: int, size: tuple[int, int, int], seed: int) -> None:
        coarse = torch.rand((n, 1, *(max(2, s // 8) for s in size)), generator=torch.Generator().manual_seed(seed))
        self.volumes = torch.nn.functional.interpolate(coarse, size=size, mode="trilinear")

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.volumes[i]

    def patient_of(self, i: int) -> str:
        return f"p{i // 2:02d}"


class MemorySite:
    """One site. `tamper[kind]` changes (envelope, body) before they leave; `before[kind]` runs before the work."""

    def __init__(self, name: str, *, role: str = "train", scans: int = 4, seed: int = 0, ode: bool = True) -> None:
        self.name, self.role, self.n_scans, self.seed, self.ode = name, role, scans, seed, ode
        self.approved = True
        self.profile = ""
        self.plan: Plan | None = None
        self.asked: list[str] = []
        self.tamper: dict[str, Callable[[ReplyEnvelope, Reply], tuple[ReplyEnvelope, Reply]]] = {}
        self.before: dict[str, Callable[[], None]] = {}
        self.states: dict[str, Any] = {}
        self.latest: dict[str, Any] = {}
        self.codes: CodebookState | None = None
        self.lines = 0
        self.lock = threading.Lock()

    def __call__(self, message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        self.asked.append(kind)
        if kind in self.before:
            self.before[kind]()
        task_envelope = unpack_envelope(message.content, TaskEnvelope)
        try:
            _, task = unpack(message.content, TaskEnvelope, TASKS[kind])
            body = self.answer(kind, task, task_envelope)
        except (FourdvqError, MemoryError) as error:
            body = Refusal(code=wire_code(error))
        self.lines += 1
        envelope = ReplyEnvelope(
            protocol=PROTOCOL,
            run=task_envelope.run,
            round=task_envelope.round,
            task_id=task_envelope.task_id,
            plan=task_envelope.plan,
            parent=task_envelope.parent,
            site=self.name,
            payload_sha256=body_sha256(body),
            audit_head=hashlib.sha256(f"{self.name} {self.lines}".encode()).hexdigest(),
            eps_after=0.0,
        )
        if kind in self.tamper:
            envelope, body = self.tamper[kind](envelope, body)
        return Message(pack(envelope, body), reply_to=message)

    def answer(self, kind: str, task: Any, envelope: TaskEnvelope) -> Reply:
        handlers: dict[str, Callable[[Any], Reply]] = {
            "query.hello": lambda _: self._card(envelope),
            "query.plan": self._plan,
            "query.codebook_init": self._codebook,
            "train.vqgan": self._vqgan,
            "query.encode": self._encode,
            "train.ode": self._ode,
            "evaluate.reconstruction": self._reconstruction,
            "evaluate.trajectory": self._trajectory,
            "query.release": lambda t: Receipt(sha256=payload_sha256(t.weights)),
        }
        return handlers[kind](task)

    def scans(self, offset: int = 0) -> Scans:
        assert self.plan is not None
        return Scans(self.n_scans, self.plan.model.size, self.seed * 100 + offset)

    def _card(self, envelope: TaskEnvelope) -> SiteCard:
        return SiteCard(
            role=self.role,  # type: ignore[arg-type]
            version="0.1.0",
            code="",
            profile=self.profile or envelope.profile,
            device="cpu",
            ode=self.ode,
            patients=self.n_scans // 2,
            scans=self.n_scans,
            train_scans=self.n_scans,
        )

    def _plan(self, task: Any) -> Reply:
        self.plan = plan_from(json.loads(task.plan_json))
        return PlanAck(approved=self.approved)

    def _codebook(self, task: Any) -> Reply:
        assert self.plan is not None
        stats = kmeans_stats(
            initial_model(self.plan), self.scans(), n_codes=task.n_codes, seed=task.seed, min_vectors=1
        )
        return CodebookSums(counts=stats.counts.numpy(), sums=stats.sums.numpy())

    def _again(self, stage: str, parent: str, trainer: Any) -> None:
        """Restore what the trainer was when it first met this parent, or what it was last."""
        known = self.states.get(f"{stage}/{parent}") or self.latest.get(stage)
        if known is not None:
            trainer.restore(known)
        self.states[f"{stage}/{parent}"] = trainer.state()

    def _vqgan(self, task: Any) -> Reply:
        assert self.plan is not None
        plan = self.plan
        trainer = VqganTrainer(plan, seed=self.seed)
        self._again("vqgan", payload_sha256(task.weights), trainer)
        trainer.load_global(task.weights, _codebook(task))
        done = trainer.train(
            self.scans(),
            steps=task.steps,
            global_step=task.global_step,
            decay_per_round=plan.federation.codebook_round_decay,
        )
        self.latest["vqgan"] = trainer.state()
        return VqganUpdate(
            delta=to_wire(done.delta, plan.federation.wire_dtype),
            code_counts=done.stats.counts.numpy(),
            code_sums=done.stats.sums.numpy(),
            scans=done.scans_used,
            losses=done.losses,
        )

    def _model(self, task: Any) -> VQGAN3d:
        assert self.plan is not None
        model = initial_model(self.plan)
        load_generator(model, task.weights)
        load_codebook(model, _codebook(task))
        return model.eval()

    def _encode(self, task: Any) -> Reply:
        model = self._model(task)
        assert tokenizer_sha256(model) == task.tokenizer_sha256
        with torch.no_grad():
            volumes = self.scans().volumes
            indices = torch.cat([model.quantise(model.encode(v[None] - 0.5)).indices for v in volumes])
        self.latest["codes"] = (task.tokenizer_sha256, model.codebook.codes.clone(), indices.to(torch.uint8))
        return Receipt(sha256=task.tokenizer_sha256, scans=self.n_scans, code_usage=int(indices.unique().numel()))

    def _ode(self, task: Any) -> Reply:
        assert self.plan is not None
        plan = self.plan
        tokenizer, codes, indices = self.latest["codes"]
        lung = torch.ones(indices.shape[1:], dtype=torch.bool)
        patients = [
            LatentPatient(
                pseudonym=f"p{i:02d}",
                indices=indices[2 * i : 2 * i + 2],
                lung=lung,
                years=np.array([0.0, 1.0]),
                means=torch.zeros(2, codes.shape[1]),
                tokenizer_sha256=tokenizer,
            )
            for i in range(self.n_scans // 2)
        ]
        trainer = OdeTrainer(plan, codes, seed=self.seed, tokenizer_sha256=tokenizer)
        self._again("ode", payload_sha256(task.weights), trainer)
        trainer.load_global(task.weights)
        done = trainer.train(patients, steps=task.steps)
        self.latest["ode"] = trainer.state()
        return OdeUpdate(
            delta=to_wire(done.delta, plan.federation.wire_dtype), patients=done.patients_used, losses=done.losses
        )

    def _reconstruction(self, task: Any) -> Reply:
        sums = score_reconstruction(self._model(task), self.scans(offset=1))
        return _summary([(s.key, s.n, s.total, s.total_sq) for s in sums], self.n_scans)

    def _trajectory(self, task: Any) -> Reply:
        n = self.n_scans // 2
        values = {row: np.random.default_rng([self.seed, i]).random(n) for i, row in enumerate(TRAJECTORY_ROWS)}
        rows = [(f"{row}/{task.mode}/mse/lung", n, float(v.sum()), float((v**2).sum())) for row, v in values.items()]
        return _summary(rows, n)


def retouch(**changes: Any) -> Callable[[ReplyEnvelope, Reply], tuple[ReplyEnvelope, Reply]]:
    """A tamper that changes fields of the body and hashes it anew, as a hostile or broken site would."""

    def change(envelope: ReplyEnvelope, body: Reply) -> tuple[ReplyEnvelope, Reply]:
        altered = dataclasses.replace(body, **{n: f(getattr(body, n)) for n, f in changes.items()})  # type: ignore[type-var]
        return dataclasses.replace(envelope, payload_sha256=body_sha256(altered)), altered

    return change


def relabel(**changes: Any) -> Callable[[ReplyEnvelope, Reply], tuple[ReplyEnvelope, Reply]]:
    """A tamper that changes fields of the envelope alone."""
    return lambda envelope, body: (dataclasses.replace(envelope, **changes), body)


def task_of(kind: str) -> type[Task]:
    return TASKS[kind]


def _codebook(task: Any) -> CodebookState:
    return CodebookState(*(torch.from_numpy(a) for a in (task.codes, task.code_counts, task.code_sums)))


def _summary(rows: list[tuple[str, int, float, float]], patients: int) -> EvalSummary:
    return EvalSummary(
        rows=tuple(r[0] for r in rows),
        n=np.array([r[1] for r in rows], dtype=np.int64),
        total=np.array([r[2] for r in rows]),
        total_sq=np.array([r[3] for r in rows]),
        patients=patients,
    )
