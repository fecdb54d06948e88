"""From two or more scans of a patient to the scans of other times: encode, move the codes through time, decode.

Source: paper sections 2.2 and 2.3; the lung rule (codes outside the lung are the baseline's) and re-quantisation from
the published code. Axis letters: T given scans, S asked times, c code channels, D H W voxels (z, y, x), d h w latent
grid, K codes. Volumes are x01 in [0, 1]; times are years since the first scan.

Two ways to show a prediction:
decode    G(quantised codes): the paper's; smooth, because the decoder cannot draw the patient's own fine detail.
residual  the last given scan before that time + G(codes then) - G(codes at that scan), both unquantised, inside the
          lung: keeps the patient's detail, cancels the decoder's error, and is that scan itself if nothing changes.

A variational model has many courses for one patient: `samples` draws some, and the result then also says how far apart
they lie. The trajectory itself stays the most likely course, so asking for samples does not change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from fourdvq.data.datasets import latent_mask
from fourdvq.errors import DataError, ModelError
from fourdvq.models.latent_ode import SAME_TIME_YEARS, LatentODE, lung_mean, snap_times
from fourdvq.models.vqgan import Quantised, VQGAN3d, tokenizer_sha256
from fourdvq.plan import GIVEN_FOR_EXTRAPOLATION, TemporalSpec
from fourdvq.training.precision import autocast, self_check

Detail = Literal["decode", "residual"]
Kind = Literal["given", "interpolated", "extrapolated"]


@dataclass(frozen=True)
class WorldModel:
    """Two networks that belong together; `tokenizer_sha256` names the encoder and codebook the ODE was trained on.

    `precision` is that of the decoder. Encoder, quantisation and dynamics are float32 in any case: which code a voxel
    has must not depend on the machine.
    """

    vqgan: VQGAN3d
    ode: LatentODE
    tokenizer_sha256: str
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def device(self) -> torch.device:
        return next(self.vqgan.parameters()).device


@dataclass(frozen=True)
class Spread:
    """What n drawn courses say at each asked time. Volumes x01 (D, H, W) float32, on the CPU."""

    mean: tuple[Tensor, ...]
    sd: tuple[Tensor, ...]  # voxel-wise, of the n courses around their mean
    codes: Tensor  # (n, S, d, h, w) int16: the courses themselves
    histograms: Tensor  # (n, S, K) float64, as those of the trajectory


@dataclass(frozen=True)
class Trajectory:
    """Generated scans in the order in which their times were asked for."""

    times: tuple[float, ...]
    kinds: tuple[Kind, ...]
    volumes: tuple[Tensor, ...]  # x01 (D, H, W) float32, on the CPU
    indices: Tensor  # (S, d, h, w) int64; outside the lung the baseline's codes
    histograms: Tensor  # (S, K) float64: shares of the codes inside the lung
    flags: tuple[str, ...]  # W_ codes: W_HORIZON if a time lies beyond the training window
    spread: Spread | None = None  # where samples were asked for


def check_world(model: WorldModel) -> None:
    """ModelError E_TOKENIZER if encoder and codebook are not those that `tokenizer_sha256` names (empty: no name)."""
    found = tokenizer_sha256(model.vqgan) if model.tokenizer_sha256 else ""
    if found != model.tokenizer_sha256:
        raise ModelError(
            "E_TOKENIZER", where="world model", found=f"{found[:12]}...", wanted=f"{model.tokenizer_sha256[:12]}..."
        )


def times_every(interval: float, years: float, *, last_given: float = 0.0) -> tuple[float, ...]:
    """0, interval, 2 interval, ... up to `years`. Source: paper section 2.3.

    Raises DataError E_TIMES for an interval that is not positive, or years before the last given scan.
    """
    if not (0 < interval < math.inf) or not (last_given <= years < math.inf):
        raise DataError(
            "E_TIMES", where="--interval, --years", found=f"interval {interval}, years {years}, last scan {last_given}"
        )
    return tuple(k * interval for k in range(int(years / interval + SAME_TIME_YEARS) + 1))


def generate(
    model: WorldModel,
    scans: Tensor,
    times_given: Sequence[float],
    times: Sequence[float],
    *,
    lung: Tensor | None = None,
    samples: int = 0,
    generator: torch.Generator | None = None,
    detail: Detail = "decode",
    requantise: bool = True,
    beyond_horizon: bool = False,
) -> Trajectory:
    """Scans (T, 1, D, H, W) in [0, 1] taken at `times_given`; returns the scans at `times`, decoded one at a time.

    `lung` (D, H, W) bool is the baseline's; without it everything may change. `requantise` puts predicted codes onto
    the codebook before decoding. `samples` (2 or more) draws so many courses of a variational model with `generator`,
    for `Trajectory.spread`. Times beyond the training window are flagged; far beyond (see `check_horizon`) they are
    refused unless `beyond_horizon`.

    Raises DataError E_GIVEN for fewer than two scans, E_TIMES for times that cannot be used, E_HORIZON, E_VALUE for
    another shape or number of samples, E_NAN for values that are not finite, E_NOLUNG for an empty `lung`; ModelError
    E_TOKENIZER for networks that do not belong together, E_UNSUPPORTED for samples of a deterministic model.
    """
    _check_samples(model, samples)
    check_world(model)
    given = _check_given(scans, times_given, model)
    if lung is not None and not bool(lung.any()):
        raise DataError("E_NOLUNG", where="lung", found="an empty mask", wanted="the baseline's lung")
    asked = snap_times([float(s) for s in times], model.ode.spec.grid)
    if not asked or not all(given[0] - SAME_TIME_YEARS <= s < math.inf for s in asked):
        raise DataError("E_TIMES", where="times", found=str(asked), wanted=f"years from {given[0]} on")
    flags = check_horizon(asked, model.ode.spec, allow=beyond_horizon)
    if model.precision == "bf16":
        # The check of bfloat16 takes gradients, which inference mode does not allow; its answer is kept.
        self_check(str(model.device))
    with torch.inference_mode(), evaluating(model):
        latents = encode_given(model, scans, given, lung)
        zhat = predict_codes(model, latents, asked)
        decoded = [decode_codes(model, latents, z, requantise=requantise) for z in zhat]
        volumes = [volume for volume, _ in decoded]
        if detail == "residual":
            volumes = residual_volumes(model, latents, scans, asked, zhat)
        spread = None
        if samples:
            how = _Showing(detail, requantise, scans)
            spread = _draw_courses(model, latents, asked, samples, generator, how)
    indices = torch.stack([codes for _, codes in decoded])
    shares = [code_histogram(codes, latents.lung, model.vqgan.spec.n_codes) for codes in indices]
    return Trajectory(
        times=tuple(float(s) for s in times),
        kinds=tuple(_kind(s, given) for s in asked),
        volumes=tuple(volumes),
        indices=indices,
        histograms=torch.stack(shares),
        flags=flags,
        spread=spread,
    )


def check_horizon(times: Sequence[float], spec: TemporalSpec, *, allow: bool = False) -> tuple[str, ...]:
    """Flags of the asked times: W_HORIZON if one lies beyond the training window of `t_scale_years`.

    Raises DataError E_HORIZON beyond `t_scale_years` x `horizon_factor`, unless `allow`: nobody was ever seen there.
    """
    furthest, window = max(times), spec.t_scale_years
    if furthest <= window + SAME_TIME_YEARS:
        return ()
    limit = window * spec.horizon_factor
    if furthest > limit + SAME_TIME_YEARS and not allow:
        raise DataError(
            "E_HORIZON", where="times", found=f"{furthest:g} years", wanted=f"at most {limit:g} years after scan 1"
        )
    return ("W_HORIZON",)


@dataclass(frozen=True)
class GivenLatents:
    """The given scans of one patient as the ODE sees them."""

    years: tuple[float, ...]
    z: Tensor  # (T, c, d, h, w), on the codebook, not masked
    indices: Tensor  # (T, d, h, w) int64
    means: Tensor  # (T, c): the encoder's output before quantisation, mean over the lung
    lung: Tensor  # (d, h, w) bool
    lung_voxels: Tensor  # (D, H, W) bool, on the CPU


@contextmanager
def evaluating(model: WorldModel) -> Iterator[None]:
    """Both networks in evaluation mode, and back in their former mode afterwards."""
    networks: tuple[nn.Module, ...] = (model.vqgan, model.ode)
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)


def encode_scan(vqgan: VQGAN3d, scan: Tensor, cells: Tensor) -> tuple[Quantised, Tensor]:
    """Codes of a scan (1, D, H, W) in [0, 1], and the mean (1, c) over the lung `cells` (d, h, w) before quantisation.

    What stage 2 is trained on and what a prediction starts from are both made here.
    """
    z = vqgan.encode(scan[None].to(next(vqgan.parameters()).device) - 0.5).float()
    return vqgan.quantise(z), lung_mean(z, cells[None].to(z.device))


def encode_given(model: WorldModel, scans: Tensor, years: Sequence[float], lung: Tensor | None) -> GivenLatents:
    """Encode and quantise scans (T, 1, D, H, W), one at a time."""
    voxels = torch.ones(scans.shape[2:], dtype=torch.bool) if lung is None else lung.cpu().bool()
    cells = latent_mask(voxels, model.vqgan.spec.compression).to(model.device)
    coded, means = zip(*(encode_scan(model.vqgan, scan, cells) for scan in scans), strict=True)
    return GivenLatents(
        years=tuple(years),
        z=torch.cat([one.z_q for one in coded]),
        indices=torch.cat([one.indices for one in coded]),
        means=torch.cat(means),
        lung=cells,
        lung_voxels=voxels,
    )


def predict_codes(
    model: WorldModel, given: GivenLatents, times: Sequence[float], noise: Tensor | None = None
) -> Tensor:
    """Predicted codes (S, c, d, h, w) at `times`, in any order, none before the first scan; zero outside the lung.

    `noise` (1, hidden) draws one course of a variational model; without it, the most likely course.
    """
    t = torch.tensor([given.years], dtype=torch.float32, device=given.z.device)
    s = torch.tensor([list(times)], dtype=torch.float32, device=given.z.device)
    seen = torch.ones_like(t, dtype=torch.bool)
    zhat: Tensor = model.ode(given.z[None], t, seen, s, given.lung[None], means=given.means[None], noise=noise)
    return zhat[0]


def decode_codes(model: WorldModel, given: GivenLatents, z: Tensor, *, requantise: bool) -> tuple[Tensor, Tensor]:
    """Decode z (c, d, h, w) with the baseline's codes outside the lung.

    Returns x01 (D, H, W) and the codes (d, h, w) of the re-quantised grid, both on the CPU.
    """
    quantised = model.vqgan.quantise(z[None])
    indices = torch.where(given.lung, quantised.indices[0], given.indices[0])
    inside = model.vqgan.embed(indices[None]) if requantise else torch.where(given.lung, z, given.z[0])[None]
    with autocast(model.device, model.precision):
        decoded = model.vqgan.decode(inside)[0, 0].float().contiguous()
    return (decoded + 0.5).clamp(0, 1).cpu(), indices.cpu()


def residual_volumes(
    model: WorldModel,
    given: GivenLatents,
    scans: Tensor,
    times: Sequence[float],
    zhat: Tensor,
    noise: Tensor | None = None,
) -> list[Tensor]:
    """Scans x01 (D, H, W) with residual detail, one for each of `times`; zhat (S, c, d, h, w) as predicted for them.

    `noise` is that with which zhat was drawn.
    """
    bases = [base_index(s, given.years) for s in times]
    needed = sorted(set(bases))
    at_base = predict_codes(model, given, [given.years[i] for i in needed], noise)
    drawn = {i: decode_codes(model, given, z, requantise=False)[0] for i, z in zip(needed, at_base, strict=True)}
    volumes = []
    for base, z in zip(bases, zhat, strict=True):
        change = (decode_codes(model, given, z, requantise=False)[0] - drawn[base]) * given.lung_voxels
        volumes.append((scans[base, 0].cpu().float() + change).clamp(0, 1))
    return volumes


def base_index(time: float, years: Sequence[float]) -> int:
    """Index of the last given scan at or before `time`: the scan that a person would carry forward."""
    return max(i for i, t in enumerate(years) if i == 0 or t <= time + SAME_TIME_YEARS)


def code_histogram(indices: Tensor, mask: Tensor | None, n_codes: int) -> Tensor:
    """Shares (K,) float64, sum 1, of the codes `indices` (d, h, w) where `mask` (d, h, w) is true (None: everywhere).

    Raises DataError E_MASK if the mask holds nothing.
    """
    chosen = indices.flatten() if mask is None else indices[mask.to(indices.device).bool()]
    if chosen.numel() == 0:
        raise DataError("E_MASK", where="latent lung mask", found="empty")
    return torch.bincount(chosen.long().cpu(), minlength=n_codes).double() / chosen.numel()


@dataclass(frozen=True)
class _Showing:
    """How drawn codes become volumes: as the trajectory's own."""

    detail: Detail
    requantise: bool
    scans: Tensor


