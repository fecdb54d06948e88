"""Stage 1 at one site: a plain loop over scans. Source: paper section 2.1 and appendix A.1.

`accumulate` scans per optimiser step, whose gradients `fourdvq.training.vqgan_step` adds up; then the generator's step
and, from `gan.start_step` on, the discriminators'. Steps are counted over the whole experiment: `global_step` is what
the round starts with, at every site alike. A step is drawn first and then worked on, so that a step which is cut
smaller, spread over devices or left out takes nothing from the random streams that another run would not take.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fourdvq.errors import CohortError, ModelError
from fourdvq.federation.codebook import CodebookState, CodebookStats, merge_codebooks
from fourdvq.models.vqgan import (
    VQGAN3d,
    codebook_state,
    generator_weights,
    load_codebook,
    load_generator,
    load_strict,
)
from fourdvq.perceptual import load_perceptual
from fourdvq.plan import Plan
from fourdvq.training.acceleration import adam, forward_of, in_layout, memory_format
from fourdvq.training.adversary import Adversary
from fourdvq.training.checkpoint import TrainState
from fourdvq.training.distributed import ALONE, Ranks, check_divisible
from fourdvq.training.hardware import DEFAULT, Hardware
from fourdvq.training.memory import Fit, free_device_memory, is_out_of_memory, set_recompute
from fourdvq.training.optimiser_state import pack_adam, unpack_adam
from fourdvq.training.precision import autocast
from fourdvq.training.round_sums import RoundSums
from fourdvq.training.sampling import EpochSampler, ScanSource
from fourdvq.training.seeds import generator, seeded
from fourdvq.training.update import delta
from fourdvq.training.vqgan_step import Draw, Part, StepGradients, loss_names, part_of

_log = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 3  # so many steps without a finite loss end the round
DISCRIMINATOR_PREFIX = "discriminators."
_TROUBLE = ("", "E_NONFINITE", "OUT_OF_MEMORY")  # of an attempt at a step, from none to the worst
OnStep = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class VqganRound:
    """What a round at a site gives: the weights' change and the codebook sums (whole round), and how it went."""

    delta: dict[str, Tensor]
    stats: CodebookStats
    scans_used: int  # different scans
    patients_used: int  # different patients
    code_patients: Tensor  # (K,) int64: different patients with at least one vector at each code
    losses: dict[str, float]  # means over the round's scans
    notes: tuple[str, ...] = ()  # codes of what a person at the site should know: W_MEMORY, W_SKIPPED


