"""Small models and patients for the tests of stage 2, generation and evaluation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fourdvq.data.latents import LatentPatient
from fourdvq.models.latent_ode import LatentODE
from fourdvq.plan import ModelSpec, Plan, TemporalSpec
from fourdvq.training.latent_ode import OdeTrainer

GRID = (3, 4, 5)  # d h w
CODES, DIM = 8, 3  # K c


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
    return Plan(name="test", profile_sha256="", model=ModelSpec(n_codes=CODES, code_dim=DIM), temporal=spec)


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
            tokenizer,
        )
        for i in range(n)
    ]


def ode_trainer(seed: int = 0, **temporal: object) -> OdeTrainer:
    return OdeTrainer(ode_plan(**temporal), ode_codebook(), seed=seed)
