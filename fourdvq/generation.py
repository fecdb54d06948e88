"""From two or more scans of a patient to the scans of other times: encode, move the codes through time, decode.

Source: paper sections 2.2 and 2.3; the lung rule (codes outside the lung are the baseline's) and re-quantisation from
the published code. Axis letters: T given scans, S asked times, c code channels, D H W voxels (z, y, x), d h w latent
grid, K codes. Volumes are x01 in [0, 1]; times are years since the first scan.

Two ways to show a prediction:
decode    G(quantised codes): the paper's; smooth, because the decoder cannot draw the patient's own fine detail.
residual  the last given scan before that time + G(codes then) - G(codes at that scan), both unquantised, inside the
          lung: keeps the patient's detail, cancels the decoder's error, and is that scan itself if nothing changes.
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
from fourdvq.models.latent_ode import SAME_TIME_YEARS, LatentODE, snap_times
from fourdvq.models.vqgan import VQGAN3d, tokenizer_sha256
from fourdvq.plan import GIVEN_FOR_EXTRAPOLATION

Detail = Literal["decode", "residual"]
Kind = Literal["given", "interpolated", "extrapolated"]


@dataclass(frozen=True)
class WorldModel:
    """Two networks that belong together; `tokenizer_sha256` names the encoder and codebook the ODE was trained on."""

    vqgan: VQGAN3d
    ode: LatentODE
    tokenizer_sha256: str

    @property
    def device(self) -> torch.device:
        return next(self.vqgan.parameters()).device


@dataclass(frozen=True)
class Trajectory:
    """Generated scans in the order in which their times were asked for."""

    times: tuple[float, ...]
    kinds: tuple[Kind, ...]
    volumes: tuple[Tensor, ...]  # x01 (D, H, W) float32, on the CPU
    indices: Tensor  # (S, d, h, w) int64; outside the lung the baseline's codes
    histograms: Tensor  # (S, K) float64: shares of the codes inside the lung
    flags: tuple[str, ...]  # W_ codes: W_HORIZON if a time lies beyond the training window


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


@torch.inference_mode()
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
) -> Trajectory:
    """Scans (T, 1, D, H, W) in [0, 1] taken at `times_given`; returns the scans at `times`, decoded one at a time.

    `lung` (D, H, W) bool is the baseline's; without it everything may change. `requantise` puts predicted codes onto
    the codebook before decoding. Raises DataError E_GIVEN for fewer than two scans, E_TIMES for times that cannot be
    used, E_VALUE for another shape, E_NAN for values that are not finite; ModelError E_UNSUPPORTED for samples > 0:
    this model has one trajectory.
    """
    if samples != 0:
        found = f"{samples} samples" + (" from a generator" if generator is not None else "")
        raise ModelError("E_UNSUPPORTED", where="samples", found=found, wanted="0: the latent ODE is deterministic")
    check_world(model)
    given = _check_given(scans, times_given, model)
    asked = snap_times([float(s) for s in times], model.ode.spec.grid)
    if not asked or not all(given[0] - SAME_TIME_YEARS <= s < math.inf for s in asked):
        raise DataError("E_TIMES", where="times", found=str(asked), wanted=f"years from {given[0]} on")
    with evaluating(model):
        latents = encode_given(model, scans, given, lung)
        zhat = predict_codes(model, latents, asked)
        decoded = [decode_codes(model, latents, z, requantise=requantise) for z in zhat]
        volumes = [volume for volume, _ in decoded]
        if detail == "residual":
            volumes = residual_volumes(model, latents, scans, asked, zhat)
    indices = torch.stack([codes for _, codes in decoded])
    shares = [code_histogram(codes, latents.lung, model.vqgan.spec.n_codes) for codes in indices]
    beyond = max(asked) > model.ode.spec.t_scale_years + SAME_TIME_YEARS
    return Trajectory(
        times=tuple(float(s) for s in times),
        kinds=tuple(_kind(s, given) for s in asked),
        volumes=tuple(volumes),
        indices=indices,
        histograms=torch.stack(shares),
        flags=("W_HORIZON",) if beyond else (),
    )


@dataclass(frozen=True)
class GivenLatents:
    """The given scans of one patient as the ODE sees them."""

    years: tuple[float, ...]
    z: Tensor  # (T, c, d, h, w), on the codebook, not masked
    indices: Tensor  # (T, d, h, w) int64
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


def encode_given(model: WorldModel, scans: Tensor, years: Sequence[float], lung: Tensor | None) -> GivenLatents:
    """Encode and quantise scans (T, 1, D, H, W), one at a time."""
    coded = [model.vqgan.quantise(model.vqgan.encode(scan[None].to(model.device) - 0.5)) for scan in scans]
    voxels = torch.ones(scans.shape[2:], dtype=torch.bool) if lung is None else lung.cpu().bool()
    return GivenLatents(
        years=tuple(years),
        z=torch.cat([one.z_q for one in coded]),
        indices=torch.cat([one.indices for one in coded]),
        lung=latent_mask(voxels, model.vqgan.spec.compression).to(model.device),
        lung_voxels=voxels,
    )


def predict_codes(model: WorldModel, given: GivenLatents, times: Sequence[float]) -> Tensor:
    """Predicted codes (S, c, d, h, w) at `times`, in any order, none before the first scan; zero outside the lung."""
    t = torch.tensor([given.years], dtype=torch.float32, device=given.z.device)
    s = torch.tensor([list(times)], dtype=torch.float32, device=given.z.device)
    zhat: Tensor = model.ode(given.z[None], t, torch.ones_like(t, dtype=torch.bool), s, given.lung[None])
    return zhat[0]


def decode_codes(model: WorldModel, given: GivenLatents, z: Tensor, *, requantise: bool) -> tuple[Tensor, Tensor]:
    """Decode z (c, d, h, w) with the baseline's codes outside the lung.

    Returns x01 (D, H, W) and the codes (d, h, w) of the re-quantised grid, both on the CPU.
    """
    quantised = model.vqgan.quantise(z[None])
    indices = torch.where(given.lung, quantised.indices[0], given.indices[0])
    inside = model.vqgan.embed(indices[None]) if requantise else torch.where(given.lung, z, given.z[0])[None]
    volume = (model.vqgan.decode(inside)[0, 0].float() + 0.5).clamp(0, 1).cpu()
    return volume, indices.cpu()


def residual_volumes(
    model: WorldModel, given: GivenLatents, scans: Tensor, times: Sequence[float], zhat: Tensor
) -> list[Tensor]:
    """Scans x01 (D, H, W) with residual detail, one for each of `times`; zhat (S, c, d, h, w) as predicted for them."""
    bases = [base_index(s, given.years) for s in times]
    needed = sorted(set(bases))
    at_base = predict_codes(model, given, [given.years[i] for i in needed])
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
