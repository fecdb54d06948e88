"""CPU time of one training step of generator and discriminators against the usual step, on one thread.

    python tests/benchmarks/vqgan_step.py --json [--quick]

Ours is the trainer's own code for the gradients of one scan. All variants and the usual step run in turns; a ratio is
of CPU seconds within one turn, and `holds` comes from the worse quartile.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _common import clock, emit, figure, quartiles  # type: ignore[import-not-found]
from _phantom_scans import MemoryScans  # type: ignore[import-not-found]
from _usual_step import UsualStep  # type: ignore[import-not-found]
from torch.nn import functional as F

from fourdvq.federation.codebook import CodebookState
from fourdvq.models.vqgan import load_codebook
from fourdvq.plan import GanSpec, ModelSpec, Plan, VqganTraining
from fourdvq.training.memory import keep_freed_memory
from fourdvq.training.precision import self_check
from fourdvq.training.vqgan import VqganTrainer

TURNS = 7
CODES, DIM = 256, 16
# name, decoder, precision, target
VARIANTS = (
    ("like for like, fp32", "tats", "fp32", 1.4),
    ("like for like, bf16", "tats", "bf16", 3.5),
    ("fast preset's decoder, fp32", "half", "fp32", 2.5),
    ("fast preset's decoder, bf16", "half", "bf16", 6.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (always done)")
    parser.add_argument("--quick", action="store_true", help="a smaller volume and network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    emit("vqgan_step", figures(options.quick), options.quick)


def figures(quick: bool) -> list[dict[str, Any]]:
    """Ratios of the usual step over ours, and how much faster this processor is in 16 bits at all."""
    keep_freed_memory()  # as in a site's worker; the usual step gains from it too
    size, width = ((16, 32, 32), 8) if quick else ((16, 64, 64), 32)
    started = clock()
    scan = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    usual = UsualStep(width, n_codes=CODES, dim=DIM, judges=2 * width)
    sound = self_check("cpu").sound
    variants = [v for v in VARIANTS if v[2] == "fp32" or sound]
    calls: list[Callable[[], object]] = [lambda: usual(scan[None] - 0.5, size[0] // 2)]
    calls += [_ours(scan, width, decoder, precision) for _, decoder, precision, _ in variants]
    times = _in_turns(calls)
    where = f"{'x'.join(map(str, size))}, h={width}"
    rows = [
        _row(f"usual step over ours, {where}, {name}", times[0], own, target, quick, clock() - started)
        for (name, _, _, target), own in zip(variants, times[1:], strict=True)
    ]
    if not sound:
        rows += [
            figure(
                f"usual step over ours, {where}, {v[0]}",
                None,
                "ratio",
                target=f">= {v[3]}",
                note=str(self_check("cpu")),
            )
            for v in VARIANTS
            if v[2] == "bf16"
        ]
    return [*rows, _arithmetic(sound)]


def _ours(scan: torch.Tensor, width: int, decoder: Any, precision: Any) -> Callable[[], object]:
    """The gradients of one scan as the trainer takes them, discriminators on."""
    _, *size = scan.shape
    plan = Plan(
        name="step",
        profile_sha256="0" * 64,
        model=ModelSpec(size=tuple(size), base_width=width, decoder=decoder, n_codes=CODES, code_dim=DIM),
        gan=GanSpec(width=2 * width, start_step=0),
        vqgan=VqganTraining(accumulate=1, precision=precision),
    )
    trainer = VqganTrainer(plan, seed=0)
    codes = torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(0))
    counts = torch.ones(CODES, dtype=torch.float64)
    load_codebook(trainer.model, CodebookState(codes, counts, codes.double()))
    trainer.model.train()
    adversary, _ = trainer._wake_adversary()
    scans = MemoryScans([scan])
    draws = trainer._draws(scans, 0)
    return lambda: trainer.step.accumulate(scans, draws, adversary, at_once=1, on_group=lambda _: None)


def _in_turns(calls: list[Callable[[], object]]) -> list[list[float]]:
    """CPU seconds of each call in each turn, after one turn that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(TURNS + 1):
        for own, call in zip(times, calls, strict=True):
            before = time.process_time()
            call()
            if turn:
                own.append(time.process_time() - before)
    return times


def _row(name: str, usual: list[float], ours: list[float], target: float, quick: bool, seconds: float) -> Any:
    low, middle, high = quartiles([u / o for u, o in zip(usual, ours, strict=True)])
    return figure(
        name,
        round(middle, 3),
        "ratio",
        target=f">= {target}",
        holds=None if quick else low >= target,
        n=TURNS,
        spread=(round(low, 3), round(high, 3)),
        seconds=seconds,
        note=f"usual {quartiles(usual)[1]:.3f}, ours {quartiles(ours)[1]:.3f} CPU s"
        + ("; the target is for 16x64x64, h=32" if quick else ""),
    )


def _arithmetic(sound: bool) -> Any:
    """A 64-channel convolution in float32 over bfloat16: an upper bound of what 16 bits can give the step here."""
    name = "3D convolution, forward and backward, 64 channels at 16x64x64: float32 over bfloat16"
    if not sound:
        return figure(name, None, "ratio", note=str(self_check("cpu")))
    started = clock()
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 64, 16, 64, 64, generator=generator), torch.randn(64, 64, 3, 3, 3, generator=generator) / 40

    def both_ways(dtype: torch.dtype) -> Callable[[], object]:
        volume, filters = (t.to(dtype, copy=True).requires_grad_() for t in (x, w))
        towards = torch.ones_like(volume).detach()
        return lambda: torch.autograd.grad(F.conv3d(volume, filters, padding=1), (volume, filters), towards)

    wide, narrow = _in_turns([both_ways(torch.float32), both_ways(torch.bfloat16)])
    low, middle, high = quartiles([a / b for a, b in zip(wide, narrow, strict=True)])
    rate = 3 * 2 * 27 * 64 * 64 * 16 * 64 * 64 / quartiles(narrow)[1] / 1e9
    return figure(
        name,
        round(middle, 3),
        "ratio",
        n=TURNS,
        spread=(round(low, 3), round(high, 3)),
        seconds=clock() - started,
        note=f"bfloat16 at {rate:.0f} GFLOP/s; a step that is all convolutions cannot gain more than this from 16 bits",
    )


if __name__ == "__main__":
    main()
