"""Training in several processes of one machine: what one of them does, and how to start them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from fourdvq.errors import FourdvqError
from fourdvq.plan import Plan
from fourdvq.training.checkpoint import TrainState, save_state
from fourdvq.training.distributed import ALONE, Ranks, joined
from fourdvq.training.vqgan import VqganTrainer
from vqgan_cases import NO_GAN, SMALL_GAN, Scans, first_codebook, tiny_plan

DECAY = 0.37
STEPS = 2


class DyingScans(Scans):
    """The machine takes the process away when it reads its third scan."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.reads = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads += 1
        if self.reads == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def shared_plan(judged: bool = False) -> Plan:
    """Three scans a step: two processes get two and one. `judged`: discriminators from the second step on."""
    return tiny_plan(gan=replace(SMALL_GAN, start_step=1) if judged else NO_GAN, accumulate=3)


def train_alone(out: Path, *, judged: bool = False) -> None:
    """One process with all scans of a step."""
    _train(out, Scans(5), ALONE, judged)


def start(
    world: int, folder: Path, *, dying: int = -1, judged: bool = False, timeout_s: float = 60.0
) -> list[BaseProcess]:
    """`world` processes that train together; process r writes its state and round to folder/r, or its error's code."""
    context = multiprocessing.get_context("spawn")
    processes = []
    for rank in range(world):
        arguments = (rank, world, folder, rank == dying, judged, timeout_s)
        processes.append(context.Process(target=_one, args=arguments, daemon=True))
        processes[-1].start()
    return list(processes)


def _one(rank: int, world: int, folder: Path, dies: bool, judged: bool, timeout_s: float) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    device = torch.device("cpu")
    try:
        with joined(folder / "meeting", rank, world, device=device, timeout_s=timeout_s) as ranks:
            _train(folder / str(rank), DyingScans(5) if dies else Scans(5), ranks, judged)
    except FourdvqError as error:
        (folder / f"{rank}.code").write_text(error.code)


def _train(out: Path, scans: Scans, ranks: Ranks, judged: bool) -> None:
    plan = shared_plan(judged)
    trainer = VqganTrainer(plan, seed=5, ranks=ranks)
    trainer.load_global(trainer.weights(), first_codebook(plan, Scans(5)))
    done = trainer.train(scans, steps=STEPS, global_step=0, decay_per_round=DECAY)
    save_state(out, trainer.state())
    facts = {"losses": done.losses, "used": [done.scans_used, done.patients_used]}
    tensors = {"counts": done.stats.counts, "sums": done.stats.sums, "code_patients": done.code_patients}
    save_state(out / "round", TrainState(tensors | {f"delta.{n}": t for n, t in done.delta.items()}, facts))
