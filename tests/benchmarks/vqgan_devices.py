"""Two processes that train one model against one process on the same scans: the losses, and the time of a step.

    python tests/benchmarks/vqgan_devices.py --json [--quick]

Real processes with gloo between them, one thread each. On a machine with fewer free cores than processes the speed says
little; the losses are the point.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _common import clock, emit, figure  # type: ignore[import-not-found]
from _phantom_scans import MemoryScans  # type: ignore[import-not-found]

from fourdvq.federation.codebook import CodebookState
from fourdvq.plan import GanSpec, ModelSpec, Plan, VqganTraining
from fourdvq.training.distributed import ALONE, Ranks, joined
from fourdvq.training.vqgan import VqganTrainer

SIZE = (16, 32, 32)
SCANS_A_STEP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (always done)")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    emit("vqgan_devices", figures(options.quick), options.quick)


def figures(quick: bool) -> list[dict[str, Any]]:
    """Largest relative difference of a loss, and one process's time over two processes' time."""
    started, steps = clock(), 3 if quick else 20
    with tempfile.TemporaryDirectory() as folder:
        _one(0, 1, Path(folder), steps)
        context = multiprocessing.get_context("spawn")
        team = [context.Process(target=_one, args=(rank, 2, Path(folder), steps)) for rank in range(2)]
        for process in team:
            process.start()
        for process in team:
            process.join()
        alone, together = (json.loads((Path(folder) / f"{n}.json").read_text(encoding="utf-8")) for n in ("1-0", "2-0"))
    later = max(abs(together["losses"][n] - v) / abs(v) for n, v in alone["losses"].items())
    where = f"{'x'.join(map(str, SIZE))}, {SCANS_A_STEP} scans a step"
    error = abs(together["first"] / alone["first"] - 1)
    return [
        figure(
            f"two processes against one with the same global batch, relative difference of the loss, {where}",
            error,
            "ratio",
            target="<= 1e-5",
            holds=error <= 1e-5,
            n=1,
            seconds=clock() - started,
            note=f"from equal weights; mean losses of the next {steps} steps, whose weights differ by the order of "
            f"additions, are within {later:.1e}",
        ),
        figure(
            f"time of a step, one process over two, {where}",
            round(alone["seconds"] / together["seconds"], 2),
            "ratio",
            n=steps,
            note=f"wall {alone['seconds']:.3f} s and {together['seconds']:.3f} s a step, {os.cpu_count()} cores",
        ),
    ]


def _one(rank: int, world: int, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    if world == 1:
        _train(ALONE, folder / "1-0.json", steps)
        return
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with joined(folder / "meeting", rank, world, device=torch.device("cpu")) as ranks:
        _train(ranks, folder / f"{world}-{rank}.json", steps)


def _train(ranks: Ranks, out: Path, steps: int) -> None:
    plan = Plan(
        name="devices",
        profile_sha256="0" * 64,
        model=ModelSpec(size=SIZE, base_width=8, n_codes=64, code_dim=8),
        gan=GanSpec(loss="none"),
        vqgan=VqganTraining(accumulate=SCANS_A_STEP, precision="fp32"),
    )
    generator = torch.Generator().manual_seed(0)
    scans = MemoryScans([torch.rand(1, *SIZE, generator=generator) for _ in range(8)])
    codes = torch.randn(64, 8, generator=generator)
    trainer = VqganTrainer(plan, seed=0, ranks=ranks)
    ones = torch.ones(64, dtype=torch.float64)
    trainer.load_global(trainer.weights(), CodebookState(codes, ones, codes.double()))
    first = trainer.train(scans, steps=1, global_step=0, decay_per_round=0.37)
    before = clock()
    done = trainer.train(scans, steps=steps, global_step=1, decay_per_round=0.37)
    seconds = (clock() - before) / steps
    text = json.dumps({"losses": done.losses, "first": first.losses["loss_total"], "seconds": seconds})
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
