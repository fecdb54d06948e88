"""The training step of the published code's latent ODE, stated again to measure against: plain layers and dopri5.

A backward ConvGRU with hidden 16, two 1x1x1 convolutions, dynamics of stacked 3x3x3 convolutions with tanh, solved by
torchdiffeq's dopri5 for half-years up to six years (scaled to k/13), difference maps from neighbouring states and their
running sum on the first scan's codes. Loss 0.2 x reconstruction + differences at the observed times, AdamW. float32.
Facts: docs/reference/model.md. `width` and `layers` are those of the dynamics: published 8 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

HIDDEN = 16
TIMES = 13  # half-years from 0 to 6
RTOL, ATOL = 1e-3, 1e-4
GAIN = 2.0


def as_stiff_as_trained(dynamics: nn.Module) -> None:
    """Random weights with which an adaptive solver works as hard as on trained ones: its cost is what is compared.

    With a standard deviation of `GAIN` over the root of the fan-in, dopri5 takes 32 evaluations for six years of the
    three layers of 64. The dynamics that the forecast study trained on phantoms took 31 for 4.2 years
    (phantom_forecast.py, seed 0); torch's untrained layers take 14.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in dynamics.modules():
        if isinstance(layer, nn.Conv3d):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=GAIN / fan_in**0.5, generator=generator)


class UsualODE(nn.Module):
    """Codes at the 13 half-years from codes at some of them."""

    def __init__(self, code_dim: int, *, width: int, layers: int) -> None:
        super().__init__()
        self.gates = nn.Conv3d(code_dim + HIDDEN, 2 * HIDDEN, 3, padding=1)
        self.candidate = nn.Conv3d(code_dim + HIDDEN, HIDDEN, 3, padding=1)
        self.head = nn.Sequential(nn.Conv3d(HIDDEN, HIDDEN, 1), nn.ReLU(), nn.Conv3d(HIDDEN, HIDDEN, 1))
        sizes = [HIDDEN, *[width] * (layers - 1), HIDDEN]
        steps: list[nn.Module] = []
        for a, b in pairwise(sizes):
            steps += [nn.Conv3d(a, b, 3, padding=1), nn.Tanh()]
        self.dynamics = nn.Sequential(*steps[:-1])
        self.projector = nn.Conv3d(2 * HIDDEN, code_dim, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Codes z (T, c, d, h, w) of the scans -> (13, c, d, h, w)."""
        h = z.new_zeros(1, HIDDEN, *z.shape[2:])
        for x in z.flip(0):
            reset, update = torch.sigmoid(self.gates(torch.cat([x[None], h], 1))).chunk(2, 1)
            h = (1 - update) * h + update * torch.tanh(self.candidate(torch.cat([x[None], reset * h], 1)))
        times = torch.arange(TIMES) / TIMES
        states = odeint(lambda _, y: self.dynamics(y), self.head(h), times, method="dopri5", rtol=RTOL, atol=ATOL)[:, 0]
        before = torch.cat([states[:1], states[:-1]])
        maps = torch.cat([self.projector(torch.cat([a, b])[None]) for a, b in zip(states, before, strict=True)])
        return z[:1] + maps.cumsum(0)


def usual_step(
    code_dim: int, grid: tuple[int, int, int], at: Sequence[int], *, width: int, layers: int
) -> Callable[[], None]:
    """A closure that takes one optimiser step on one patient with scans at the half-years `at`."""
    torch.manual_seed(0)
    model = UsualODE(code_dim, width=width, layers=layers)
    as_stiff_as_trained(model.dynamics)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)
    z = torch.randn(len(at), code_dim, *grid)

    def step() -> None:
        optimiser.zero_grad()
        found = model(z)[list(at)]
        error = found - z
        (0.2 * error.square().mean() + (error[1:] - error[:-1]).square().mean()).backward()
        optimiser.step()

    return step
