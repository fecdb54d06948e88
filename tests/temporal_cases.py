"""Small models and patients for the tests of stage 2, generation and evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourdvq.models.latent_ode import LatentODE
from fourdvq.plan import TemporalSpec

GRID = (3, 4, 5)  # d h w


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
