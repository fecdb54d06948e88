"""The site's workbench: one method per task that opens scans. Models and scans stay warm between rounds.

Reads prep/ and writes runs/<run>/ and latents/. Everything it returns still has to pass the guard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourdvq.data.datasets import (
    PreparedCohort,
    ScanDataset,
    load_lung,
    open_prepared,
)
from fourdvq.data.latents import LatentPatient
from fourdvq.errors import ModelError, explain
from fourdvq.evaluation.reconstruction import score_reconstruction
from fourdvq.evaluation.rows import population_rate
from fourdvq.evaluation.scalars import scalar_counts, scalar_errors
from fourdvq.evaluation.summary import RowSums
from fourdvq.evaluation.trajectory import LongitudinalPatient, longitudinal, score_trajectories
from fourdvq.federation.codebook import CodebookState
from fourdvq.generation import WorldModel
from fourdvq.models.latent_ode import LatentODE
from fourdvq.models.vqgan import VQGAN3d, load_codebook, load_generator, tokenizer_sha256
from fourdvq.plan import Plan
from fourdvq.tensors import Weights, payload_sha256
from fourdvq.training.checkpoint import TrainState, load_state, save_state
from fourdvq.training.codebook_init import MAX_SCANS, kmeans_stats
from fourdvq.training.distributed import ALONE, Ranks
from fourdvq.training.hardware import DEFAULT, Hardware
from fourdvq.training.latent_ode import OdeTrainer
from fourdvq.training.precision import self_check
from fourdvq.training.seeds import generator
from fourdvq.training.vqgan import DISCRIMINATOR_PREFIX, VqganTrainer, initial_model
from fourdvq.wire.messages import (
    CodebookInitTask,
    CodebookSums,
    ConformalCounts,
    ConformalTask,
    EncodeTask,
    EvalSummary,
    OdeTask,
    OdeUpdate,
    Receipt,
    ReconstructionTask,
    TrajectoryTask,
    VqganTask,
    VqganUpdate,
)
from fourdvq_client.code_census import SomeScans, census_of_centroids
from fourdvq_client.diary import Diary
from fourdvq_client.egress import Outcome
from fourdvq_client.latent_cache import LatentCache, encode_patient
from fourdvq_client.local_scores import keep_part
from fourdvq_client.round_states import RoundStates
from fourdvq_client.site_log import site_logger
from fourdvq_client.worker import Job
from fourdvq_client.workspace import Workspace

PERCEPTUAL_FILE = "perceptual.safetensors"


@dataclass
class _Warm:
    """A trainer in memory and the name of the saved state that it is in."""

    key: tuple[str, str, str]  # run, plan, stage
    state: str
    trainer: Any


class Bench:
    """All work on the site's scans, in the process that calls it."""

    def __init__(self, workspace: Workspace, device: str, hardware: Hardware = DEFAULT, ranks: Ranks = ALONE) -> None:
        self._workspace = workspace
        self._device = torch.device(device)
        self._hardware = hardware
        self._ranks = ranks
        self._warm: _Warm | None = None
        self._datasets: dict[tuple[str, tuple[str, ...], tuple[float, float]], ScanDataset] = {}

    def close(self) -> None:
        """Drop what is warm."""
        self._warm = None
        self._datasets = {}

    def train_vqgan(self, job: Job) -> Outcome:
        """One round of stage 1: load the global model, train, keep the state, hand back what changed."""
        task = _task_of(job, VqganTask)
        writes = self._ranks.rank == 0  # of several processes one keeps the books
        diary = self._diary(job) if writes else None
        trainer = self._trainer(job, "vqgan")
        trainer.load_global(task.weights, _codebook(task))
        with self._dropping_on_failure():
            done = trainer.train(
                self._scans(job.plan, "train"),
                steps=task.steps,
                global_step=task.global_step,
                decay_per_round=job.plan.federation.codebook_round_decay,
                on_step=diary.step_reporter("vqgan", task.global_step, task.steps) if diary else None,
            )
        if diary:
            self._keep(job, "vqgan", trainer)
            self._warn(done.notes)
            diary.round_done("vqgan", patients=done.patients_used, scans=done.scans_used, losses=done.losses)
        else:
            self.drop_warm()  # the next round starts from what the first process wrote
        update = VqganUpdate(
            delta=done.delta,
            code_counts=done.stats.counts.numpy(),
            code_sums=done.stats.sums.numpy(),
            scans=done.scans_used,
            losses=done.losses,
        )
        return Outcome(update, done.patients_used, done.scans_used, done.code_patients.numpy())

    def codebook_init(self, job: Job) -> Outcome:
        """k-means over the untrained encoder's outputs; at most so many scans as the library looks at."""
        task = _task_of(job, CodebookInitTask)
        model = initial_model(job.plan).to(self._device).eval()
        load_generator(model, _generator(task.weights))
        scans = self._scans(job.plan, "train")
        order = torch.randperm(len(scans), generator=generator(task.seed, "codebook_init_scans"))
        chosen = SomeScans(scans, order[:MAX_SCANS].tolist())
        stats = kmeans_stats(model, chosen, n_codes=task.n_codes, seed=task.seed)
        patients = {chosen.patient_of(i) for i in range(len(chosen))}
        sums = CodebookSums(counts=stats.counts.numpy(), sums=stats.sums.numpy())
        return Outcome(sums, len(patients), len(chosen), census_of_centroids(model, chosen, stats))

    def encode(self, job: Job) -> Outcome:
        """Codes of all approved scans under the frozen tokenizer, kept in latents/; the run keeps the tokenizer."""
        task = _task_of(job, EncodeTask)
        model = self._vqgan(job.plan, task.weights, _codebook(task))
        found = tokenizer_sha256(model)
        if found != task.tokenizer_sha256:
            raise ModelError("E_TOKENIZER", where="query.encode", found=found[:12], wanted=task.tokenizer_sha256[:12])
        cohort = self._cohort()
        cache = LatentCache(self._workspace.latents / found)
        used: set[int] = set()
        for patient in cohort.patients:
            latents = cache.get(patient) or cache.put(patient, encode_patient(model, patient, job.plan, found))
            used.update(torch.unique(latents.indices).tolist())
        codes = {f"codebook.{n}": t for n, t in vars(_codebook(task)).items()}
        tensors = {f"vqgan.{n}": t for n, t in _generator(task.weights).items()} | codes
        save_state(self._frozen(job), TrainState(tensors, {"tokenizer_sha256": found}))
        scans = sum(len(p.scans) for p in cohort.patients)
        return Outcome(Receipt(sha256=found, scans=scans, code_usage=len(used)), len(cohort.patients), scans)

    def train_ode(self, job: Job) -> Outcome:
        """One round of stage 2 on the cached codes of the training patients."""
        task = _task_of(job, OdeTask)
        diary = self._diary(job)
        patients = self._latents(task.tokenizer_sha256, "train")
        trainer = self._trainer(job, "ode", task.tokenizer_sha256)
        trainer.load_global(task.weights)
        with self._dropping_on_failure():
            done = trainer.train(patients, steps=task.steps, on_step=diary.step_reporter("ode", 0, task.steps))
        self._keep(job, "ode", trainer)
        scans = 2 * done.patients_used  # each has two scans or more; how many exactly the trainer does not say
        diary.round_done("ode", patients=done.patients_used, scans=scans, losses=done.losses)
        return Outcome(OdeUpdate(done.delta, done.patients_used, done.losses), done.patients_used, scans)

    def evaluate_reconstruction(self, job: Job) -> Outcome:
        """Scores of a candidate generator on the scans of one split."""
        task = _task_of(job, ReconstructionTask)
        codes = torch.from_numpy(task.codes)
        _same_model({**_generator(task.weights), "codebook.codes": codes}, task.model_sha256)
        model = self._vqgan(job.plan, task.weights, _codebook(task))
        scans = self._cohort().scans(task.split)
        data = self._scans(job.plan, task.split)
        sums = score_reconstruction(model, data, lung_of=lambda i: load_lung(scans[i]), window_hu=job.plan.window_hu)
        self._keep_scores(job, "reconstruction", task, sums)
        return _summary(sums, len({s.pseudonym for s in scans}), len(scans))

    def evaluate_trajectory(self, job: Job) -> Outcome:
        """Scores of generated scans of the patients of one split, with all control rows."""
        task = _task_of(job, TrajectoryTask)
        world, patients = self._held_out(job, task)
        cache = LatentCache(self._workspace.latents / task.tokenizer_sha256)
        # A patient who was approved after the codes were made is no reason to fail: the row is a mean of the others.
        known = [latents for p in self._cohort().of("train") if (latents := cache.get(p)) is not None]
        rate = population_rate(known, world.vqgan.codebook.codes.cpu())
        sums = score_trajectories(world, patients, job.plan, modes=[task.mode], population_rate=rate)
        self._keep_scores(job, task.mode, task, sums)
        scored = max((s.n for s in sums if s.row == "cohort"), default=0)
        return _summary(sums, scored, scored)

    def evaluate_conformal(self, job: Job) -> Outcome:
        """Counts of the errors of predicted numbers on the patients of one split."""
        task = _task_of(job, ConformalTask)
        world, patients = self._held_out(job, task)
        errors = scalar_errors(world, patients, job.plan)
        counts = scalar_counts(errors, job.plan.evaluation)
        return Outcome(ConformalCounts(counts=counts, patients=len(errors)), len(errors), len(errors))

    # --- what the methods share --------------------------------------------------------------------------------

    def _held_out(self, job: Job, task: TrajectoryTask | ConformalTask) -> tuple[WorldModel, list[LongitudinalPatient]]:
        """The task's model with the run's frozen tokenizer, and the patients of the task's split."""
        _same_model(task.weights, task.model_sha256)
        vqgan, _, found = self._frozen_model(job)
        if found != task.tokenizer_sha256:
            raise ModelError("E_TOKENIZER", where="frozen model", found=found[:12], wanted=task.tokenizer_sha256[:12])
        ode = LatentODE(job.plan.temporal, job.plan.model.code_dim)
        ode.load_state_dict(dict(task.weights))
        world = WorldModel(vqgan, ode.to(self._device).eval(), found)
        return world, [longitudinal(p, job.plan.window_hu) for p in self._cohort().of(task.split)]

    def _keep_scores(
        self, job: Job, mode: str, task: ReconstructionTask | TrajectoryTask, sums: Sequence[RowSums]
    ) -> None:
        if task.split == "test":
            keep_part(self._workspace, job.envelope.run, mode, task.model_sha256, sums)

    def _diary(self, job: Job) -> Diary:
        return Diary(self._workspace, job.envelope, job.plan)

    def _cohort(self) -> PreparedCohort:
        return open_prepared(self._workspace.prep)

    def _scans(self, plan: Plan, *splits: str) -> ScanDataset:
        """The scans of the splits, kept in memory after the first read as long as the cohort stays the same."""
        cohort = self._cohort()
        key = (cohort.cohort_sha256, splits, plan.window_hu)
        if key not in self._datasets:
            self._datasets = {k: v for k, v in self._datasets.items() if k[0] == cohort.cohort_sha256}
            self._datasets[key] = ScanDataset(cohort.scans(*splits), plan.window_hu)
        return self._datasets[key]

    def _trainer(self, job: Job, stage: str, tokenizer: str = "") -> Any:
        """The stage's trainer in the state from which this round starts."""
        name, state = self._states(job, stage).start_of(job.envelope.parent)
        key = (job.envelope.run, job.plan.hash, stage)
        if self._warm is not None and self._warm.key == key and self._warm.state == name and name:
            return self._warm.trainer
        self._warm = None
        trainer = self._new_ode(job, tokenizer) if stage == "ode" else self._new_vqgan(job)
        if state is not None:
            trainer.restore(state)
        self._warm = _Warm(key, name, trainer)
        return trainer

    def _new_vqgan(self, job: Job) -> VqganTrainer:
        if job.plan.vqgan.precision == "bf16" and not (found := self_check(str(self._device))).sound:
            self._warn(("W_BF16",), str(found))
        perceptual = self._workspace.models / PERCEPTUAL_FILE
        return VqganTrainer(
            job.plan,
            device=self._device,
            seed=job.seed,
            perceptual_file=perceptual if perceptual.is_file() else None,
            hardware=self._hardware,
            ranks=self._ranks,
        )

    def _warn(self, codes: Sequence[str], found: str = "") -> None:
        """Put warnings into the site's log, each by its code."""
        for code in codes:
            text = f"{code}: {explain(code).title}"
            site_logger(self._workspace).warning("%s; found %s" if found else "%s%s", text, found)

    def _new_ode(self, job: Job, tokenizer: str) -> OdeTrainer:
        _, codes, found = self._frozen_model(job)
        if found != tokenizer:
            raise ModelError("E_TOKENIZER", where="frozen model", found=found[:12], wanted=tokenizer[:12])
        return OdeTrainer(job.plan, codes, device=str(self._device), seed=job.seed, tokenizer_sha256=tokenizer)

    def _keep(self, job: Job, stage: str, trainer: Any) -> None:
        """Write the state after the round before anything is told to anybody."""
        name = self._states(job, stage).save(job.envelope.round, job.envelope.parent, trainer.state())
        self._warm = _Warm((job.envelope.run, job.plan.hash, stage), name, trainer)

    def _dropping_on_failure(self) -> _Dropping:
        return _Dropping(self)

    def drop_warm(self) -> None:
        """Forget the trainer in memory: after a failure its state is not the one on disk."""
        self._warm = None

    def _states(self, job: Job, stage: str) -> RoundStates:
        return RoundStates(self._workspace.runs / job.envelope.run / "checkpoints" / stage)

    def _frozen(self, job: Job) -> Any:
        return self._workspace.runs / job.envelope.run / "frozen"

    def _frozen_model(self, job: Job) -> tuple[VQGAN3d, Tensor, str]:
        """Generator with codebook, codes (K, c), and the tokenizer's name, as `query.encode` brought them."""
        state = load_state(self._frozen(job))
        part = {n.removeprefix("codebook."): t for n, t in state.tensors.items() if n.startswith("codebook.")}
        weights = {n.removeprefix("vqgan."): t for n, t in state.tensors.items() if n.startswith("vqgan.")}
        model = self._vqgan(job.plan, weights, CodebookState(part["codes"], part["counts"], part["sums"]))
        return model, part["codes"], str(state.meta["tokenizer_sha256"])

    def _vqgan(self, plan: Plan, weights: Weights, codebook: CodebookState) -> VQGAN3d:
        model = initial_model(plan)
        load_generator(model, _generator(weights))
        load_codebook(model, codebook)
        return model.to(self._device).eval()

    def _latents(self, tokenizer: str, split: str) -> Sequence[LatentPatient]:
        cache = LatentCache(self._workspace.latents / tokenizer)
        return [cache.need(p) for p in self._cohort().of(split) if len(p.scans) > 1]


