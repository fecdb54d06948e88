"""Figures of the registration: error on known motions, the public pair, phantoms with disease, time and memory.

    FOURDVQ_REAL_DATA=... python tests/benchmarks/prep_registration.py --json [--quick] [--out FILE] [--elastix FILE]

With `--elastix`, a file that `elastix_fields.py` wrote, the real pair is also held against another program's fields.
Errors are distances in mm at 2,000 points in the fixed lung. Times are CPU seconds of one thread, each in a process of
its own, whose largest resident memory is the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

import numpy as np
import torch
from scipy.ndimage import map_coordinates

# Run as a script, Python sees this folder only; the helpers of the tests are one level up.
sys.path.insert(0, str(Path(__file__).parents[1]))

from _common import clock, cpu_seconds, emit, figure, quartiles  # type: ignore[import-not-found]

from fourdvq.data.volume import read_mask
from fourdvq.preprocessing.grid import grid_of_spacing, lung_box
from fourdvq.preprocessing.profile import RegistrationSpec
from fourdvq.preprocessing.registration import Registration, register
from peak_memory import peak_bytes
from registration_cases import PairCase, moved, phantom_pair, planted, real_pair, rimmed

CORRFIELD = RegistrationSpec()
DEMONS = RegistrationSpec(backend="demons", clamp_hu=(-1000.0, 300.0))
MEGAVOXELS = 2.3
TARGET_SECONDS = {"default": 150.0, "fast": 60.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (always done)")
    parser.add_argument("--quick", action="store_true", help="end within a few minutes")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    parser.add_argument("--elastix", type=Path, help="fields of the real pair, from elastix_fields.py")
    parser.add_argument("--once", choices=TARGET_SECONDS, help="register one pair and print what it cost")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(_cost_of_one(options.once)))
        return
    emit("prep_registration", figures(options.quick, options.elastix), options.quick, out=options.out)


def figures(quick: bool, elastix: Path | None = None) -> list[dict[str, Any]]:
    """The rows of the registration; those that need the public data are null without FOURDVQ_REAL_DATA."""
    torch.set_num_threads(1)
    folder = Path(os.environ.get("FOURDVQ_REAL_DATA", ""))
    rows: list[dict[str, Any]] = []
    if (folder / "SOURCES.md").is_file():
        for preset in ("default",) if quick else ("default", "fast"):
            rows += planted_figures(folder, preset, fields=1 if quick else 5)
        rows += identity_figures(folder)
        rows += rim_figures(folder, (6.0,) if quick else (6.0, 8.0, 12.0))
        rows += real_pair_figures(folder, elastix)
        rows += cost_figures("fast") + ([] if quick else cost_figures("default"))
    else:
        note = "FOURDVQ_REAL_DATA does not name the folder of public scans"
        rows.append(figure("CorrField on real CT", None, "", note=note))
    return rows + phantom_figures(2 if quick else 20)


def planted_figures(folder: Path, preset: str, fields: int) -> list[dict[str, Any]]:
    """Known motions of ct-64 of up to 20 mm, with 20 HU of new noise: the mean over the fields, and the worst."""
    started, found = clock(), []
    for seed in range(fields):
        case = planted(folder, seed)
        result = _register(case, replace(CORRFIELD, preset=preset))
        errors = case.errors(result.transform)
        found.append((float(errors.mean()), float(np.percentile(errors, 95)), result.facts.fold_percent))
    name, seconds = f"CorrField {preset}, planted fields of 20 mm on ct-64", clock() - started
    goals = ((1.0, "mm", "TRE mean"), (2.0, "mm", "TRE p95"), (0.1, "%", "folding"))
    rows = []
    for column, (target, unit, what) in enumerate(goals):
        values = [row[column] for row in found]
        note = f"worst of the fields {max(values):.3f}"
        row = partial(figure, f"{name}: {what}", float(np.mean(values)), unit, n=fields, seconds=seconds, note=note)
        if preset == "default":
            rows.append(row(target=f"<= {target}", holds=max(values) <= target, spread=quartiles(values)[::2]))
        else:
            rows.append(row(spread=quartiles(values)[::2]))
    return rows


def identity_figures(folder: Path) -> list[dict[str, Any]]:
    """ct-64 onto itself, and onto itself with new noise."""
    rows = []
    for noise, goals in ((0.0, ((0.02, "mean"),)), (20.0, ((0.2, "mean"), (0.6, "p95")))):
        case = planted(folder, 0, largest_mm=0.0, noise_hu=noise)
        errors = case.errors(_register(case, CORRFIELD).transform)
        measured = {"mean": float(errors.mean()), "p95": float(np.percentile(errors, 95))}
        for target, what in goals:
            name = f"CorrField default, identity with {noise:g} HU of noise: {what}"
            rows.append(figure(name, measured[what], "mm", target=f"<= {target}", holds=measured[what] <= target))
    return rows


def rim_figures(folder: Path, thicknesses_mm: Sequence[float]) -> list[dict[str, Any]]:
    """New dense tissue under the pleura of ct-64, as bright as the chest wall: how much of it the map leaves there."""
    rows = []
    for thickness in thicknesses_mm:
        ill = rimmed(folder, 3, thickness_mm=thickness)
        for spec in (CORRFIELD, DEMONS):
            result = _register(ill.case, spec)
            errors = ill.case.errors(result.transform)
            lost, ours = 100 * (ill.kept(result.transform) - 1), spec is CORRFIELD
            note = f"TRE mean {errors.mean():.2f} mm, p95 {np.percentile(errors, 95):.2f}; Dice {result.after.dice:.3f}"
            name = f"{spec.backend}, new rim of {thickness:g} mm at -250 HU under the pleura: change of its share"
            row = partial(figure, name, lost, "%", note=note)
            rows.append(row(target="|.| < 20", holds=abs(lost) < 20) if ours else row())
    return rows


def real_pair_figures(folder: Path, elastix: Path | None = None) -> list[dict[str, Any]]:
    """The public pair; its own truth is not public, so the error is against demons on the follow-up's own copy."""
    reference_case = real_pair(folder, same_scan=True)
    truth = moved(_register(reference_case, DEMONS).transform, reference_case.points)
    others = None if elastix is None else elastix_points(folder, elastix, reference_case.points)
    rows = []
    for what, same_scan, goal in (("warped follow-up", True, 1.1), ("true baseline", False, 3.5)):
        case = replace(real_pair(folder, same_scan=same_scan), truth=truth)
        for spec in (CORRFIELD, replace(CORRFIELD, preset="fast"), DEMONS):
            name = f"{spec.backend}{'' if spec is DEMONS else ' ' + spec.preset}, real follow-up onto its {what}"
            result = _register(case, spec)
            rows += _real_rows(name, case, result, goal, judged=spec is CORRFIELD)
            if others is not None:
                rows.append(_elastix_row(name, moved(result.transform, case.points), others, goal))
    return rows


