"""The latent ODE against closed forms, a second solver and numerical derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from fourdvq.models.latent_ode import Dynamics, LatentODE
from fourdvq.plan import TemporalSpec
from temporal_cases import GRID, patients, randomise, small_ode


def linear_model(matrix: np.ndarray, *, solver: str = "rk4", max_step: float = 0.5) -> LatentODE:
    """dh/dtau = A h at every grid point: one convolution layer whose centre tap is A."""
    spec = TemporalSpec(
        hidden=len(matrix), dynamics_layers=1, solver=solver, max_step_years=max_step, rtol=1e-8, atol=1e-8
    )
    model = LatentODE(spec, 3).double()
    with torch.no_grad():
        model.dynamics.convs[0].weight[:, :, 1, 1, 1] = torch.tensor(matrix)
    return model


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_linear_dynamics_follow_the_matrix_exponential(solver):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(4, 4))
    model = linear_model(matrix, solver=solver)
    h = torch.tensor(rng.normal(size=(1, 4, *GRID)))
    years = [0.0, 0.3, 1.0, 2.7, 6.0]
    states = model.solve(h, torch.zeros(1).double(), torch.tensor([years]).double())[0]
    for s, state in zip(years, states, strict=True):
        exact = np.einsum("ij,jdhw->idhw", expm(matrix * s / 6.0), h[0].numpy())
        np.testing.assert_allclose(state.detach().numpy(), exact, atol=2e-5 * np.abs(exact).max())


def test_halving_the_rk4_step_divides_the_error_by_sixteen():
    matrix = 3 * np.array([[0.0, -2.0], [2.0, -0.5]])
    h = torch.ones(1, 2, 1, 1, 1).double()
    exact = expm(matrix) @ np.ones(2)
    errors = []
    for step in (1.0, 0.5):
        state = linear_model(matrix, max_step=step).solve(h, torch.zeros(1).double(), torch.tensor([[6.0]]).double())
        errors.append(np.abs(state[0, 0, :, 0, 0, 0].detach().numpy() - exact).max())
    assert 11 < errors[0] / errors[1] < 22


def test_rk4_agrees_with_dopri5_at_tight_tolerance():
    z, t, observed = patients(2, [0.0, 1.2])
    s = torch.tensor([[0.4, 1.2, 3.0, 5.9]]).expand(2, -1).double()
    rk4 = small_ode(scale=0.2).double()
    dopri5 = small_ode(scale=0.2, solver="dopri5", rtol=1e-9, atol=1e-9).double()
    a = rk4(z.double(), t.double(), observed, s)
    b = dopri5(z.double(), t.double(), observed, s)
    moved = (b - z[:, -1:].double()).abs().max()
    assert moved > 0.1
    assert (a - b).abs().max() / moved < 1e-3


@pytest.mark.parametrize("projector", ["rate", "paper"])
def test_gradients_equal_finite_differences_in_float64(projector):
    model = LatentODE(TemporalSpec(hidden=2, dynamics_width=2, projector=projector), 2).double()
    randomise(model, seed=2, scale=0.4)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 2, 2, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    t, s = torch.tensor([[0.0, 0.7]]).double(), torch.tensor([[0.4, 1.5]]).double()
    names = [name for name, _ in model.named_parameters()]

    def run(codes: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        inputs = (codes, t, torch.ones(1, 2, dtype=torch.bool), s)
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), inputs)

    assert torch.autograd.gradcheck(run, (z, *model.parameters()), fast_mode=True)


def test_the_gradient_reaches_every_weight_of_a_moving_model():
    model = small_ode()
    z, t, observed = patients(1, [0.0, 1.0])
    model(z, t, observed, torch.tensor([[2.3]])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_time_is_seen_by_dynamics_that_ask_for_it():
    """dh/dtau = tau from 0 has the solution tau^2 / 2."""
    model = LatentODE(TemporalSpec(hidden=1, dynamics_layers=1), 1, time_input=True)
    assert isinstance(model.dynamics, Dynamics)
    with torch.no_grad():
        model.dynamics.convs[0].weight[0, 1, 1, 1, 1] = 1.0
    s = torch.tensor([[0.0, 1.3, 6.0]])
    states = model.solve(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1), s)
    torch.testing.assert_close(states.flatten(), (s[0] / 6) ** 2 / 2, atol=1e-6, rtol=0)


def test_three_layers_of_width_64_have_the_documented_number_of_parameters():
    assert sum(p.numel() for p in Dynamics(16, 64, 3).parameters()) == 166_032
