"""Stage 1 on real CT: can it learn one scan by heart, and what does a model of phantoms make of scans it never saw?

    FOURDVQ_REAL_DATA=... python tests/benchmarks/vqgan_real.py --state FOLDER [--quick] [--out results/vqgan_real.json]

The generator of preset `fast` (half decoder, 256 codes, bfloat16) at 32 x 64 x 64, without discriminators, trained as a
federation of one site: the first codes from k-means, merged codes and revived ones at the end of each round. Adam's
moments are (0.9, 0.99): with the (0.5, 0.9) that suit discriminators, steps of 1e-3 jump around.
    over-fit    `ct-64` of the Chest Imaging Platform alone, 1,000 steps, two seeds
    phantoms    48 phantom scans of two hospitals, 600 steps; then `ct-64` and both scans of the elastix pair

Finished models are cells in FOLDER/cells.json: a run that was stopped goes on. Pictures of the reconstructions lie
beside it. About 30 CPU minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import SimpleITK as sitk
import torch
from _common import emit, figure  # type: ignore[import-not-found]
from _phantom_scans import WINDOW_HU, MemoryScans, phantom_scans  # type: ignore[import-not-found]
from _rounds import codes_used, first_server, train_alone, trainer_of  # type: ignore[import-not-found]
from torch import Tensor

from fourdvq.data.files import write_atomic
from fourdvq.data.volume import Volume, read_mask, read_volume, to_image
from fourdvq.metrics import psnr
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.plan import FederationSpec, GanSpec, ModelSpec, Plan, VqganTraining
from fourdvq.preprocessing.profile import FovSpec, GridSpec, Profile, ProfileName
from fourdvq.preprocessing.target import on_target_grid
from fourdvq.reports.figures import trajectory_figure

RESULTS = Path(__file__).parent / "results" / "vqgan_real.cells.json"
REAL = Path(os.environ.get("FOURDVQ_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
HOSPITALS = ("leuven", "southampton")
SEEDS = (0, 1)
PSNR_TARGET, CODES_TARGET = 29.0, 200
NOT_RUN = "an experiment of an hour: python tests/benchmarks/vqgan_real.py --state FOLDER"


@dataclass(frozen=True)
class Size:
    """How large the experiment is: scans are of each hospital."""

    volume: tuple[int, int, int]
    base_width: int
    steps: int  # of over-fitting
    phantom_steps: int
    train_scans: int
    test_scans: int


FULL = Size((32, 64, 64), 32, 1000, 600, 24, 6)
QUICK = Size((16, 32, 32), 8, 20, 20, 2, 1)
ROUND = 20  # steps


@dataclass(frozen=True)
class Scan:
    """A prepared scan: x01 and its lung, (D, H, W)."""

    x01: Tensor
    lung: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (always done)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--state", type=Path, required=True, help="folder of finished cells, phantoms and pictures")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    emit("vqgan_real", rows(run(options.state, QUICK if options.quick else FULL)), options.quick, out=options.out)


def figures(quick: bool) -> list[dict[str, Any]]:
    """The rows from the cells that the full run left; null where it has not been run."""
    return rows({} if quick or not RESULTS.is_file() else json.loads(RESULTS.read_text(encoding="utf-8")))


def run(state: Path, size: Size) -> dict[str, Any]:
    """Train every cell that is not there yet."""
    state.mkdir(parents=True, exist_ok=True)
    path = state / "cells.json"
    cells: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    real = real_scans(size.volume)
    experiments = {f"over-fit|{seed}": partial(over_fit, size, real["ct-64"], seed) for seed in SEEDS}
    experiments["phantoms"] = partial(of_phantoms, size, real, state / "phantoms")
    for name, experiment in experiments.items():
        if name in cells:
            continue
        before = time.process_time()
        cells[name], picture = experiment()
        cells[name] |= {"cpu_s": round(time.process_time() - before, 1), "volume": size.volume}
        write_atomic(state / f"{name.replace('|', '-')}.png", picture)
        write_atomic(path, (json.dumps(cells, indent=1, sort_keys=True) + "\n").encode())
        print(f"{name}: {json.dumps(cells[name])}", flush=True)
    return cells


def over_fit(size: Size, scan: Scan, seed: int) -> tuple[dict[str, Any], bytes]:
    """One scan by heart."""
    model = _trained(plan_of(size, size.steps, seed), [scan.x01[None]])
    copy = reconstruct(model, scan.x01)
    scores = {"psnr": psnr(copy, scan.x01), "psnr_lung": psnr(copy, scan.x01, scan.lung)}
    cell = {**scores, "codes_used": codes_used(model, [scan.x01[None]]), "steps": size.steps}
    return cell, _picture(f"learnt by heart, seed {seed}", {"ct-64": (scan, copy)})


def of_phantoms(size: Size, real: Mapping[str, Scan], folder: Path) -> tuple[dict[str, Any], bytes]:
    """A model of phantoms alone, on phantoms it was not trained on and on real scans."""
    each = size.train_scans + size.test_scans
    drawn = [phantom_scans(folder, name, each, seed=0, size=size.volume) for name in HOSPITALS]
    model = _trained(plan_of(size, size.phantom_steps, 0), [x for site in drawn for x in site[size.test_scans :]])
    held_out = [x for site in drawn for x in site[: size.test_scans]]
    own = [psnr(reconstruct(model, x[0]), x[0]) for x in held_out]
    copies = {name: reconstruct(model, scan.x01) for name, scan in real.items()}
    cell = {
        "phantoms": statistics.fmean(own),
        "phantoms_range": [min(own), max(own)],
        "real": {name: psnr(copies[name], scan.x01) for name, scan in real.items()},
        "real_lung": {name: psnr(copies[name], scan.x01, scan.lung) for name, scan in real.items()},
        "codes_used": codes_used(model, held_out),
        "codes_used_on_real": codes_used(model, [scan.x01[None] for scan in real.values()]),
        "steps": size.phantom_steps,
        "train_scans": len(drawn) * size.train_scans,
    }
    return cell, _picture("a model of phantoms on real CT", {n: (scan, copies[n]) for n, scan in real.items()})


def plan_of(size: Size, steps: int, seed: int) -> Plan:
    """The generator of preset `fast` without discriminators."""
    return Plan(
        name="real",
        profile_sha256="0" * 64,
        seed=seed,
        model=ModelSpec(size=size.volume, base_width=size.base_width),
        gan=GanSpec(loss="none"),
        vqgan=VqganTraining(accumulate=1, lr=1e-3, betas=(0.9, 0.99), precision="bf16"),
        federation=FederationSpec(rounds=steps // ROUND, local_steps=ROUND),
    )


def real_scans(size: tuple[int, int, int]) -> dict[str, Scan]:
    """The public scans on the grid of the lungs that were given with them, as preprocessing puts a baseline there."""
    profile = Profile(ProfileName("benchmark", 1), grid=GridSpec(*size), fov=FovSpec(mode="lung_bbox", margin_mm=10.0))
    pair = REAL / "elastix"
    baseline = read_volume(pair / "3DCT_lung_baseline_small.mha")
    return {
        "ct-64": _prepared(
            read_volume(REAL / "cip" / "ct-64.nrrd"), read_mask(REAL / "cip" / "wholeLung-64.nrrd"), profile
        ),
        "pair, baseline": _prepared(
            baseline, _on_grid_of(baseline, read_mask(pair / "3DCT_lung_baseline_mask.mha")), profile
        ),
        "pair, follow-up": _prepared(
            read_volume(pair / "followup_reconstructed.nii.gz"),
            read_mask(pair / "3DCT_lung_followup_mask.mha"),
            profile,
        ),
    }


def reconstruct(model: VQGAN3d, x01: Tensor) -> Tensor:
    """A scan (D, H, W) after encoder, codes and decoder, in evaluation mode and float32, clamped."""
    model.eval()
    with torch.inference_mode():
        return (model(x01[None, None] - 0.5).recon[0, 0].float() + 0.5).clamp(0.0, 1.0).clone()


def rows(cells: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two over-fitting rows and the real scans beside the phantoms."""
    learnt = [cells[f"over-fit|{seed}"] for seed in SEEDS if f"over-fit|{seed}" in cells]
    found = [_worst(learnt, "psnr", "dB", PSNR_TARGET), _worst(learnt, "codes_used", "codes of 256", CODES_TARGET)]
    name = "phantom-trained model on real CT it never saw, PSNR"
    cell = cells.get("phantoms")
    if cell is None:
        return [*found, figure(name, None, "dB", note=NOT_RUN)]
    told = ", ".join(f"{n} {v:.2f} (lung {cell['real_lung'][n]:.2f})" for n, v in cell["real"].items())
    low, high = cell["phantoms_range"]
    note = f"{told}; phantoms nobody trained on {cell['phantoms']:.2f} ({low:.2f} to {high:.2f}); codes in use "
    note += f"{cell['codes_used']} on phantoms, {cell['codes_used_on_real']} on real scans"
    mean = round(statistics.fmean(cell["real"].values()), 2)
    return [*found, figure(name, mean, "dB", n=len(cell["real"]), seconds=cell["cpu_s"], note=note)]