def elastix_points(folder: Path, fields: Path, points: np.ndarray) -> np.ndarray:
    """Where the fields of `elastix_fields.py` put points (N, 3): (runs, N, 3) in LPS mm."""
    grid = read_mask(folder / "elastix" / "3DCT_lung_baseline_mask.mha")
    at = ((points - np.array(grid.origin)) / np.array(grid.spacing)[::-1])[:, ::-1].T
    read = np.load(fields)
    return np.stack(
        [points + np.stack([map_coordinates(f[..., c], at, order=1) for c in range(3)], axis=1) for f in read]
    )


def _elastix_row(name: str, found: np.ndarray, others: np.ndarray, goal: float) -> dict[str, Any]:
    """Distance to the mean of elastix's runs, beside what the runs are apart."""
    errors = np.linalg.norm(found - others.mean(axis=0), axis=1)
    apart = np.linalg.norm(others[0] - others[1], axis=1)
    note = (
        f"p95 {np.percentile(errors, 95):.2f} mm; its two runs are {apart.mean():.2f} mm apart, "
        f"p95 {np.percentile(apart, 95):.2f}"
    )
    mean = float(errors.mean())
    return figure(f"{name}: distance to elastix", mean, "mm", target=f"<= {goal}", holds=mean <= goal, note=note)


def _real_rows(name: str, case: PairCase, result: Registration, goal: float, *, judged: bool) -> list[dict[str, Any]]:
    errors, undone = case.errors(result.transform), result.consistency
    if undone is None:
        raise ValueError(f"{name}: no field")
    gain = result.after.ncc - result.before.ncc
    measured = (
        ("Dice", result.after.dice, "", ">= 0.975", result.after.dice >= 0.975),
        ("gain of correlation in the lung", gain, "", "> 0.2", gain > 0.2),
        ("inverse consistency p95", undone.p95_mm, "mm", "< 4", undone.p95_mm < 4),
        ("folding", result.facts.fold_percent, "%", "< 0.1", result.facts.fold_percent < 0.1),
        (
            "distance to demons between two copies of one scan",
            float(errors.mean()),
            "mm",
            f"<= {goal}",
            errors.mean() <= goal,
        ),
    )
    note = (
        f"correlation {result.before.ncc:.3f} to {result.after.ncc:.3f}, p95 of the distance "
        f"{np.percentile(errors, 95):.2f} mm, SD log J {result.facts.sd_log_j:.3f}"
    )
    return [
        figure(
            f"{name}: {what}",
            float(value),
            unit,
            target=target if judged else None,
            holds=bool(holds) if judged else None,
            note=note,
        )
        for what, value, unit, target, holds in measured
    ]