def _draw_courses(
    model: WorldModel,
    given: GivenLatents,
    times: Sequence[float],
    n: int,
    generator: torch.Generator | None,
    how: _Showing,
) -> Spread:
    """Draw n courses one after the other; of the volumes only running means and squares are kept (Welford)."""
    hidden = model.ode.spec.hidden
    means = [torch.zeros(how.scans.shape[2:]) for _ in times]
    squares = [torch.zeros_like(mean) for mean in means]
    codes = []
    for drawn in range(1, n + 1):
        noise = torch.randn(1, hidden, generator=generator)
        zhat = predict_codes(model, given, times, noise)
        decoded = [decode_codes(model, given, z, requantise=how.requantise) for z in zhat]
        volumes = [volume for volume, _ in decoded]
        if how.detail == "residual":
            volumes = residual_volumes(model, given, how.scans, times, zhat, noise)
        codes.append(torch.stack([indices for _, indices in decoded]).to(torch.int16))
        for mean, square, volume in zip(means, squares, volumes, strict=True):
            off = volume - mean
            mean += off / drawn
            square += off * (volume - mean)
    n_codes = model.vqgan.spec.n_codes
    shares = [torch.stack([code_histogram(c.long(), given.lung, n_codes) for c in course]) for course in codes]
    sd = tuple((square / (n - 1)).clamp(min=0).sqrt() for square in squares)
    return Spread(tuple(means), sd, torch.stack(codes), torch.stack(shares))


