"""Stage 2: training of the latent disease ODE from cached codes. Encoder, codebook and decoder stay as they are.

Source: paper section 2.2 and appendix A.2; decisions in docs/reference/model.md section 3.

What is given. The paper's models (`anchor: identity`, `paper`) read all scans and are scored on all of them. A model
that starts at the last given scan would then have nothing left to predict, so for `anchor: last_given` each draw gives
the first k scans, k drawn evenly from min(2, T - 1) to T - 1, and the later scans are targets: the situation of a
forecast. A patient with two scans gives the first and is asked for the second. Scans where the prediction is exact by
construction (the anchors) are left out of the means. `mask_prob` hides given scans other than the baseline.

Precision. With `ode.precision: bf16` the convolutions run in bfloat16 where this machine gets that right; states, sums
over time, codes and losses are float32. dopri5 always runs in float32: its step follows differences that bfloat16
rounds away. What a trained model predicts is always computed in float32.

A variational model draws one course per draw of a patient, and pays `kl_weight` for each nat of its random part.

Randomness is a function of (seed, number of patients drawn so far), so a restored trainer goes on as if never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fourdvq.data.latents import LatentPatient
from fourdvq.errors import DataError, ModelError
from fourdvq.models.latent_ode import LatentODE, snap_times
from fourdvq.models.vqgan import load_strict
from fourdvq.plan import OdeTraining, Plan, TemporalSpec
from fourdvq.training.checkpoint import TrainState
from fourdvq.training.optimiser_state import pack_adam, unpack_adam
from fourdvq.training.precision import autocast
from fourdvq.training.seeds import derive_seed, seeded
from fourdvq.training.update import delta as weight_delta

OnStep = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class OdeRound:
    """What a round leaves: the weight delta, how many different patients it saw, and the mean losses."""

    delta: dict[str, Tensor]
    patients_used: int
    losses: dict[str, float]


@dataclass(frozen=True)
class OdeLosses:
    """Scalars: `total` is what is minimised."""

    total: Tensor
    recon: Tensor
    diff: Tensor
    drift: Tensor | None = None  # of the lung's mean
    kl: Tensor | None = None  # nats, of a variational model


@dataclass(frozen=True)
class Given:
    """What a draw may read: observed (T,) bool, `last` the index of the last of them; exact (T,) bool: the anchors."""

    observed: np.ndarray
    last: int
    exact: np.ndarray


def choose_given(n_scans: int, spec: TemporalSpec, rng: np.random.Generator) -> Given:
    """Choose the inputs of one draw among n_scans >= 2 scans; the module's docstring says how."""
    forecasts = spec.anchor == "last_given" and spec.skip
    k = int(rng.integers(min(2, n_scans - 1), n_scans)) if forecasts else n_scans
    observed = np.arange(n_scans) < k
    observed[1:] &= rng.random(n_scans - 1) >= spec.mask_prob
    last = int(np.flatnonzero(observed)[-1])
    exact = np.zeros(n_scans, dtype=bool)
    if spec.skip and spec.anchor != "paper":
        exact[0] = True
        exact[last] |= forecasts
    return Given(observed, last, exact)


def time_weights(n_scans: int, rise: tuple[float, float]) -> np.ndarray:
    """Weights (T,) that rise linearly over the order of the scans, scaled to mean 1. Paper, appendix A.2."""
    weights: np.ndarray = np.linspace(rise[0], rise[1], n_scans)
    return np.asarray(weights / weights.mean())


