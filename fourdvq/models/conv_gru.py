"""The encoder of a patient's scans: a convolutional GRU that reads the code grid backwards in time.

It ends at the first scan, so its state is what the disease dynamics start from. Source: paper section 2.2; the layer
sizes and the zero start state from the published code. Axis letters: B patients, T scans, c code channels, d h w latent
grid; times are years since the first scan.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourdvq.models.conv3d import Conv3d, channels_last_on_cpu

SHORTEST_GAP_YEARS = 0.1  # a change over less time than this is mostly noise, and is not blown up further


class ConvGRU3dCell(nn.Module):
    """One gated step: h' = (1 - u) h + u tanh(conv[x, r h]) with gates r, u = sigmoid(conv[x, h])."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = Conv3d(channels + hidden, 2 * hidden, 3, padding=1)
        self.candidate = Conv3d(channels + hidden, hidden, 3, padding=1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Input x (B, channels, d, h, w) and state h (B, hidden, d, h, w); returns the next state."""
        reset, update = torch.sigmoid(self.gates(torch.cat([x, h], dim=1))).chunk(2, dim=1)
        candidate = torch.tanh(self.candidate(torch.cat([x, reset * h], dim=1)))
        return (1 - update) * h + update * candidate


class BackwardConvGRU(nn.Module):
    """The state at the first scan, from all observed scans, last to first.

    `drift` (optional) moves the state between two scans by one Euler step against time: the ODE-ConvGRU of the paper's
    table 1. `time_gap_channel` adds the gap to the scan read before as one more input channel, `velocity_input` the
    change of the codes per year until that scan as c more; the paper has none of the three.
    """

    def __init__(
        self,
        code_dim: int,
        hidden: int,
        *,
        t_scale_years: float,
        drift: nn.Module | None = None,
        time_gap_channel: bool = False,
        velocity_input: bool = False,
    ) -> None:
        super().__init__()
        self.t_scale_years = t_scale_years
        self.time_gap_channel = time_gap_channel
        self.velocity_input = velocity_input
        self.cell = ConvGRU3dCell(code_dim * (1 + int(velocity_input)) + int(time_gap_channel), hidden)
        self.drift = drift
        self.head = nn.Sequential(nn.Conv3d(hidden, hidden, 1), nn.ReLU(), nn.Conv3d(hidden, hidden, 1))

    def forward(self, z: Tensor, t: Tensor, observed: Tensor) -> Tensor:
        """Codes z (B, T, c, d, h, w), years t (B, T), observed (B, T) bool; returns (B, hidden, d, h, w).

        A scan that is not observed changes nothing: padding and hidden inputs are the same thing.
        """
        h = channels_last_on_cpu(z.new_zeros(z.shape[0], self.cell.hidden, *z.shape[3:]))
        read_at, read = t[:, -1], channels_last_on_cpu(z[:, -1])
        started = torch.zeros_like(observed[:, -1])
        for i in reversed(range(z.shape[1])):
            seen = observed[:, i]
            gap = torch.where(started & seen, (t[:, i] - read_at) / self.t_scale_years, 0.0).to(z.dtype)
            gap_grid = gap[:, None, None, None, None]
            moved = h if self.drift is None else h + gap_grid * self.drift(h)
            x = codes = channels_last_on_cpu(z[:, i])
            if self.time_gap_channel:
                x = torch.cat([x, gap_grid.expand(-1, 1, *x.shape[2:])], dim=1)
            seen_grid = seen[:, None, None, None, None]
            if self.velocity_input:
                years = (read_at - t[:, i]).clamp(min=SHORTEST_GAP_YEARS).to(z.dtype)[:, None, None, None, None]
                known = (started & seen)[:, None, None, None, None]
                x = torch.cat([x, torch.where(known, (read - codes) / years, 0.0)], dim=1)
            h = torch.where(seen_grid, self.cell(x, moved), h)
            read_at, read = torch.where(seen, t[:, i], read_at), torch.where(seen_grid, codes, read)
            started = started | seen
        first: Tensor = self.head(h)
        return first