def _worst(cells: Sequence[Mapping[str, Any]], key: str, unit: str, target: float) -> dict[str, Any]:
    title = f"one real CT learnt by heart, worst of {len(SEEDS)} seeds: {key}"
    if not cells:
        missing: dict[str, Any] = figure(title, None, unit, target=f">= {target:g}", note=NOT_RUN)
        return missing
    values = [cell[key] for cell in cells]
    row: dict[str, Any] = figure(
        title,
        round(min(values), 2),
        unit,
        target=f">= {target:g}",
        holds=min(values) >= target,
        n=len(values),
        spread=(round(min(values), 2), round(max(values), 2)),
        seconds=sum(cell["cpu_s"] for cell in cells),
        note=f"{cells[0]['steps']} steps at {'x'.join(map(str, cells[0]['volume']))}; in the lung "
        + ", ".join(f"{cell['psnr_lung']:.2f} dB" for cell in cells),
    )
    return row


def _trained(plan: Plan, volumes: Sequence[Tensor]) -> VQGAN3d:
    scans = MemoryScans(volumes)
    return train_alone(plan, trainer_of(plan, "real"), scans, first_server(plan, {"real": scans}))


def _prepared(volume: Volume, lung: Volume, profile: Profile) -> Scan:
    target = on_target_grid(volume, lung.hu > 0, profile)
    low, high = WINDOW_HU
    x01 = (torch.from_numpy(target.hu.astype(np.float32)) - low) / (high - low)
    return Scan(x01.clamp(0.0, 1.0), torch.from_numpy(target.mask))


def _on_grid_of(volume: Volume, mask: Volume) -> Volume:
    """A finer mask on the volume's own grid."""
    fine = sitk.Cast(to_image(mask), sitk.sitkFloat32)
    moved = sitk.Resample(fine, to_image(volume), sitk.Transform(), sitk.sitkLinear, 0.0)
    inside = (sitk.GetArrayFromImage(moved) >= 0.5).astype(np.int16)
    return Volume(inside, volume.spacing, volume.origin, volume.direction)


def _picture(title: str, pairs: Mapping[str, tuple[Scan, Tensor]]) -> bytes:
    """Each scan above its reconstruction."""
    first = next(iter(pairs.values()))[0]
    return trajectory_figure(
        [copy for _, copy in pairs.values()],
        [scan.x01 for scan, _ in pairs.values()],
        [float(i) for i in range(len(pairs))],
        lung=first.lung,
        labels=list(pairs),
        title=title,
    )


if __name__ == "__main__":
    main()