def trajectory_loss(
    zhat: Tensor,
    zq: Tensor,
    lung: Tensor,
    exact: np.ndarray,
    optim: OdeTraining,
    weights: np.ndarray,
    means: Tensor | None = None,
) -> OdeLosses:
    """Loss of one patient inside the lung: predicted and true codes (T, c, d, h, w), lung (d, h, w) bool.

    recon = mean over free scans i of w_i mean |zhat_i - zq_i|^2; diff = the same for the changes between neighbouring
    scans; drift = the same for the changes of the lung's mean, the true ones from `means` (T, c), the encoder's output
    before quantisation (without it, or with weight 0, there is none). Scans (pairs) whose `exact` flags leave nothing
    to learn are not counted. Raises DataError E_MASK if no latent lies in the lung.
    """
    if not bool(lung.any()):
        raise DataError("E_MASK", where="latent lung mask", found="empty")
    error = (zhat - zq)[:, :, lung]
    w = torch.as_tensor(weights, dtype=error.dtype, device=error.device)
    free = torch.as_tensor(~exact, device=error.device)
    moving = torch.as_tensor(~(exact[1:] & exact[:-1]), device=error.device)
    recon = (w * error.square().mean(dim=(1, 2)))[free].mean()
    diff = (w[1:] * (error[1:] - error[:-1]).square().mean(dim=(1, 2)))[moving].mean()
    total = optim.lambda_recon * recon + optim.lambda_diff * diff
    if means is None or not optim.lambda_drift:
        return OdeLosses(total, recon, diff)
    moved = zhat[:, :, lung].mean(dim=2).diff(dim=0) - means.diff(dim=0)
    drift = (w[1:] * moved.square().mean(dim=1))[moving].mean()
    return OdeLosses(total + optim.lambda_drift * drift, recon, diff, drift)


def initial_ode(plan: Plan) -> LatentODE:
    """The untrained model that every site and the coordinator start from: a function of the plan alone."""
    with seeded(plan.seed, "latent_ode"):
        return LatentODE(plan.temporal, plan.model.code_dim)


