"""The convolutional GRU against a plain NumPy and SciPy transcription of its equations."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import correlate

from fourdvq.models.conv_gru import BackwardConvGRU, ConvGRU3dCell
from temporal_cases import GRID, patients, randomise


def convolve(x: np.ndarray, conv: torch.nn.Conv3d) -> np.ndarray:
    """x (C, d, h, w) through a 3x3x3 convolution with zero padding, channel by channel."""
    weight, bias = conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy()
    rows = [
        sum(correlate(x[i], w[i], mode="constant") for i in range(len(x))) + b
        for w, b in zip(weight, bias, strict=True)
    ]
    return np.stack(rows)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def step(cell: ConvGRU3dCell, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    gates = sigmoid(convolve(np.concatenate([x, h]), cell.gates))
    reset, update = gates[: len(h)], gates[len(h) :]
    candidate = np.tanh(convolve(np.concatenate([x, reset * h]), cell.candidate))
    return (1 - update) * h + update * candidate


def test_one_conv_gru_step_equals_its_equations_written_out():
    cell = ConvGRU3dCell(3, 4)
    randomise(cell, seed=3, scale=0.4)
    rng = np.random.default_rng(0)
    x, h = rng.normal(size=(3, *GRID)), rng.normal(size=(4, *GRID))
    ours = cell(torch.tensor(x[None], dtype=torch.float32), torch.tensor(h[None], dtype=torch.float32))[0]
    np.testing.assert_allclose(ours.detach().numpy(), step(cell, x, h), atol=2e-6)


def test_the_encoder_reads_from_the_last_scan_to_the_first_and_skips_what_is_hidden():
    encoder = BackwardConvGRU(3, 4, t_scale_years=6.0)
    randomise(encoder, seed=4, scale=0.4)
    z, t, observed = patients(1, [0.0, 1.0, 2.5])
    observed[0, 1] = False
    h = np.zeros((4, *GRID))
    for i in (2, 0):
        h = step(encoder.cell, z[0, i].double().numpy(), h)
    expected = encoder.head(torch.tensor(h[None], dtype=torch.float32))
    torch.testing.assert_close(encoder(z, t, observed), expected, atol=2e-6, rtol=0)


def test_the_ode_encoder_moves_the_state_back_in_time_by_one_euler_step_between_scans():
    drift = torch.nn.Conv3d(4, 4, 3, padding=1)
    encoder = BackwardConvGRU(3, 4, t_scale_years=6.0, drift=drift)
    randomise(encoder, seed=5, scale=0.4)
    z, t, observed = patients(1, [0.0, 1.5])
    h = step(encoder.cell, z[0, 1].double().numpy(), np.zeros((4, *GRID)))
    h = h + (0.0 - 1.5) / 6.0 * convolve(h, drift)
    h = step(encoder.cell, z[0, 0].double().numpy(), h)
    expected = encoder.head(torch.tensor(h[None], dtype=torch.float32))
    torch.testing.assert_close(encoder(z, t, observed), expected, atol=2e-6, rtol=0)


def test_the_cell_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in ConvGRU3dCell(16, 16).parameters()) == 41_520