class _Dropping:
    """Forgets the warm trainer if the block fails."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._bench.drop_warm()


def _task_of(job: Job, kind: type[Any]) -> Any:
    if type(job.task) is not kind:
        raise TypeError(f"{type(job.task).__name__} given to the job of {kind.__name__}")
    return job.task


def _generator(weights: Weights) -> dict[str, Tensor]:
    return {n: t for n, t in weights.items() if not n.startswith(DISCRIMINATOR_PREFIX)}


def _codebook(task: Any) -> CodebookState:
    # Copies: the message's own arrays may be read-only views of its bytes.
    return CodebookState(*(torch.tensor(np.array(a)) for a in (task.codes, task.code_counts, task.code_sums)))


def _same_model(tensors: Mapping[str, Tensor], wanted: str) -> None:
    if payload_sha256(tensors) != wanted:
        raise ModelError("E_WEIGHTS", where="model_sha256", found="a model of another sha256")


def _summary(sums: Sequence[RowSums], patients: int, scans: int) -> Outcome:
    summary = EvalSummary(
        rows=tuple(s.key for s in sums),
        n=np.array([s.n for s in sums], dtype=np.int64),
        total=np.array([s.total for s in sums], dtype=np.float64),
        total_sq=np.array([s.total_sq for s in sums], dtype=np.float64),
        patients=patients,
    )
    return Outcome(summary, patients, scans)