class OdeTrainer:
    """Trains a LatentODE at one site. `codebook` (K, c) embeds the cached codes; `tokenizer_sha256` names it.

    `seed` is the site's own (order of patients, given scans). The optimiser's moments stay at the site over rounds;
    everything that matters for the next step is in `state()`. `federation.proximal_mu` pulls towards the weights that
    the round started from (FedProx).
    """

    def __init__(
        self, plan: Plan, codebook: Tensor, *, device: str = "cpu", seed: int, tokenizer_sha256: str = ""
    ) -> None:
        self.plan = plan
        self.seed = seed
        self.device = torch.device(device)
        self.codebook = codebook.detach().to(self.device, torch.float32)
        self.tokenizer_sha256 = tokenizer_sha256
        self.model = initial_ode(plan).to(self.device)
        optim = plan.ode
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )
        self.drawn = 0

    def load_global(self, weights: Mapping[str, Tensor]) -> None:
        """Start the round from the coordinator's weights. Raises ModelError E_WEIGHTS if they do not fit."""
        load_strict(self.model.state_dict(), weights, what="the latent ODE")

    def train(self, patients: Sequence[LatentPatient], *, steps: int, on_step: OnStep | None = None) -> OdeRound:
        """Take `steps` optimiser steps of `plan.ode.accumulate` patients each.

        Patients with one scan (or one time on the half-year grid) are left out. Raises DataError E_FEW if none is left,
        ModelError E_TOKENIZER for codes of another tokenizer, ModelError E_NONFINITE if the loss is not finite; then
        the weights are those before the failing step.
        """
        usable = self._usable(patients)
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        sums: dict[str, float] = {}
        used: set[str] = set()
        for step in range(steps):
            losses = self._step(usable, used, before)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
            if on_step is not None:
                on_step(step, losses)
        means = {name: value / max(steps, 1) for name, value in sums.items()}
        return OdeRound(weight_delta(before, self.model.state_dict()), len(used), means)

    def _usable(self, patients: Sequence[LatentPatient]) -> list[LatentPatient]:
        wanted = self.tokenizer_sha256 or (patients[0].tokenizer_sha256 if patients else "")
        if any(patient.tokenizer_sha256 != wanted for patient in patients):
            raise ModelError("E_TOKENIZER", where="cached codes", wanted=wanted)
        usable = [patient for patient in patients if len(distinct_scans(patient.years, self.plan.temporal.grid)) > 1]
        if not usable:
            raise DataError("E_FEW", where="stage 2", found="no patient with two scans at different times")
        # The order of files must not matter.
        return sorted(usable, key=lambda patient: patient.pseudonym)

    def _step(self, patients: list[LatentPatient], used: set[str], start: Mapping[str, Tensor]) -> dict[str, float]:
        n = self.plan.ode.accumulate
        sums: dict[str, float] = {}
        self.optimiser.zero_grad(set_to_none=True)
        for _ in range(n):
            rng = np.random.default_rng(derive_seed(self.seed, "ode-given", self.drawn))
            patient = patients[self._draw(len(patients))]
            used.add(patient.pseudonym)
            losses = self.loss_of(patient, rng)
            (losses.total / n).backward()
            parts = {"loss": losses.total, "recon": losses.recon, "diff": losses.diff, "drift": losses.drift}
            parts["kl"] = losses.kl
            for name, value in parts.items():
                if value is not None:
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / n
        self._pull_towards(start)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.ode.clip)
        if not (math.isfinite(sums["loss"]) and math.isfinite(float(norm))):
            raise ModelError("E_NONFINITE", where="stage 2 loss", found=str(sums["loss"]))
        self.optimiser.step()
        return sums

    def _pull_towards(self, start: Mapping[str, Tensor]) -> None:
        mu = self.plan.federation.proximal_mu
        for name, parameter in self.model.named_parameters() if mu else ():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start[name], alpha=mu)

    def _draw(self, n_patients: int) -> int:
        epoch, position = divmod(self.drawn, n_patients)
        self.drawn += 1
        return int(np.random.default_rng(derive_seed(self.seed, "ode-epoch", epoch)).permutation(n_patients)[position])

    def loss_of(self, patient: LatentPatient, rng: np.random.Generator) -> OdeLosses:
        """The loss of one draw of one patient; `rng` decides which scans are given."""
        spec, optim = self.plan.temporal, self.plan.ode
        keep = distinct_scans(patient.years, spec.grid)
        years = snap_times([float(patient.years[i]) for i in keep], spec.grid)
        given = choose_given(len(keep), spec, rng)
        zq, lung = embed(patient, self.codebook, keep)
        means = patient.means[keep].to(self.device, torch.float32)
        t = torch.tensor([years], dtype=torch.float32, device=self.device)
        observed = torch.as_tensor(given.observed, device=self.device)[None]
        last = torch.tensor([given.last], device=self.device)
        with autocast(self.device, "fp32" if spec.solver == "dopri5" else optim.precision):
            start = self.model.initial_state(zq[None], t, observed, lung[None], means[None])
            noise = None
            if start.mean is not None:
                noise = torch.as_tensor(rng.standard_normal(start.mean.shape), dtype=torch.float32, device=self.device)
            zhat = self.model(zq[None], t, observed, t, lung[None], last, noise=noise, initial=start)[0]
        weights = time_weights(len(keep), optim.weight_rise)
        losses = trajectory_loss(zhat, zq, lung, given.exact, optim, weights, means)
        if start.mean is None:
            return losses
        kl = start.kl().mean()
        return replace(losses, total=losses.total + optim.kl_weight * kl, kl=kl)

    def state(self) -> TrainState:
        """Weights, optimiser moments and the sampler's position."""
        tensors = {f"model.{name}": tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        tensors |= pack_adam("optimiser", self.optimiser)
        return TrainState(tensors=tensors, meta={"plan": self.plan.hash, "drawn": self.drawn, "seed": self.seed})

    def restore(self, state: TrainState) -> None:
        """Go on from `state`. Raises ModelError E_CHECKPOINT if it is of another plan, E_WEIGHTS if it does not fit."""
        if state.meta["plan"] != self.plan.hash:
            raise ModelError(
                "E_CHECKPOINT", where="training state", found="a state of another plan", wanted="this plan's"
            )
        self.load_global(_under("model.", state.tensors))
        unpack_adam(self.optimiser, _under("optimiser.", state.tensors))
        self.drawn = int(state.meta["drawn"])
        self.seed = int(state.meta["seed"])


def distinct_scans(years: Tensor, grid: str) -> list[int]:
    """Indices of the scans at times of their own, in time order; of equal times (on the grid) the first scan stays."""
    exact = [float(y) for y in years]
    snapped = snap_times(exact, grid)
    kept: dict[float, int] = {}
    for i in sorted(range(len(exact)), key=exact.__getitem__):
        kept.setdefault(snapped[i], i)
    return list(kept.values())


def embed(patient: LatentPatient, codebook: Tensor, keep: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Code vectors (T, c, d, h, w) of the chosen scans, zero outside the lung, and the lung (d, h, w) bool."""
    lung = patient.lung.to(codebook.device, torch.bool)
    indices = patient.indices[list(keep)].to(codebook.device, torch.int64)
    zq = codebook[indices].movedim(-1, 1)
    return zq * lung.to(zq.dtype), lung


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
