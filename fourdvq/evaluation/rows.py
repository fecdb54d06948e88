"""The rows of the evaluation: our model, two ways of showing it, and the controls without which no row is printed.

A row turns one case into one predicted volume x01 (D, H, W) per target. Rows named in `SEES_TARGET` are no forecasts:
they look at the target to say how good or bad a number can get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fourdvq.data.latents import LatentPatient
from fourdvq.generation import (
    GivenLatents,
    WorldModel,
    base_index,
    code_histogram,
    decode_codes,
    encode_given,
    predict_codes,
    residual_volumes,
)
from fourdvq.models.latent_ode import SAME_TIME_YEARS, snap_times

SEES_TARGET = ("noise_control", "ceiling")

# Anyone's model: scans (T, 1, D, H, W), their years (T,), the asked years (S,), lung (D, H, W) -> S volumes (D, H, W).
Forecaster = Callable[[Tensor, Sequence[float], Sequence[float], Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One patient's task: given scans (T, 1, D, H, W) at years_given, targets (D, H, W) at years, lung (D, H, W)."""

    pseudonym: str
    years_given: tuple[float, ...]
    scans: Tensor
    years: tuple[float, ...]
    targets: tuple[Tensor, ...]
    lung: Tensor
    strata: tuple[tuple[str, ...], ...]  # of each target: how it and its base were taken; labels of rows


class Bench:
    """One case with what several rows share, computed once."""

    def __init__(
        self, world: WorldModel, case: Case, generator: torch.Generator, population_rate: Tensor | None = None
    ) -> None:
        self.world = world
        self.case = case
        self.generator = generator
        self.population_rate = population_rate
        grid = world.ode.spec.grid
        self.years_given = snap_times(case.years_given, grid)
        self.years = snap_times(case.years, grid)
        self.bases = [base_index(year, case.years_given) for year in case.years]

    @cached_property
    def given(self) -> GivenLatents:
        return encode_given(self.world, self.case.scans, self.years_given, self.case.lung)

    @cached_property
    def zhat(self) -> Tensor:
        """Predicted codes at the given times, then at the targets' times. One call, as the paper's projector needs."""
        return predict_codes(self.world, self.given, [*self.years_given, *self.years])

    @cached_property
    def decoded(self) -> list[Tensor]:
        """Volumes of `zhat`, re-quantised."""
        return [self.decode(z) for z in self.zhat]

    def decode(self, z: Tensor) -> Tensor:
        return decode_codes(self.world, self.given, z, requantise=True)[0]

    def last(self, i: int) -> Tensor:
        """The scan that is carried forward to target i, (D, H, W)."""
        return self.case.scans[self.bases[i], 0].cpu().float()


def model(bench: Bench) -> list[Tensor]:
    """Decoded from re-quantised codes: the paper's output."""
    return bench.decoded[len(bench.years_given) :]


def model_residual(bench: Bench) -> list[Tensor]:
    """The last scan plus the predicted change."""
    zhat = bench.zhat[len(bench.years_given) :]
    return residual_volumes(bench.world, bench.given, bench.case.scans, bench.years, zhat)


def persistence(bench: Bench) -> list[Tensor]:
    """The last scan itself."""
    return [bench.last(i) for i in range(len(bench.years))]


def persistence_decoded(bench: Bench) -> list[Tensor]:
    """The last scan through encoder and decoder."""
    drawn = {base: bench.decode(bench.given.z[base]) for base in set(bench.bases)}
    return [drawn[base] for base in bench.bases]


def linear_latent(bench: Bench) -> list[Tensor]:
    """A straight line in the codes through the two given scans around the target, or the last two before it."""
    return [bench.decode(z) for z in _lines_through(bench)]


def noise_control(bench: Bench) -> list[Tensor]:
    """The last scan plus noise as large as the true change in the lung: the right amount of change, knowing nothing.

    Not clipped to [0, 1], so that its expected error is exactly twice that of copying.
    """
    volumes = []
    lung = bench.case.lung
    for i, target in enumerate(bench.case.targets):
        last = bench.last(i)
        size = (target - last)[lung].square().mean().sqrt()
        volumes.append(last + size * torch.randn(last.shape, generator=bench.generator) * lung)
    return volumes


