"""The latent disease ODE: codes of a patient's scans in, codes at any later time out.

A backward ConvGRU gives the state at the first scan, an ODE carries it through time, a projector turns the movement of
the state into a change of the codes. Source: paper section 2.2; where paper and published code differ, or leave
something open, the choice and its reason stand in docs/reference/model.md.

Axis letters: B patients, T scans, S asked times, c code channels, d h w latent grid. Times are years since the first
scan; the dynamics see years / t_scale_years.

Solving. `rk4` climbs a ladder of fixed steps (max_step_years) that starts at the patient's own first scan, and reaches
an asked time by one shorter step from the rung below it. So a prediction depends on its own time alone: not on which
other times are asked for, not on their order, not on the other patients of a batch. `dopri5` (the paper's solver) is
run for each patient apart, because its adaptive step would couple batch mates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from fourdvq.errors import ModelError
from fourdvq.models.conv3d import Conv3d, channels_last_on_cpu
from fourdvq.models.conv_gru import SHORTEST_GAP_YEARS, BackwardConvGRU
from fourdvq.plan import TemporalSpec

SAME_TIME_YEARS = 1e-6  # half a minute: below every date, above float32 rounding of 6 years


class Dynamics(nn.Module):
    """dh/dtau = f(h) or f(h, tau): stacked 3x3x3 convolutions with tanh between them.

    The last layer starts at zero, so an untrained model predicts no change. With `time_input` the scaled time is one
    more input channel; the published code leaves time out.
    """

    def __init__(self, hidden: int, width: int, layers: int, *, time_input: bool = False) -> None:
        super().__init__()
        self.time_input = time_input
        sizes = [hidden + int(time_input), *[width] * (layers - 1), hidden]
        self.convs = nn.ModuleList(Conv3d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        last = self.convs[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor, tau: Tensor | None = None) -> Tensor:
        """State h (N, hidden, d, h, w); tau (N,) scaled time, used with `time_input` only."""
        if self.time_input:
            if tau is None:
                tau = h.new_zeros(h.shape[0])
            h = torch.cat([h, tau.to(h.dtype)[:, None, None, None, None].expand(-1, 1, *h.shape[2:])], dim=1)
        h = channels_last_on_cpu(h)
        for conv in self.convs[:-1]:
            h = torch.tanh(conv(h))
        out: Tensor = self.convs[-1](h)
        return out


@dataclass(frozen=True)
class InitialState:
    """Where the dynamics start: h (B, hidden, d, h, w) at the first scan, before the patient's random part is added.

    The random part u is one number per channel and patient, N(mean, exp(log_sd)^2) given the scans, N(0, 1) before.
    A deterministic model has none: `mean` and `log_sd` (B, hidden) are then None.
    """

    h: Tensor
    mean: Tensor | None = None
    log_sd: Tensor | None = None

    def drawn(self, noise: Tensor | None = None) -> Tensor:
        """h with u = mean + sd * noise; noise (B, hidden) standard normal, None for the most likely course.

        Raises ModelError E_UNSUPPORTED for noise where nothing is random.
        """
        if self.mean is None or self.log_sd is None:
            if noise is not None:
                raise ModelError("E_UNSUPPORTED", where="initial state", found="noise", wanted="a variational model")
            return self.h
        u = self.mean if noise is None else self.mean + self.log_sd.exp() * noise.to(self.mean)
        return self.h + u[:, :, None, None, None]

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the prior, in nats, (B,); zeros for a deterministic model."""
        if self.mean is None or self.log_sd is None:
            return self.h.new_zeros(len(self.h))
        terms = self.mean.square() + (2 * self.log_sd).exp() - 1 - 2 * self.log_sd
        return 0.5 * terms.sum(dim=1)


