"""Phantom cohort: CPU time of a scan, and whether images and truth are what they promise.

    python tests/benchmarks/phantom.py --json [--quick] [--out results/phantom.json]

CPU seconds are user and system time of one process, with the patient's chest built anew for every patient.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from _common import clock, cpu_seconds, emit, figure, quartiles  # type: ignore[import-not-found]
from scipy.ndimage import map_coordinates
from scipy.stats import spearmanr

from fourdvq.data import phantom
from fourdvq.data.phantom.rendering import displacement_field, grid_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (always done)")
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    options = parser.parse_args()
    figures = [
        _cost(1 if options.quick else 7, (96, 256, 256), "dicom", 5.0),
        _cost(0 if options.quick else 7, (96, 256, 256), "nifti", 5.0),
        _cost(5 if options.quick else 15, (32, 64, 64), "nifti", 0.2),
        _determinism(),
        *_scan_figures(4 if options.quick else 5, (32, 64, 64) if options.quick else (96, 256, 256)),
        *_scalar_figures(3000),
    ]
    emit("phantom", figures, options.quick, out=options.out)


def _cost(repeat: int, size: tuple[int, int, int], kind: Any, target: float) -> dict[str, Any]:
    """CPU s of a scan, patient by patient: drawing, rendering, scan, mask, truth and all files."""
    name = f"CPU time of a scan, {'x'.join(map(str, size))}, {kind}, truth included"
    if repeat == 0:
        return _figure(name, None, "CPU s", target=f"< {target}", note="measured in full mode only")
    started = clock()
    per_scan = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(repeat):
            made: list[phantom.PhantomCohort] = []

            def make(out: Path = Path(folder) / str(seed), seed: int = seed, made: Any = made) -> None:
                made.append(phantom.make_cohort(out, patients=1, seed=seed, size=size, format=kind))

            (seconds,) = cpu_seconds(make)
            per_scan.append(seconds / len(made[0].patients[0].visits))
    low, middle, high = quartiles(per_scan)
    return _figure(
        name,
        round(middle, 3),
        "CPU s",
        target=f"< {target}",
        holds=high < target,
        n=repeat,
        spread=(round(low, 3), round(high, 3)),
        seconds=clock() - started,
        note="2 to 4 scans a patient; n counts patients",
    )


def _figure(*values: Any, **named: Any) -> dict[str, Any]:
    row: dict[str, Any] = figure(*values, **named)
    return row


def _determinism() -> dict[str, Any]:
    started = clock()
    with tempfile.TemporaryDirectory() as folder:
        contents = []
        for name in ("a", "b"):
            root = Path(folder) / name
            phantom.make_cohort(root, patients=2, seed=3, size=(32, 64, 64), workers=1 if name == "a" else 2)
            contents.append({str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()})
    differ = sum(contents[0].get(key) != contents[1].get(key) for key in contents[0] | contents[1])
    return _figure(
        "files that differ between two runs with one seed",
        differ,
        "files",
        target=0,
        holds=differ == 0,
        n=len(contents[0]),
        seconds=clock() - started,
        note="one process against two",
    )


def _scan_figures(patients: int, size: tuple[int, int, int]) -> list[dict[str, Any]]:
    started = clock()
    rows = [row for p in phantom.draw_patients(patients, 17, size=size) for row in _score(p)]
    table = {key: np.array([row[key] for row in rows if key in row]) for key in rows[0] | rows[-1]}
    seconds = clock() - started

    def row(name: str, key: str, unit: str, target: str, holds: Any, worst: Any) -> dict[str, Any]:
        values = table[key]
        low, _, high = quartiles([float(v) for v in values])
        value = float(worst(values))
        return _figure(
            name,
            round(value, 4),
            unit,
            target=target,
            holds=bool(np.all(holds(values))),
            n=len(values),
            spread=(round(low, 4), round(high, 4)),
            seconds=seconds,
            note=f"worst of {len(values)}, quartiles beside it; {'x'.join(map(str, size))}",
        )

    return [
        row("lung volume, smallest", "ml", "ml", "1000 to 8000", lambda v: (v > 1000) & (v < 8000), np.min),
        row("lung median, densest", "median", "HU", "-970 to -550", lambda v: (v > -970) & (v < -550), np.max),
        row("air outside the body, off -1000", "air", "HU", "< 50", lambda v: v < 50, np.max),
        row("mean severity against extent", "extent", "of the lung", "< 0.02", lambda v: v < 0.02, np.max),
        row("Dice of masks after the true displacement", "dice", "", "> 0.95", lambda v: v > 0.95, np.min),
        row("largest fall of severity in time", "fall", "severity", "0", lambda v: v < 1e-6, np.max),
    ]


def _score(patient: phantom.PhantomPatient) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    first: phantom.PhantomScan | None = None
    for visit in patient.visits:
        made = phantom.scan(patient, visit)
        row = {
            "ml": float(made.lung.sum() * made.volume.voxel_ml),
            "median": float(np.median(made.volume.hu[made.lung])),
            "air": abs(float(np.median(made.volume.hu[:, :6, :6])) + 1000.0),
            "extent": abs(float(made.severity[made.lung].mean()) - visit.extent),
        }
        if first is None:
            first = made
            now, later = (phantom.severity(patient, years) for years in (0.0, 2.0))
            row["fall"] = float(np.maximum(now - later, 0.0).max())
        else:
            row["dice"] = _dice(first.lung, made, patient)
        rows.append(row)
    return rows


def _dice(baseline: np.ndarray, follow_up: phantom.PhantomScan, patient: phantom.PhantomPatient) -> float:
    moved = displacement_field(follow_up.displacement, patient.size)
    steps = zip(np.indices(patient.size, dtype=np.float32), (2, 1, 0), grid_of(patient).spacing, strict=True)
    places = [index + moved[component] / np.float32(step) for index, component, step in steps]
    carried = map_coordinates(follow_up.lung.astype(np.float32), places, order=1) > 0.5
    return float(2 * (carried & baseline).sum() / (carried.sum() + baseline.sum()))


def _scalar_figures(count: int) -> list[dict[str, Any]]:
    started = clock()
    patients = phantom.draw_patients(count, 5)
    extents = [p.extent_at_start for p in patients]
    deaths = float(np.mean([p.event == "death" for p in patients]))
    rank = float(spearmanr(extents, [phantom.hazard_at(p, 0.0) for p in patients]).statistic)
    concordance = _concordance(patients, np.array([phantom.hazard_at(p, 0.0) for p in patients]))
    seconds = clock() - started
    return [
        _figure(
            "Spearman of extent and hazard",
            round(rank, 3),
            "",
            target="> 0.7",
            holds=rank > 0.7,
            n=count,
            seconds=seconds,
        ),
        _figure(
            "share of deaths",
            round(deaths, 3),
            "",
            target="0.4 to 0.6",
            holds=0.4 < deaths < 0.6,
            n=count,
            seconds=seconds,
        ),
        _figure(
            "C-index of the true baseline hazard",
            round(concordance, 3),
            "",
            target="> 0.62",
            holds=concordance > 0.62,
            n=count,
            seconds=seconds,
            note="the best model of baseline data can reach about this",
        ),
    ]


def _concordance(patients: tuple[phantom.PhantomPatient, ...], risk: np.ndarray) -> float:
    time = np.array([p.time_days for p in patients])
    died = np.array([p.event == "death" for p in patients])
    pairs = died[:, None] & (time[:, None] < time[None, :])
    right = (risk[:, None] > risk[None, :]) & pairs
    return float(right.sum() / pairs.sum())


if __name__ == "__main__":
    main()
