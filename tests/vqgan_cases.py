"""Small plans and smooth synthetic scans for the tests of stage 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fourdvq.federation.codebook import CodebookState, initial_codebook
from fourdvq.plan import FederationSpec, GanSpec, ModelSpec, Plan, VqganTraining
from fourdvq.training.codebook_init import kmeans_stats
from fourdvq.training.vqgan import VqganTrainer, initial_model

SIZE = (16, 32, 32)
TINY = ModelSpec(size=SIZE, base_width=4, n_codes=16, code_dim=4)
NO_GAN = GanSpec(loss="none")
SMALL_GAN = GanSpec(start_step=0, width=8, layers=2)


class Scans:
    """Smooth volumes in [0, 1]; two scans a patient."""

    def __init__(self, n: int, *, seed: int = 0, size: tuple[int, int, int] = SIZE):
        self.volumes = [smooth_volume(1000 * seed + i, size) for i in range(n)]

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> Tensor:
        return self.volumes[index]

    def patient_of(self, index: int) -> str:
        return f"patient-{index // 2}"


def smooth_volume(seed: int, size: tuple[int, int, int] = SIZE) -> Tensor:
    """(1, D, H, W) float32 in [0, 1]: coarse noise, trilinearly enlarged."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 4, 6, 6, generator=generator)
    return F.interpolate(coarse, size=size, mode="trilinear", align_corners=True)[0]


def tiny_plan(*, model: dict[str, Any] | None = None, gan: GanSpec = NO_GAN, **training: Any) -> Plan:
    """A plan of TINY size in float32 without discriminators, one scan per step."""
    federation = FederationSpec(**training.pop("federation", {}))
    settings: dict[str, Any] = {"accumulate": 1, "lr": 1e-3, "precision": "fp32"} | training
    return Plan(
        name="tiny",
        profile_sha256="0" * 64,
        seed=3,
        model=replace(TINY, **(model or {})),
        gan=gan,
        vqgan=VqganTraining(**settings),
        federation=federation,
    )


def first_codebook(plan: Plan, *sites: Scans) -> CodebookState:
    """The codebook that the sites would start from."""
    model = initial_model(plan)
    n = plan.model.n_codes
    return initial_codebook(
        [kmeans_stats(model, scans, n_codes=n, seed=i, min_vectors=1) for i, scans in enumerate(sites)],
        n_codes=n,
        seed=plan.seed,
    )


def ready_trainer(plan: Plan, scans: Scans, *, seed: int = 0) -> VqganTrainer:
    """A federated trainer that holds the global weights and a codebook made from `scans`."""
    trainer = VqganTrainer(plan, seed=seed)
    trainer.load_global(trainer.weights(), first_codebook(plan, scans))
    return trainer