class LatentODE(nn.Module):
    """Predicts code grids. `spec.projector`, `spec.anchor` and `spec.skip` choose what a prediction starts from:

    rate projector    zhat(s) = z(a) + P(h(s) - h(a)), P one linear convolution (appendix E.3.3)
    paper projector   zhat(s_i) = zhat(s_i-1) + Conv(h(s_i), h(s_i-1)): depends on which other times are asked for
    anchor a          last_given: the last given scan for s at or after it, else the first; identity: the first;
                      paper: the first, with a change already at the first scan, as published
    skip off          zhat(s) = Conv(h(s))

    With `spec.initial_state: variational` one random number per channel and patient is added to the state at the first
    scan, the same in every voxel: what differs between two courses of a patient is how the whole lung fares, and a mean
    over voxels does not average it away. Noise of every voxel by itself would leave biomarkers without any spread.
    """

    def __init__(self, spec: TemporalSpec, code_dim: int, *, time_input: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.code_dim = code_dim
        layers = spec.dynamics_layers
        drift = Dynamics(spec.hidden, spec.dynamics_width, layers) if spec.encoder == "ode_conv_gru" else None
        self.encoder = BackwardConvGRU(
            code_dim,
            spec.hidden,
            t_scale_years=spec.t_scale_years,
            drift=drift,
            time_gap_channel=spec.time_gap_channel,
            velocity_input=spec.velocity_input,
        )
        self.context = nn.Linear(spec.hidden + code_dim, spec.hidden) if spec.lung_context else None
        self.dynamics = Dynamics(spec.hidden, spec.dynamics_width, layers, time_input=time_input)
        self._pairs = spec.skip and spec.projector == "paper"
        # A bias would cancel in P(h(s)) - P(h(a)): it is there only where it can act.
        bias = self._pairs or not spec.skip or spec.anchor == "paper"
        self.projector = Conv3d(spec.hidden * (2 if self._pairs else 1), code_dim, 3, padding=1, bias=bias)
        self.posterior = nn.Linear(spec.hidden, 2 * spec.hidden) if spec.initial_state == "variational" else None

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        observed: Tensor,
        s: Tensor,
        lung: Tensor | None = None,
        given_last: Tensor | None = None,
        *,
        means: Tensor | None = None,
        noise: Tensor | None = None,
        initial: InitialState | None = None,
    ) -> Tensor:
        """Codes z (B, T, c, d, h, w) at years t (B, T), read where observed (B, T); gives (B, S, c, d, h, w) at s.

        `lung` (B, d, h, w) bool: codes outside it are zero, going in and coming out. `given_last` (B,) is the index
        of the scan that `last_given` starts from (default: the last observed). Pad s by repeating its last time.
        `means` are those of `initial_state`; `noise` (B, hidden) draws one course of a variational model; `initial` is
        `initial_state`'s result for the same scans, if it is at hand. Raises ModelError E_TIMES (see `check_times`),
        E_UNSUPPORTED for noise without use.
        """
        check_times(t, observed, s)
        if lung is not None:
            z = z * lung[:, None, None].to(z.dtype)
        first = observed.int().argmax(dim=1)
        last = _last_observed(observed) if given_last is None else given_last
        rows = torch.arange(z.shape[0], device=z.device)
        t_first = t[rows, first]
        t_last = t[rows, last] if self.spec.anchor == "last_given" else t_first
        start = self.initial_state(z, t, observed, lung, means) if initial is None else initial
        h_first = start.drawn(noise)
        from_last = (s >= t_last[:, None] - SAME_TIME_YEARS) & (self.spec.anchor == "last_given")
        t_anchor = torch.where(from_last, t_last[:, None], t_first[:, None])
        at_anchor = (s - t_anchor).abs() <= SAME_TIME_YEARS
        # The state at an anchor is already in the second column: no step is spent on it again.
        asked = torch.cat([t_last[:, None], torch.where(at_anchor, t_first[:, None], s)], dim=1)
        h = self.solve(h_first, t_first, asked)
        h_last, h_asked = h[:, :1], torch.where(_grid(at_anchor & from_last), h[:, :1], h[:, 1:])
        if not self.spec.skip:
            zhat = _each(self.projector, h_asked)
        else:
            anchor = torch.where(_grid(from_last), z[rows, last][:, None], z[rows, first][:, None])
            change = self._change(h_asked, h_first[:, None], h_last, s, from_last, at_anchor)
            if self.spec.anchor != "paper":
                change = torch.where(_grid(at_anchor), 0.0, change)
            zhat = anchor + change
        return zhat if lung is None else zhat * lung[:, None, None].to(z.dtype)

    def initial_state(
        self, z: Tensor, t: Tensor, observed: Tensor, lung: Tensor | None = None, means: Tensor | None = None
    ) -> InitialState:
        """The state at the first scan from codes z (B, T, c, d, h, w), and how sure the scans make it.

        Context and random part are read from the mean state over `lung` (B, d, h, w), None: over everything. The
        context also sees how fast the lung's mean changed, from `means` (B, T, c): the encoder's output before
        quantisation, which keeps changes that the codes round away. Without them, from the codes.
        """
        if lung is not None:
            z = z * lung[:, None, None].to(z.dtype)
        h = self.encoder(z, t, observed).to(z.dtype)  # autocast must not leave 16-bit states to be summed
        pooled = lung_mean(h, lung)
        if self.context is not None:
            if means is None:
                means = torch.stack([lung_mean(x, lung) for x in z.unbind(1)], dim=1)
            rate = _rate_of_change(means, t, observed)
            h = h + self.context(torch.cat([pooled, rate], dim=1)).to(h.dtype)[:, :, None, None, None]
        if self.posterior is None:
            return InitialState(h)
        mean, log_sd = self.posterior(pooled).to(h.dtype).chunk(2, dim=1)
        return InitialState(h, mean, log_sd.clamp(-6.0, 2.0))

    def solve(self, h_first: Tensor, t_first: Tensor, s: Tensor) -> Tensor:
        """States (B, S, hidden, d, h, w) at years s (B, S), from h_first (B, hidden, d, h, w) at years t_first (B,)."""
        offset = (s - t_first[:, None]).double().clamp(min=0)
        if self.spec.solver == "dopri5":
            return torch.stack([self._adaptive(h, t0, o) for h, t0, o in zip(h_first, t_first, offset, strict=True)])
        return self._ladder(h_first, t_first, offset)

    def _ladder(self, h_first: Tensor, t_first: Tensor, offset: Tensor) -> Tensor:
        step = self.spec.max_step_years
        rung = torch.floor((offset + SAME_TIME_YEARS) / step).long()
        rest = offset - rung * step
        n_rungs = int(rung.max()) if rung.numel() else 0
        ladder = h_first[None]
        if n_rungs:
            ticks = torch.arange(n_rungs + 1, device=offset.device, dtype=h_first.dtype)
            length = torch.full_like(t_first, step)
            ladder = odeint(self._flow(t_first, length), h_first, ticks, method="rk4")
        rows = torch.arange(h_first.shape[0], device=offset.device)[:, None]
        states = ladder[rung, rows]
        short = rest > SAME_TIME_YEARS
        if not bool(short.any()):
            return states
        began = (t_first[:, None] + rung * step)[short]
        unit = torch.tensor([0.0, 1.0], device=offset.device, dtype=h_first.dtype)
        reached = odeint(self._flow(began, rest[short]), states[short], unit, method="rk4")[1]
        return states.index_put((short,), reached)

    def _flow(self, began: Tensor, years: Tensor) -> _Flow:
        return _Flow(self.dynamics, began / self.spec.t_scale_years, years / self.spec.t_scale_years)

    def _adaptive(self, h_first: Tensor, t_first: Tensor, offset: Tensor) -> Tensor:
        """One patient with dopri5: h_first (hidden, d, h, w), offset (S,) years after the first scan."""
        times, where = torch.unique(torch.cat([offset.new_zeros(1), offset]), return_inverse=True)
        if len(times) == 1:
            return h_first.expand(len(offset), *h_first.shape)
        scale = self.spec.t_scale_years
        flow = _Flow(self.dynamics, t_first[None] / scale, torch.ones_like(t_first)[None])
        solved = odeint(flow, h_first[None], times / scale, method="dopri5", rtol=self.spec.rtol, atol=self.spec.atol)
        states: Tensor = solved[where[1:], 0]
        return states

    def _change(
        self, h: Tensor, h_first: Tensor, h_last: Tensor, s: Tensor, from_last: Tensor, at_anchor: Tensor
    ) -> Tensor:
        """Change of the codes since the anchor, (B, S, c, d, h, w)."""
        if self._pairs:
            return self._cumulative_change(h, h_first, h_last, s, from_last, at_anchor)
        if self.spec.anchor == "paper":
            return _each(self.projector, h)
        moved = h - torch.where(_grid(from_last), h_last, h_first)
        return _each(self.projector, moved)

    def _cumulative_change(
        self, h: Tensor, h_first: Tensor, h_last: Tensor, s: Tensor, from_last: Tensor, at_anchor: Tensor
    ) -> Tensor:
        """Sums of difference maps along increasing time; from `h_last` on they start again."""
        order = torch.argsort(s, dim=1, stable=True)
        rows = torch.arange(s.shape[0], device=s.device)[:, None]
        h, late, s, at_anchor = (x[rows, order] for x in (h, from_last, s, at_anchor))
        restarts = late.clone()
        restarts[:, 1:] &= ~late[:, :-1]
        before = torch.where(_grid(restarts), h_last, torch.cat([h_first, h[:, :-1]], dim=1))
        steps = _each(self.projector, torch.cat([h, before], dim=2))
        if self.spec.anchor != "paper":
            # A map between a time and itself is no change; without this a time asked twice would count twice.
            repeats = at_anchor.clone()
            repeats[:, 1:] |= (s[:, 1:] - s[:, :-1]).abs() <= SAME_TIME_YEARS
            steps = torch.where(_grid(repeats), 0.0, steps)
        early_sum = torch.where(_grid(late), 0.0, steps).cumsum(dim=1)
        late_sum = torch.where(_grid(late), steps, 0.0).cumsum(dim=1)
        return torch.where(_grid(late), late_sum, early_sum)[rows, torch.argsort(order, dim=1)]


