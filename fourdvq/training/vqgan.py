"""Stage 1 at one site: a plain loop over scans. Source: paper section 2.1 and appendix A.1.

One generator forward per micro-batch (one scan); `accumulate` micro-batches per optimiser step; then the generator's
step and, from `gan.start_step` on, the discriminators' step on the detached output of the same forward. Steps are
counted over the whole experiment: `global_step` is what the round starts with, at every site alike.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourdvq.errors import CohortError, ModelError
from fourdvq.federation.codebook import CodebookState, CodebookStats, RunningStats, merge_codebooks
from fourdvq.losses import adaptive_weight, l1_loss
from fourdvq.models.codebook import assignment_sums
from fourdvq.models.discriminators import axial_slices
from fourdvq.models.vqgan import (
    VQGAN3d,
    VQOutput,
    codebook_state,
    generator_weights,
    load_codebook,
    load_generator,
    load_strict,
)
from fourdvq.perceptual import load_perceptual
from fourdvq.plan import Plan
from fourdvq.training.adversary import Adversary, Judgement
from fourdvq.training.checkpoint import TrainState
from fourdvq.training.optimiser_state import pack_adam, unpack_adam
from fourdvq.training.precision import autocast
from fourdvq.training.sampling import EpochSampler, ScanSource
from fourdvq.training.seeds import generator, seeded
from fourdvq.training.update import delta

DISCRIMINATOR_PREFIX = "discriminators."
OnStep = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class VqganRound:
    """What a round at a site gives: the weights' change and the codebook sums (whole round), and how it went."""

    delta: dict[str, Tensor]
    stats: CodebookStats
    scans_used: int  # different scans
    patients_used: int  # different patients
    losses: dict[str, float]  # means over the round's micro-batches


