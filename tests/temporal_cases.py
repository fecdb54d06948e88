"""Small models and patients for the tests of stage 2, generation and evaluation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fourdvq.data.latents import LatentPatient
from fourdvq.generation import WorldModel
from fourdvq.models.latent_ode import LatentODE
from fourdvq.models.vqgan import VQGAN3d, tokenizer_sha256
from fourdvq.plan import ModelSpec, OdeTraining, Plan, TemporalSpec
from fourdvq.training.latent_ode import OdeTrainer

GRID = (3, 4, 5)  # d h w
CODES, DIM = 8, 3  # K c
SIZE = (16, 16, 16)  # D H W


def small_ode(*, seed: int = 0, code_dim: int = 3, scale: float = 0.2, **spec: object) -> LatentODE:
    """A LatentODE whose every weight is random, so that it predicts a change (a fresh one predicts none)."""
    settings: dict[str, object] = {"hidden": 4, "dynamics_width": 6, **spec}
    model = LatentODE(TemporalSpec(**settings), code_dim)  # type: ignore[arg-type]
    randomise(model, seed=seed, scale=scale)
    return model.eval()


def randomise(model: nn.Module, *, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def patients(n: int, years: list[float], *, seed: int = 1, code_dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n, T, c, d, h, w), times (n, T) and all-true observed (n, T)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, len(years), code_dim, *GRID, generator=generator)
    return z, torch.tensor([years] * n), torch.ones(n, len(years), dtype=torch.bool)


def ode_plan(**temporal: object) -> Plan:
    spec = TemporalSpec(**{"hidden": 4, "dynamics_width": 4, **temporal})  # type: ignore[arg-type]
    model, training = ModelSpec(n_codes=CODES, code_dim=DIM), OdeTraining(precision="fp32")
    return Plan(name="test", profile_sha256="", model=model, temporal=spec, ode=training)


def ode_codebook() -> torch.Tensor:
    return torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(0))


def latent_cohort(n: int = 4, scans: int = 3, tokenizer: str = "t") -> list[LatentPatient]:
    rng = np.random.default_rng(0)
    lung = torch.zeros(GRID, dtype=torch.bool)
    lung[:, 1:3] = True
    return [
        LatentPatient(
            f"p{i}",
            torch.tensor(rng.integers(0, CODES, (scans, *GRID)), dtype=torch.uint8),
            lung,
            torch.tensor([0.0, 0.8, 2.1, 3.0][:scans], dtype=torch.float64),
            torch.tensor(rng.standard_normal((scans, DIM)), dtype=torch.float32),
            tokenizer,
        )
        for i in range(n)
    ]


def ode_trainer(seed: int = 0, **temporal: object) -> OdeTrainer:
    return OdeTrainer(ode_plan(**temporal), ode_codebook(), seed=seed)


def small_world(*, fresh: bool = False, seed: int = 0, **temporal: object) -> WorldModel:
    """A VQ-GAN with random codes and an ODE that moves (or, `fresh`, one that was never trained)."""
    torch.manual_seed(seed)
    model = ModelSpec(size=SIZE, base_width=4, n_codes=32, code_dim=4)
    vqgan = VQGAN3d(model).eval()
    spec = TemporalSpec(**{"hidden": 4, "dynamics_width": 6, **temporal})  # type: ignore[arg-type]
    ode = LatentODE(spec, model.code_dim)
    if not fresh:
        randomise(ode, seed=seed, scale=0.3)
    return WorldModel(vqgan, ode.eval(), tokenizer_sha256(vqgan))


def lung_box() -> Tensor:
    """A lung (D, H, W) whose voxels do not fill whole latent cells."""
    lung = torch.zeros(SIZE, dtype=torch.bool)
    lung[5:15, 4:13, 5:11] = True
    return lung


def scan_at(years: float, *, seed: int = 0, speed: float = 0.05) -> Tensor:
    """A world that is known at any time: x01 (D, H, W), changing linearly inside the lung, more at some voxels."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.3, 0.6, SIZE)
    rate = rng.normal(size=SIZE) * speed * lung_box().numpy()
    return torch.tensor(base + rate * years, dtype=torch.float32).clamp(0, 1)