class _Flow(nn.Module):
    """y'(u) = years * f(y, began + u * years) for each row apart: every row has its own stretch of time."""

    def __init__(self, dynamics: Dynamics, began: Tensor, years: Tensor) -> None:
        super().__init__()
        self.dynamics = dynamics
        self.began = began
        self.years = years

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = self.dynamics(y, self.began + u * self.years).to(y.dtype)
        return self.years.to(y.dtype)[:, None, None, None, None] * slope


def check_times(t: Tensor, observed: Tensor, s: Tensor) -> None:
    """Refuse what has no defined result: no scan, times that do not increase, or a time before the first scan.

    Raises ModelError E_TIMES. `t`, `observed` (B, T) and `s` (B, S) as in `LatentODE.forward`.
    """
    for row, (years, seen, asked) in enumerate(zip(t.tolist(), observed.tolist(), s.tolist(), strict=True)):
        given = [y for y, is_seen in zip(years, seen, strict=True) if is_seen]
        rising = all(b - a > SAME_TIME_YEARS for a, b in pairwise(given))
        # Comparisons with a number that is not one are false: such a time is refused as well.
        if not given or not rising or not all(given[0] - SAME_TIME_YEARS <= x < math.inf for x in asked):
            raise ModelError("E_TIMES", where=f"row {row}", found=f"scans at {given}, asked for {asked}")