class VqganTrainer:
    """Generator, discriminators, optimisers and random streams of one site.

    `seed` is the site's own (scan order, slices, discriminators); the generator starts from `plan.seed`. A federated
    site keeps its codes fixed during a round, or lets them drift where `federation.codebook_sync` says `local_ema`;
    `single_site` seeds and moves them by itself after every scan. `hardware` and `ranks` say how this machine works and
    change nothing else. Raises ModelError E_WEIGHTS without the perceptual file that the plan asks for, and ConfigError
    E_UNSUPPORTED for a plan that several devices cannot share.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: str | torch.device = "cpu",
        seed: int,
        single_site: bool = False,
        perceptual_file: Path | None = None,
        hardware: Hardware = DEFAULT,
        ranks: Ranks = ALONE,
    ):
        self.drifting = plan.model.quantiser == "ema" and (single_site or plan.federation.codebook_sync == "local_ema")
        check_divisible(plan, ranks, drifting=self.drifting)
        self.plan = plan
        self.device = torch.device(device)
        self.seed = seed
        self.single_site = single_site
        self.global_step = 0
        self.ranks = ranks
        self.layout = memory_format(hardware, self.device)
        self.model = in_layout(initial_model(plan).to(self.device), self.layout)
        self.optimiser = adam(self.model, plan.vqgan, self.device)
        self.adversary: Adversary | None = None
        self.adversary_optimiser: torch.optim.Adam | None = None
        if _shares_discriminators(plan):
            self._wake_adversary()
        self.perceptual: nn.Module | None = None
        if plan.vqgan.perceptual != "none":
            self.perceptual = load_perceptual(perceptual_file, plan.vqgan.perceptual_sha256).to(self.device)
        forward = forward_of(self.model, hardware, self.device)
        self.step = StepGradients(plan, self.model, forward, self.perceptual, self.device, self.layout)
        self._cut(Fit(hardware.micro_batch if self._separable() else 1, hardware.memory == "low"))
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

        `decay_per_round` is D of the codebook sums. `on_step` gets the global step and the step's mean losses. A step
        whose loss or gradient is not finite is left out; weights and optimisers stay those of the last good step.
        Raises CohortError E_FEW without scans, ModelError E_NONFINITE after three such steps in a row or where none
        was good, and ModelError OUT_OF_MEMORY where the smallest cut of a step does not fit either.
        """
        if not len(scans):
            raise CohortError("E_FEW", where="training scans", found="none", wanted="at least one")
        self._need_seeded_codebook()
        before = self.weights()
        anchors = [p.detach().clone() for p in self.model.parameters()] if self.plan.federation.proximal_mu else []
        sums = RoundSums(self.plan, scans, decay_per_round=decay_per_round, steps=steps)
        self.model.train()
        cut = self.fit
        for step in range(global_step, global_step + steps):
            losses = self._optimiser_step(scans, step, sums, anchors)
            self.global_step = step + 1
            if losses is None and sums.skipped_in_a_row >= SKIPS_IN_A_ROW:
                _not_finite(f"steps {step + 1 - SKIPS_IN_A_ROW} to {step}")
            if losses is not None and on_step:
                on_step(step, losses)
        self.model.eval()
        if sums.skipped == steps:
            _not_finite("every step of the round")
        notes = ("W_MEMORY",) * (self.fit != cut) + ("W_SKIPPED",) * (sums.skipped > 0)
        return VqganRound(delta(before, self.weights()), *sums.result(), notes)

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
        self, scans: ScanSource, step: int, sums: RoundSums, anchors: Sequence[Tensor]
    ) -> dict[str, float] | None:
        """The step's mean losses, or None where it was left out. All processes of a site decide alike."""
        judged = self.plan.gan.loss != "none" and step >= self.plan.gan.start_step
        adversary = self._wake_adversary()[0] if judged else None
        draws = self._draws(scans, step)
        # What a forward pass moves before anyone knows whether the loss is finite: batch statistics, drifting codes.
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        while True:
            parts, trouble = self._attempt(scans, self.ranks.share(draws), adversary, sums)
            level = self.ranks.worst(_TROUBLE.index(trouble), self.device)
            if level == 0:
                all_parts = self._gathered(parts, draws, judged=judged)
                if self._apply_gradients(adversary, anchors):
                    return sums.add(draws, all_parts)
                level = _TROUBLE.index("E_NONFINITE")
            self._forget(buffers)
            if _TROUBLE[level] == "E_NONFINITE":
                sums.skip()
                return None
            self._cut_smaller()

    def _draws(self, scans: ScanSource, step: int) -> list[Draw]:
        """The scans of a step: a scan's crop depends on seed and step alone, the rest on the random streams."""
        draws = []
        size, crop = self.plan.model.size, self.plan.vqgan.crop
        for k in range(self.plan.vqgan.accumulate):
            index = self.sampler.next(len(scans))
            if crop is None:
                corner, depth = (0, 0, 0), size[0]
            else:
                place = generator(self.seed, "crop", step, k)
                z, y, x = (int(torch.randint(s - c + 1, (), generator=place)) for s, c in zip(size, crop, strict=True))
                corner, depth = (z, y, x), crop[0]
            if k == 0:
                self._seed_codebook_once(scans, Draw(index, corner, 0))
            draws.append(Draw(index, corner, int(torch.randint(depth, (1,), generator=self.random))))
        return draws

    def _attempt(
        self, scans: ScanSource, draws: Sequence[Draw], adversary: Adversary | None, sums: RoundSums
    ) -> tuple[list[Part], str]:
        """Gradients of this process's scans, and what went wrong: "", E_NONFINITE or OUT_OF_MEMORY."""
        self._zero_gradients()
        on_group = (lambda parts: self._drift(parts, sums.decay)) if self.drifting else _nothing
        try:
            return self.step.accumulate(scans, draws, adversary, at_once=self.fit.at_once, on_group=on_group), ""
        except ModelError as error:
            if error.code != "E_NONFINITE":
                raise
            _log.warning("%s", error)
            return [], error.code
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return [], "OUT_OF_MEMORY"

    def _gathered(self, parts: Sequence[Part], draws: Sequence[Draw], *, judged: bool) -> list[Part]:
        """The parts of all of the step's scans, from all processes, in the order of the draws."""
        if self.ranks.world == 1:
            return list(parts)
        spec, names = self.plan.model, loss_names(self.plan, judged=judged)
        width = spec.n_codes * (1 + spec.code_dim) + len(names)
        rows = torch.stack([p.row() for p in parts]) if parts else torch.zeros(0, width, dtype=torch.float64)
        gathered = self.ranks.gather(rows.to(self.device), len(draws))
        return [part_of(row, spec.n_codes, spec.code_dim, names) for row in gathered]

    def _apply_gradients(self, adversary: Adversary | None, anchors: Sequence[Tensor]) -> bool:
        """Take the optimisers' step unless a gradient is not finite; returns whether it was taken."""
        mu, clip = self.plan.federation.proximal_mu, self.plan.vqgan.clip
        networks: list[nn.Module] = [self.model] if adversary is None else [self.model, adversary]
        for network in networks:
            self.ranks.add_gradients(network.parameters())
        for parameter, anchor in zip(self.model.parameters(), anchors, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=mu)  # of mu/2 |w - w_global|^2, FedProx
        norms = [float(nn.utils.clip_grad_norm_(network.parameters(), clip)) for network in networks]
        if not all(map(math.isfinite, norms)):
            _log.warning("gradient norms %s are not finite", norms)
            return False
        self.optimiser.step()
        if adversary is not None and self.adversary_optimiser is not None:
            self.adversary_optimiser.step()
        return True

    def _drift(self, parts: Sequence[Part], decay: float) -> None:
        """Move this trainer's own codes by the scans just seen; a federated site follows the round's decay."""
        if self.single_site:  # whose rate is per optimiser step
            decay = self.plan.model.ema_decay ** (1.0 / self.plan.vqgan.accumulate)
        stats = [CodebookStats(part.counts.cpu(), part.sums.cpu()) for part in parts]
        load_codebook(self.model, merge_codebooks(codebook_state(self.model), stats, decay=decay))

    def _forget(self, buffers: Mapping[str, Tensor]) -> None:
        """Undo an attempt: no gradients, and the buffers of before."""
        self._zero_gradients()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def _cut(self, fit: Fit) -> None:
        self.fit = fit
        set_recompute(self.model, fit.recompute)

    def _cut_smaller(self) -> None:
        smaller = self.fit.smaller()
        if smaller is None:
            found = f"{self.fit.at_once} scan in a forward pass, blocks computed again"
            raise ModelError("OUT_OF_MEMORY", where="optimiser step", found=found)
        _log.warning("memory ran out with %s; the step is taken again with %s", self.fit, smaller)
        free_device_memory(self.device)
        self._cut(smaller)

    def _separable(self) -> bool:
        """Whether scans may go through together: not where a forward pass or a weight depends on the whole group."""
        return self.plan.model.norm == "group" and not self.drifting and not self.plan.gan.adaptive_weight

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

    def _seed_codebook_once(self, scans: ScanSource, draw: Draw) -> None:
        if bool(self.model.codebook.is_seeded):
            return
        with torch.no_grad(), autocast(self.device, self.plan.vqgan.precision):
            z = self.model.encode(self.step.volumes(scans, [draw]))
        self.model.codebook.seed_from(z.movedim(1, -1).reshape(-1, z.shape[1]), self.random)

    def _wake_adversary(self) -> tuple[Adversary, torch.optim.Adam]:
        """The discriminators, built when first needed: until then they cost neither memory nor time."""
        if self.adversary is None or self.adversary_optimiser is None:
            seed = self.plan.seed if _shares_discriminators(self.plan) else self.seed
            self.adversary = Adversary(self.plan.gan, seed=seed).to(self.device)
            self.adversary_optimiser = adam(self.adversary, self.plan.vqgan, self.device)
        return self.adversary, self.adversary_optimiser

    def _shared_adversary(self) -> Adversary | None:
        return self.adversary if _shares_discriminators(self.plan) else None


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


def _nothing(_parts: Sequence[Part]) -> None:
    """Codes stay where they are during the round."""


def _not_finite(where: str) -> NoReturn:
    raise ModelError("E_NONFINITE", where=where, found="losses or gradients that are not finite", wanted="finite ones")