def phantom_figures(pairs: int) -> list[dict[str, Any]]:
    """Phantoms with growing disease: the error, and how much of the true severity the found map changes."""
    started = clock()
    errors: dict[str, list[float]] = {"corrfield": [], "demons": []}
    changes: dict[str, list[float]] = {"corrfield": [], "demons": []}
    folding = 0.0
    for number in range(pairs):
        pair = phantom_pair(number)
        case = pair.case
        if case.truth is None:
            raise ValueError("a phantom's motion is known")
        wanted = pair.severity_at(case.truth).sum()
        for spec in (CORRFIELD, DEMONS):
            result = _register(case, spec)
            if spec is CORRFIELD:
                folding = max(folding, result.facts.fold_percent)
            errors[spec.backend].append(float(case.errors(result.transform).mean()))
            carried = pair.severity_at(moved(result.transform, case.points)).sum()
            changes[spec.backend].append(100 * float(carried / wanted - 1))
    seconds, rows = clock() - started, []
    for backend in ("corrfield", "demons"):
        worst, ours = np.abs(changes[backend]), backend == "corrfield"
        error, change = float(np.mean(errors[backend])), float(worst.mean())
        note = f"worst pair {max(errors[backend]):.2f}" + (f", worst folding {folding:.3f} %" if ours else "")
        rows.append(
            figure(
                f"{backend}, phantom pairs with known deformation: TRE mean",
                error,
                "mm",
                target="<= 1.5" if ours else None,
                holds=error <= 1.5 if ours else None,
                n=pairs,
                spread=quartiles(errors[backend])[::2],
                seconds=seconds,
                note=note,
            )
        )
        rows.append(
            figure(
                f"{backend}, phantom pairs: change of severity on the baseline grid",
                change,
                "%",
                target="< 5" if ours else None,
                holds=change < 5 if ours else None,
                n=pairs,
                spread=quartiles(worst.tolist())[::2],
                note=f"mean of |change|; worst {worst.max():.1f}, mean with its sign {np.mean(changes[backend]):+.2f}",
            )
        )
    return rows


def cost_figures(preset: str) -> list[dict[str, Any]]:
    """CPU time and memory of a registration with its way back, affine step and measures included."""
    command = [sys.executable, __file__, "--once", preset]
    cost = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    limit, name = TARGET_SECONDS[preset], f"CorrField {preset}, {cost['megavoxels']:.1f} Mvoxel, one core"
    note = "reading, centroids, affine step, field, field of the exchanged pair, all measures"
    gpu = {"target": "<= 10", "note": "no GPU on this machine"} if preset == "default" else None
    rows = [
        figure(
            f"{name}: time", cost["seconds"], "CPU s", target=f"<= {limit:g}", holds=cost["seconds"] <= limit, note=note
        ),
        figure(f"{name}: peak memory", cost["peak_gb"], "GB", target="<= 3", holds=cost["peak_gb"] <= 3),
    ]
    return rows + ([figure("CorrField default on a GPU: time", None, "s", **gpu)] if gpu else [])


def _cost_of_one(preset: str) -> dict[str, float]:
    """Register a planted pair on a grid of 2.3 million voxels, in this process."""
    torch.set_num_threads(1)
    case = planted(Path(os.environ["FOURDVQ_REAL_DATA"]), 0)
    box = lung_box(case.fixed_mask, case.fixed.spacing, CORRFIELD.margin_mm)
    volume = float(np.prod(np.array(box.high) - np.array(box.low)))
    spacing = round((volume / (MEGAVOXELS * 1e6)) ** (1 / 3), 3)
    spec = replace(CORRFIELD, preset=preset, spacing_mm=spacing)
    (seconds,) = cpu_seconds(lambda: _register(case, spec))
    voxels = float(np.prod(grid_of_spacing(case.fixed, box, spacing).size)) / 1e6
    peak = peak_bytes() / 2**30
    return {"seconds": seconds, "peak_gb": peak, "megavoxels": voxels}


def _register(case: PairCase, spec: RegistrationSpec) -> Registration:
    return register(case.fixed, case.fixed_mask, case.moving, case.moving_mask, spec)


if __name__ == "__main__":
    main()