def ceiling(bench: Bench) -> list[Tensor]:
    """The target through encoder and decoder: no prediction of codes can be shown better than this."""
    volumes = []
    for target in bench.case.targets:
        seen = encode_given(bench.world, target[None, None], [0.0], bench.case.lung)
        volumes.append(decode_codes(bench.world, seen, seen.z[0], requantise=True)[0])
    return volumes


def population_change(bench: Bench) -> list[Tensor] | None:
    """The last scan's codes plus the training patients' mean change per year (c,); absent if none was given."""
    if bench.population_rate is None:
        return None
    return [bench.decode(z) for z in _drifted(bench, bench.population_rate)]


def population_rate(patients: Sequence[LatentPatient], codebook: Tensor) -> Tensor | None:
    """Mean change of the lung's mean code vector per year, (c,), over training patients with two scans or more.

    None without such a patient. codebook (K, c) embeds their cached codes.
    """
    rates = []
    for patient in patients:
        years = float(patient.years[-1] - patient.years[0])
        if years > SAME_TIME_YEARS:
            first, last = (codebook[patient.indices[i].long()][patient.lung.bool()].mean(dim=0) for i in (0, -1))
            rates.append((last - first) / years)
    return torch.stack(rates).mean(dim=0) if rates else None


def paper_pooled(bench: Bench) -> list[Tensor]:
    """Predictions at the given times as well, as the publication pooled them: flatters every model."""
    return bench.decoded


def _lines_through(bench: Bench) -> Iterator[Tensor]:
    for base, year in zip(bench.bases, bench.years, strict=True):
        a = min(base, len(bench.years_given) - 2)
        t0, t1 = bench.years_given[a], bench.years_given[a + 1]
        z0, z1 = bench.given.z[a], bench.given.z[a + 1]
        yield z0 + (z1 - z0) * ((year - t0) / (t1 - t0))


def _drifted(bench: Bench, rate: Tensor) -> Iterator[Tensor]:
    step = rate.to(bench.given.z.device, bench.given.z.dtype)[:, None, None, None]
    for base, year in zip(bench.bases, bench.years, strict=True):
        yield bench.given.z[base] + step * (year - bench.years_given[base])


def _model_codes(bench: Bench) -> Tensor:
    return bench.zhat[len(bench.years_given) :]


def _last_codes(bench: Bench) -> Tensor:
    return bench.given.z[bench.bases]


def _linear_codes(bench: Bench) -> Tensor:
    return torch.stack(list(_lines_through(bench)))


def _population_codes(bench: Bench) -> Tensor | None:
    return None if bench.population_rate is None else torch.stack(list(_drifted(bench, bench.population_rate)))


# Predicted codes (S, c, d, h, w) of the rows that predict codes; what is decoded from them is the row's volume.
CODE_ROWS: dict[str, Callable[[Bench], Tensor | None]] = {
    "model": _model_codes,
    "persistence_decoded": _last_codes,
    "linear_latent": _linear_codes,
    "population_change": _population_codes,
}


def code_shares(bench: Bench, z: Tensor) -> list[Tensor]:
    """Shares (K,) of the codes in the lung, of each of the predicted z (S, c, d, h, w) after re-quantisation."""
    n_codes = bench.world.vqgan.spec.n_codes
    indices = bench.world.vqgan.quantise(z).indices
    return [code_histogram(one, bench.given.lung, n_codes) for one in indices]


ROWS: dict[str, Callable[[Bench], list[Tensor] | None]] = {
    "model": model,
    "model_residual": model_residual,
    "persistence": persistence,
    "persistence_decoded": persistence_decoded,
    "linear_latent": linear_latent,
    "noise_control": noise_control,
    "ceiling": ceiling,
    "population_change": population_change,
    "paper_pooled": paper_pooled,
}
