"""Decoders and norms at equal steps: what the `fast` preset's choices cost in PSNR on phantoms nobody trained on.

    python tests/benchmarks/vqgan_quality.py --state FOLDER [--quick] [--seeds 3] [--out results/vqgan_quality.json]

Four models from one seed on the same scans in the same order: the published layers with group or batch normalisation,
and the thin and half decoders. Without discriminators: they begin after half of the schedule and pull every model away
from the smallest error. Adam's moments are (0.9, 0.99): with the (0.5, 0.9) that suit discriminators, steps of 1e-3
jump around, and a model's last steps decide by several dB (17.3 to 25.3 dB were seen). Scores are in evaluation mode,
where batch normalisation uses its running statistics, and for it also with the statistics of the scan itself, which
tells how much of a difference is theirs. Finished models are cells in FOLDER/cells.json: a run that was stopped goes
on. About 40 CPU minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _common import emit, figure  # type: ignore[import-not-found]
from _phantom_scans import MemoryScans, phantom_scans  # type: ignore[import-not-found]
from torch import Tensor

from fourdvq.data.files import write_atomic
from fourdvq.metrics import psnr
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.plan import GanSpec, ModelSpec, Plan, VqganTraining
from fourdvq.training.vqgan import VqganTrainer

RESULTS = Path(__file__).parent / "results" / "vqgan_quality.cells.json"
MODELS = {
    "tats, group": {"decoder": "tats", "norm": "group"},
    "tats, batch": {"decoder": "tats", "norm": "batch"},
    "half, group": {"decoder": "half", "norm": "group"},
    "thin, group": {"decoder": "thin", "norm": "group"},
}
# name, model, compared with, key of the score
ROWS = (
    ("decoder half against tats", "half, group", "tats, group", "psnr"),
    ("GroupNorm against BatchNorm", "tats, group", "tats, batch", "psnr"),
    (
        "GroupNorm against BatchNorm with each scan's own statistics",
        "tats, group",
        "tats, batch",
        "psnr_own_statistics",
    ),
    ("decoder thin against tats", "thin, group", "tats, group", "psnr"),
)
LARGEST_LOSS_DB = 0.2
TEST_SCANS = 8


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    volume: tuple[int, int, int]
    train_scans: int
    steps: int
    base_width: int


FULL = Size((16, 48, 48), 32, 800, 16)
QUICK = Size((16, 32, 32), 4, 6, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (always done)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--state", type=Path, required=True, help="folder of finished cells and rendered phantoms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = run(options.state, QUICK if options.quick else FULL, range(1 if options.quick else options.seeds))
    emit("vqgan_quality", rows(cells), options.quick, out=options.out)


def figures(quick: bool) -> list[dict[str, Any]]:
    """The rows from the cells that the full run left; null where it has not been run."""
    if quick or not RESULTS.is_file():
        return rows({})
    return rows(json.loads(RESULTS.read_text(encoding="utf-8")))


def run(state: Path, size: Size, seeds: Sequence[int]) -> dict[str, Any]:
    """Train every cell that is not there yet; seed by seed, so that a run cut short has whole pairs."""
    state.mkdir(parents=True, exist_ok=True)
    path = state / "cells.json"
    cells: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for seed in seeds:
        volumes = phantom_scans(
            state / "phantoms", "leuven", size.train_scans + TEST_SCANS, seed=seed, size=size.volume
        )
        for name, choice in MODELS.items():
            key = f"{seed}|{name}"
            if key in cells:
                continue
            before = time.process_time()
            trainer = _trained(choice, volumes[TEST_SCANS:], size, seed)
            cells[key] = {
                **_scores(trainer.model, volumes[:TEST_SCANS], batch=choice["norm"] == "batch"),
                "cpu_s": round(time.process_time() - before, 1),
                "steps": size.steps,
                "volume": size.volume,
                "train_scans": size.train_scans,
                "base_width": size.base_width,
            }
            write_atomic(path, (json.dumps(cells, indent=1, sort_keys=True) + "\n").encode())
            print(f"{key}: {cells[key]['psnr']:.3f} dB, {cells[key]['cpu_s']} CPU s", flush=True)
    return cells


def rows(cells: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Paired differences in dB, one row a comparison."""
    return [_row(cells, *row) for row in ROWS]


def _trained(choice: Mapping[str, Any], scans: Sequence[Tensor], size: Size, seed: int) -> VqganTrainer:
    """One model alone on its scans, codes moving as they do where one site trains."""
    plan = Plan(
        name="quality",
        profile_sha256="0" * 64,
        seed=seed,
        model=ModelSpec(size=size.volume, base_width=size.base_width, n_codes=128, code_dim=8, **choice),
        gan=GanSpec(loss="none"),
        vqgan=VqganTraining(accumulate=1, lr=1e-3, betas=(0.9, 0.99), precision="fp32"),
    )
    trainer = VqganTrainer(plan, seed=seed, single_site=True)
    trainer.train(MemoryScans(scans), steps=size.steps, global_step=0, decay_per_round=0.37)
    return trainer


def _scores(model: VQGAN3d, scans: Sequence[Tensor], *, batch: bool) -> dict[str, float]:
    """Mean PSNR of the clamped reconstructions; for batch normalisation also with the scan's own statistics."""
    model.eval()
    scores = {"psnr": _mean_psnr(model, scans)}
    if batch:
        model.train()
        scores["psnr_own_statistics"] = _mean_psnr(model, scans)
        model.eval()
    return scores


def _mean_psnr(model: VQGAN3d, scans: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return statistics.fmean(psnr((model(x[None] - 0.5).recon + 0.5).clamp(0.0, 1.0), x[None]) for x in scans)


def _row(cells: Mapping[str, Any], name: str, model: str, other: str, score: str) -> dict[str, Any]:
    title, target = f"{name}, test PSNR at equal steps", f">= -{LARGEST_LOSS_DB}"
    seeds = sorted({key.split("|")[0] for key in cells})
    pairs = [
        (cells[f"{s}|{model}"], cells[f"{s}|{other}"])
        for s in seeds
        if f"{s}|{other}" in cells and f"{s}|{model}" in cells
    ]
    differences = [one["psnr"] - two[score] for one, two in pairs]
    if not differences:
        note = "an experiment of an hour: python tests/benchmarks/vqgan_quality.py --state FOLDER"
        missing: dict[str, Any] = figure(title, None, "dB", target=target, note=note)
        return missing
    first, mean = pairs[0][0], statistics.fmean(differences)
    row: dict[str, Any] = figure(
        title,
        round(mean, 3),
        "dB",
        target=target,
        holds=mean >= -LARGEST_LOSS_DB if first["steps"] == FULL.steps else None,
        n=len(differences),
        spread=(round(min(differences), 3), round(max(differences), 3)),
        seconds=sum(cell["cpu_s"] for pair in pairs for cell in pair),
        note=f"{first['steps']} steps at {'x'.join(map(str, first['volume']))}, h={first['base_width']}, "
        f"{first['train_scans']} phantoms; {statistics.fmean(p[0]['psnr'] for p in pairs):.2f} against "
        f"{statistics.fmean(p[1][score] for p in pairs):.2f} dB",
    )
    return row


if __name__ == "__main__":
    main()