def snap_times(years: Sequence[float], grid: str) -> list[float]:
    """Years as the model sees them: `exact`, or rounded to half-years as in the published code (`halfyear`)."""
    return [float(y) if grid == "exact" else round(float(y) * 2) / 2 for y in years]


def lung_mean(x: Tensor, lung: Tensor | None) -> Tensor:
    """Mean of x (B, n, d, h, w) over `lung` (B, d, h, w), None: over everything; (B, n)."""
    if lung is None:
        return x.mean(dim=(2, 3, 4))
    weight = lung[:, None].to(x.dtype)
    return (x * weight).sum(dim=(2, 3, 4)) / weight.sum(dim=(2, 3, 4)).clamp(min=1)


def _rate_of_change(means: Tensor, t: Tensor, observed: Tensor) -> Tensor:
    """Change per year of means (B, T, c) from the first observed scan to the last, (B, c); zero if they are one."""
    rows, first, last = torch.arange(len(t), device=t.device), observed.int().argmax(dim=1), _last_observed(observed)
    years = (t[rows, last] - t[rows, first]).clamp(min=SHORTEST_GAP_YEARS).to(means.dtype)
    return (means[rows, last] - means[rows, first]) / years[:, None]


def _last_observed(observed: Tensor) -> Tensor:
    n = observed.shape[1]
    return n - 1 - observed.flip(1).int().argmax(dim=1)


def _grid(flags: Tensor) -> Tensor:
    """(B, S) to (B, S, 1, 1, 1, 1)."""
    return flags[:, :, None, None, None, None]


def _each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of (N, channels, d, h, w) to (B, S, channels, d, h, w)."""
    out = function(channels_last_on_cpu(x.flatten(0, 1)))
    return out.reshape(*x.shape[:2], *out.shape[1:])