class VqganTrainer:
    """Generator, discriminators, optimisers and random streams of one site.

    `seed` is the site's own (scan order, slices, discriminators); the generator starts from `plan.seed`. A federated
    site keeps its codes fixed during a round, or lets them drift where `federation.codebook_sync` says `local_ema`;
    `single_site` seeds and moves them by itself after every micro-batch. Raises ModelError E_WEIGHTS without the
    perceptual file that the plan asks for.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: str | torch.device = "cpu",
        seed: int,
        single_site: bool = False,
        perceptual_file: Path | None = None,
    ):
        self.plan = plan
        self.device = torch.device(device)
        self.seed = seed
        self.single_site = single_site
        self.global_step = 0
        self.model = initial_model(plan).to(self.device)
        self.optimiser = self._adam(self.model)
        self.adversary: Adversary | None = None
        self.adversary_optimiser: torch.optim.Adam | None = None
        if _shares_discriminators(plan):
            self._wake_adversary()
        self.perceptual: nn.Module | None = None
        if plan.vqgan.perceptual != "none":
            self.perceptual = load_perceptual(perceptual_file, plan.vqgan.perceptual_sha256).to(self.device)
        self.random = generator(seed, "training")
        self.sampler = EpochSampler(generator(seed, "sampler"))

    def weights(self) -> dict[str, Tensor]:
        """Copies of what this plan shares: the generator and, where they are shared, the discriminators."""
        return _with_discriminators(generator_weights(self.model), self._shared_adversary())

    def load_global(self, weights: Mapping[str, Tensor], codebook: CodebookState) -> None:
        """Take the round's global weights and codebook; optimiser moments stay. ModelError E_WEIGHTS on any misfit."""
        shared = self._shared_adversary()
        own = {n: t for n, t in weights.items() if not n.startswith(DISCRIMINATOR_PREFIX) or shared is None}
        load_generator(self.model, own)
        if shared is not None:
            rest = {n.removeprefix(DISCRIMINATOR_PREFIX): t for n, t in weights.items() if n not in own}
            load_strict(shared.state_dict(), rest, what="the discriminators")
        load_codebook(self.model, codebook)

    def train(
        self,
        scans: ScanSource,
        *,
        steps: int,
        global_step: int,
        decay_per_round: float,
        on_step: OnStep | None = None,
    ) -> VqganRound:
        """One round of `steps` optimiser steps, counted from `global_step`.

        `decay_per_round` is D of the codebook sums. `on_step` gets the global step and the step's mean losses.
        Raises CohortError E_FEW without scans, and ModelError E_NONFINITE when a loss or gradient is not finite: the
        step is not taken, so weights and optimisers are those of the last good step.
        """
        if not len(scans):
            raise CohortError("E_FEW", where="training scans", found="none", wanted="at least one")
        self._need_seeded_codebook()
        before = self.weights()
        anchors = [p.detach().clone() for p in self.model.parameters()] if self.plan.federation.proximal_mu else []
        micro_batches = steps * self.plan.vqgan.accumulate
        spec = self.plan.model
        running = RunningStats(
            spec.n_codes, spec.code_dim, decay_per_round=decay_per_round, micro_batches=micro_batches
        )
        used: set[int] = set()
        totals: dict[str, float] = defaultdict(float)
        self.model.train()
        for step in range(global_step, global_step + steps):
            losses = self._optimiser_step(scans, step, running, used, anchors)
            self.global_step = step + 1
            for name, value in losses.items():
                totals[name] += value / steps
            if on_step:
                on_step(step, losses)
        self.model.eval()
        patients = {scans.patient_of(index) for index in used}
        return VqganRound(delta(before, self.weights()), running.result(), len(used), len(patients), dict(totals))

    def state(self) -> TrainState:
        """All that training depends on: restoring it and training on gives the same bits on a CPU."""
        tensors = {f"model.{n}": t.detach().cpu().clone() for n, t in self.model.state_dict().items()}
        tensors |= pack_adam("adam", self.optimiser)
        tensors |= {
            "random": self.random.get_state(),
            "sampler.random": self.sampler.generator.get_state(),
            "sampler.order": self.sampler.order.clone(),
        }
        if self.adversary is not None and self.adversary_optimiser is not None:
            tensors |= {f"adversary.{n}": t.detach().cpu().clone() for n, t in self.adversary.state_dict().items()}
            tensors |= pack_adam("adversary_adam", self.adversary_optimiser)
        meta: dict[str, Any] = {
            "plan": self.plan.hash,
            "global_step": self.global_step,
            "sampler_position": self.sampler.position,
            "has_adversary": self.adversary is not None,
        }
        return TrainState(tensors, meta)

    def restore(self, state: TrainState) -> None:
        """Continue from `state`. ModelError E_CHECKPOINT for another plan's, E_WEIGHTS for tensors that do not fit."""
        if state.meta["plan"] != self.plan.hash:
            raise ModelError(
                "E_CHECKPOINT", where="training state", found="a state of another plan", wanted="this plan's"
            )
        tensors = state.tensors
        load_strict(self.model.state_dict(), _below(tensors, "model."), what="the model")
        unpack_adam(self.optimiser, _below(tensors, "adam."))
        if state.meta["has_adversary"]:
            adversary, optimiser = self._wake_adversary()
            load_strict(adversary.state_dict(), _below(tensors, "adversary."), what="the discriminators")
            unpack_adam(optimiser, _below(tensors, "adversary_adam."))
        self.random.set_state(tensors["random"])
        self.sampler.generator.set_state(tensors["sampler.random"])
        self.sampler.order = tensors["sampler.order"].clone()
        self.sampler.position = state.meta["sampler_position"]
        self.global_step = state.meta["global_step"]

    def _optimiser_step(
        self, scans: ScanSource, step: int, running: RunningStats, used: set[int], anchors: list[Tensor]
    ) -> dict[str, float]:
        adversary = self.adversary
        if self.plan.gan.loss != "none" and step >= self.plan.gan.start_step:
            adversary, _ = self._wake_adversary()
        else:
            adversary = None
        # Batch statistics move in the forward pass, before anyone knows whether the loss is finite.
        statistics = {n: b.clone() for n, b in self.model.named_buffers() if "running_" in n}
        accumulate = self.plan.vqgan.accumulate
        totals: dict[str, float] = defaultdict(float)
        self._zero_gradients()
        try:
            for _ in range(accumulate):
                index = self.sampler.next(len(scans))
                losses = self._micro_batch(scans[index], adversary, running)
                used.add(index)
                for name, value in losses.items():
                    totals[name] += value / accumulate
            self._apply_gradients(adversary, anchors)
        except ModelError:
            self._zero_gradients()
            load_strict({n: self.model.get_buffer(n) for n in statistics}, statistics, what="batch statistics")
            raise
        return dict(totals)

    def _micro_batch(self, x01: Tensor, adversary: Adversary | None, running: RunningStats) -> dict[str, float]:
        scan = x01.to(self.device).unsqueeze(0) - 0.5
        self._seed_codebook_once(scan)
        rows = torch.randint(scan.shape[2], (len(scan),), generator=self.random)
        training, gan = self.plan.vqgan, self.plan.gan
        with autocast(self.device, training.precision):
            out = self.model(scan)
        parts = {"loss_rec": l1_loss(out.recon, scan), "loss_commit": out.commitment}
        total = training.l1_weight * parts["loss_rec"] + training.commitment * out.commitment + out.codebook_loss
        if self.plan.model.quantiser == "loss":
            parts["loss_codebook"] = out.codebook_loss
        if self.perceptual is not None:
            with autocast(self.device, training.precision):
                parts["loss_perceptual"] = self.perceptual(axial_slices(out.recon, rows), axial_slices(scan, rows))
            total = total + training.perceptual_weight * parts["loss_perceptual"]
        judgement: Judgement | None = None
        if adversary is not None:
            with autocast(self.device, training.precision):
                judgement = adversary.judge(scan, out.recon, rows)
            weight = gan.weight * self._balance(total, judgement.adversarial)
            parts |= {"loss_adversarial": judgement.adversarial, "loss_matching": judgement.matching}
            total = total + weight * judgement.adversarial + gan.feature_matching * judgement.matching
        values = _finite_values({**parts, "loss_total": total})
        torch.autograd.backward(total / training.accumulate)
        if adversary is not None and judgement is not None:
            with autocast(self.device, training.precision):
                own = adversary.own_loss(scan, out.recon, judgement)
            values |= _finite_values({"loss_discriminator": own})
            torch.autograd.backward(own / training.accumulate)
        self._collect(out, running)
        return values

    def _balance(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor | float:
        if not self.plan.gan.adaptive_weight:
            return 1.0
        return adaptive_weight(reconstruction, adversarial, self.model.decoder.last.conv.weight)

    def _collect(self, out: VQOutput, running: RunningStats) -> None:
        """Add this micro-batch to the round's sums and, where this trainer owns the codes, move them."""
        spec = self.plan.model
        vectors = out.z.detach().float().movedim(1, -1).reshape(-1, spec.code_dim)
        counts, sums = assignment_sums(vectors, out.indices.flatten(), spec.n_codes)
        running.add(counts, sums)
        drifting = self.single_site or self.plan.federation.codebook_sync == "local_ema"
        if spec.quantiser == "ema" and drifting:
            # The rate is per optimiser step; a federated site follows the round's.
            decay = spec.ema_decay ** (1.0 / self.plan.vqgan.accumulate) if self.single_site else running.decay
            stats = CodebookStats(counts.cpu(), sums.cpu())
            load_codebook(self.model, merge_codebooks(codebook_state(self.model), [stats], decay=decay))

    def _apply_gradients(self, adversary: Adversary | None, anchors: list[Tensor]) -> None:
        mu = self.plan.federation.proximal_mu
        for parameter, anchor in zip(self.model.parameters(), anchors, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=mu)  # of mu/2 |w - w_global|^2, FedProx
        clip = self.plan.vqgan.clip
        norms = [nn.utils.clip_grad_norm_(self.model.parameters(), clip)]
        if adversary is not None:
            norms.append(nn.utils.clip_grad_norm_(adversary.parameters(), clip))
        for norm in norms:
            if not math.isfinite(float(norm)):
                raise ModelError("E_NONFINITE", where="gradient norm", found=str(float(norm)), wanted="a finite norm")
        self.optimiser.step()
        if adversary is not None and self.adversary_optimiser is not None:
            self.adversary_optimiser.step()

    def _zero_gradients(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        if self.adversary_optimiser is not None:
            self.adversary_optimiser.zero_grad(set_to_none=True)

    def _need_seeded_codebook(self) -> None:
        if not self.single_site and not bool(self.model.codebook.is_seeded):
            raise ModelError(
                "E_WEIGHTS",
                where="codebook",
                found="codes that were never set",
                wanted="the global codebook: a site that seeded its own would give code k a meaning of its own",
            )

    def _seed_codebook_once(self, scan: Tensor) -> None:
        if bool(self.model.codebook.is_seeded):
            return
        with torch.no_grad(), autocast(self.device, self.plan.vqgan.precision):
            z = self.model.encode(scan)
        self.model.codebook.seed_from(z.movedim(1, -1).reshape(-1, z.shape[1]), self.random)

    def _wake_adversary(self) -> tuple[Adversary, torch.optim.Adam]:
        """The discriminators, built when first needed: until then they cost neither memory nor time."""
        if self.adversary is None or self.adversary_optimiser is None:
            seed = self.plan.seed if _shares_discriminators(self.plan) else self.seed
            self.adversary = Adversary(self.plan.gan, seed=seed).to(self.device)
            self.adversary_optimiser = self._adam(self.adversary)
        return self.adversary, self.adversary_optimiser

    def _shared_adversary(self) -> Adversary | None:
        return self.adversary if _shares_discriminators(self.plan) else None

    def _adam(self, network: nn.Module) -> torch.optim.Adam:
        training = self.plan.vqgan
        return torch.optim.Adam(network.parameters(), lr=training.lr, betas=training.betas)


def initial_model(plan: Plan) -> VQGAN3d:
    """The generator as `plan.seed` makes it, the same on every machine; the codebook is not seeded."""
    with seeded(plan.seed, "generator"):
        return VQGAN3d(plan.model)


def initial_weights(plan: Plan) -> dict[str, Tensor]:
    """The global weights before the first round: names, shapes and dtypes of every task and update of this plan."""
    shared = Adversary(plan.gan, seed=plan.seed) if _shares_discriminators(plan) else None
    return _with_discriminators(generator_weights(initial_model(plan)), shared)


def _shares_discriminators(plan: Plan) -> bool:
    return plan.gan.loss != "none" and plan.gan.discriminators == "shared"


def _with_discriminators(weights: dict[str, Tensor], shared: Adversary | None) -> dict[str, Tensor]:
    if shared is None:
        return weights
    named = shared.state_dict().items()
    return weights | {DISCRIMINATOR_PREFIX + n: t.detach().to("cpu", copy=True) for n, t in named}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _finite_values(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """The losses as floats, moved off the device at once; ModelError E_NONFINITE for the first that is not finite."""
    numbers = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
    values = dict(zip(losses, numbers, strict=True))
    for name, value in values.items():
        if not math.isfinite(value):
            raise ModelError("E_NONFINITE", where=name, found=str(value), wanted="a finite loss")
    return values