def _check_samples(model: WorldModel, samples: int) -> None:
    if samples == 0:
        return
    if samples < 2:
        raise DataError("E_VALUE", where="samples", found=str(samples), wanted="0, or 2 and more for a spread")
    if model.ode.posterior is None:
        raise ModelError(
            "E_UNSUPPORTED",
            where="samples",
            found=f"{samples} samples of a deterministic model",
            fix="ask for one trajectory, or train with temporal.initial_state=variational",
        )


def _check_given(scans: Tensor, times_given: Sequence[float], model: WorldModel) -> list[float]:
    spec = model.vqgan.spec
    if scans.ndim != 5 or tuple(scans.shape[1:]) != (1, *spec.size) or len(scans) != len(times_given):
        raise DataError(
            "E_VALUE",
            where="scans",
            found=f"shape {tuple(scans.shape)} with {len(times_given)} times",
            wanted=f"(T, 1, {', '.join(map(str, spec.size))}) with T times",
            fix="prepare the scans with the federation's profile",
        )
    if len(scans) < GIVEN_FOR_EXTRAPOLATION:
        raise DataError("E_GIVEN", where="scans", found=str(len(scans)))
    years = snap_times([float(t) for t in times_given], model.ode.spec.grid)
    if not all(map(math.isfinite, years)) or not all(b - a > SAME_TIME_YEARS for a, b in pairwise(years)):
        raise DataError("E_TIMES", where="times_given", found=str(years))
    if not bool(torch.isfinite(scans).all()):
        raise DataError("E_NAN", where="scans")
    return years


def _kind(time: float, given: Sequence[float]) -> Kind:
    if any(abs(time - t) <= SAME_TIME_YEARS for t in given):
        return "given"
    return "interpolated" if time < given[-1] else "extrapolated"
