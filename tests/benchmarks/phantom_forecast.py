"""Does the model know where a patient is going? Forecasts on phantoms, where the truth is known at every time.

    python tests/benchmarks/phantom_forecast.py --state FOLDER [--quick] [--seeds 3] [--out results/forecast.json]

Two sites, 160 training and 40 test patients, for each of three seeds; stage 1 and stage 2 are trained over the sites by
the library's own arithmetic, bfloat16 both ways. The first two scans are given; the third is the target of the image
rows, the true severity one year after the second that of the rows about change. Severity is read from the lung's mean
latent vector, the encoder's output of a real scan and the codes of a predicted one, with what the training patients'
real scans teach: a level by ridge regression, and a change by calibration, which says how much the mean moves for each
unit of severity and so gives a change of the right size whatever the noise of a scan. The oracle draws a straight line
through the true severities of the two given scans. Variants of the model, one part changed in each, say what the parts
are worth. Further patients, two scans each, calibrate the intervals and test them.

A finished seed is one cell in FOLDER/cells.json: a run that was stopped goes on after it. A seed takes about 12 CPU
minutes on one core, two of them for drawing the patients.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _common import emit  # type: ignore[import-not-found]
from _forecast_data import GIVEN, Patient, cells, cohort  # type: ignore[import-not-found]
from _forecast_figures import rows  # type: ignore[import-not-found]
from _phantom_scans import MemoryScans  # type: ignore[import-not-found]
from _rounds import federate, first_server, over_the_wire  # type: ignore[import-not-found]
from torch import Tensor

from fourdvq.data.datasets import latent_mask
from fourdvq.data.files import write_atomic
from fourdvq.data.latents import LatentPatient
from fourdvq.evaluation.rows import population_rate
from fourdvq.evaluation.trajectory import LongitudinalPatient, score_patient
from fourdvq.federation.aggregate import weighted_mean
from fourdvq.generation import (
    GivenLatents,
    WorldModel,
    encode_given,
    encode_scan,
    evaluating,
    predict_codes,
    residual_volumes,
)
from fourdvq.models.latent_ode import LatentODE
from fourdvq.models.vqgan import VQGAN3d, tokenizer_sha256
from fourdvq.plan import FederationSpec, GanSpec, ModelSpec, OdeTraining, Plan, TemporalSpec, VqganTraining
from fourdvq.training.latent_ode import OdeTrainer, initial_ode
from fourdvq.training.seeds import derive_seed
from fourdvq.training.update import apply

SITES = ("leuven", "southampton")
SAMPLES = 40
RIDGE = 1e-3
SHOWN = (
    "model", "model_residual", "persistence", "persistence_decoded", "linear_latent", "noise_control", "ceiling",
    "population_change",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """One way of running the study: patients at each site (train, test, calibration, interval test) and steps."""

    volume: tuple[int, int, int]
    counts: tuple[int, int, int, int]
    rounds: int
    steps: int
    ode_rounds: int
    ode_steps: int


FULL = Size((24, 40, 40), (80, 20, 50, 50), rounds=40, steps=35, ode_rounds=25, ode_steps=80)
QUICK = Size((16, 32, 32), (4, 2, 3, 3), rounds=1, steps=3, ode_rounds=1, ode_steps=3)


@dataclass(frozen=True)
class Site:
    """A hospital's patients."""

    name: str
    train: list[Patient]
    test: list[Patient]
    calibration: list[Patient]
    interval: list[Patient]


@dataclass(frozen=True)
class Readout:
    """Severity from the encoder's mean output over the lung: of one scan (c + 1,), and of a change between two (c,)."""

    level: np.ndarray
    change: np.ndarray

    def level_of(self, mean: np.ndarray) -> float:
        return float(mean @ self.level[:-1] + self.level[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (always done)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--state", type=Path, required=True, help="folder of finished seeds and rendered phantoms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK if options.quick else FULL
    done = run(options.state, size, range(1 if options.quick else options.seeds))
    emit("phantom_forecast", rows(done), options.quick, out=options.out)


def run(state: Path, size: Size, seeds: Sequence[int]) -> dict[str, Any]:
    """Every seed that is not there yet, each kept when it is finished."""
    state.mkdir(parents=True, exist_ok=True)
    path = state / "cells.json"
    done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for seed in seeds:
        if str(seed) in done:
            continue
        before = time.process_time()
        done[str(seed)] = one_seed(state / "phantoms", size, seed)
        done[str(seed)]["cpu_s"] = round(time.process_time() - before, 1)
        write_atomic(path, (json.dumps(done, indent=1, sort_keys=True) + "\n").encode())
        print(f"seed {seed}: {done[str(seed)]['cpu_s']} CPU s", flush=True)
    return done


def one_seed(folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """Train over the two sites, then score everything that the figures need; plain numbers only."""
    plan = plan_of(size, seed)
    sites = [Site(name, *cohort(folder, name, size.counts, seed=seed, size=size.volume)) for name in SITES]
    note(seed, "patients drawn")
    vqgan = federated_vqgan(plan, sites)
    note(seed, "stage 1 trained")
    name = tokenizer_sha256(vqgan)
    coded = {site.name: [code(vqgan, p, name) for p in site.train] for site in sites}
    union = [p for site in sites for p in coded[site.name]]
    ode = federated_ode(plan, vqgan, coded)
    pooled = pooled_ode(plan, vqgan, union)
    note(seed, "stage 2 trained, federated and pooled")
    random_plan = replace(
        plan,
        temporal=replace(plan.temporal, initial_state="variational"),
        federation=replace(plan.federation, ode_rounds=(size.ode_rounds + 1) // 2),
    )
    random_ode = federated_ode(random_plan, vqgan, coded)
    note(seed, "variational model trained")
    others = {
        label: WorldModel(vqgan, federated_ode(other, vqgan, coded), name) for label, other in variants(plan).items()
    }
    note(seed, "variants trained")
    worlds = {"federated": WorldModel(vqgan, ode, name), "pooled": WorldModel(vqgan, pooled, name)}
    read = readout(vqgan, [p for site in sites for p in site.train])
    tested = [p for site in sites for p in site.test]
    return {
        "patients": {"train": len(union), "test": len(tested)},
        "images": image_rows(worlds["federated"], tested, plan, population_rate(union, vqgan.codebook.codes)),
        "change": change_rows(worlds["federated"], tested, read),
        "variants": {label: change_rows(world, tested, read) for label, world in others.items()},
        "latent_mse": {kind: latent_mse(world, tested) for kind, world in worlds.items()},
        "intervals": interval_rows(worlds["federated"], WorldModel(vqgan, random_ode, name), sites, read, seed),
    }


def plan_of(size: Size, seed: int) -> Plan:
    """Small networks of the same kinds as the presets; no discriminators: the question is about time."""
    return Plan(
        name="phantom-forecast",
        profile_sha256="0" * 64,
        seed=seed,
        model=ModelSpec(size=size.volume, base_width=8, n_codes=256, code_dim=8, decoder="half"),
        gan=GanSpec(loss="none"),
        vqgan=VqganTraining(accumulate=1, lr=1e-3, precision="fp32"),
        temporal=TemporalSpec(hidden=8, dynamics_width=16, max_step_years=1.0, lung_context=True),
        ode=OdeTraining(lr=2e-3, lambda_drift=100.0, precision="fp32"),
        federation=FederationSpec(
            rounds=size.rounds,
            local_steps=size.steps,
            ode_rounds=size.ode_rounds,
            ode_local_steps=size.ode_steps,
        ),
    )


def variants(plan: Plan) -> dict[str, Plan]:
    """The model with one thing changed: what each of its parts is worth."""
    return {
        "without the lung's mean in the loss": replace(plan, ode=replace(plan.ode, lambda_drift=0.0)),
        "without lung context": replace(plan, temporal=replace(plan.temporal, lung_context=False)),
        "with the codes' velocity as input": replace(plan, temporal=replace(plan.temporal, velocity_input=True)),
        "trained in bfloat16": replace(plan, ode=replace(plan.ode, precision="bf16")),
    }


def federated_vqgan(plan: Plan, sites: Sequence[Site]) -> VQGAN3d:
    """Stage 1 over the sites, equal weights, merged codebook sums."""
    scans = {site.name: MemoryScans([x[None] for p in site.train for x in p.scans]) for site in sites}
    model: VQGAN3d = federate(plan, scans, first_server(plan, scans), dict.fromkeys(scans, 1.0))
    return model


def federated_ode(plan: Plan, vqgan: VQGAN3d, coded: Mapping[str, Sequence[LatentPatient]]) -> LatentODE:
    """Stage 2 over the sites, equal weights."""
    codes = vqgan.codebook.codes
    trainers = {name: OdeTrainer(plan, codes, seed=derive_seed(plan.seed, "site", name)) for name in coded}
    model = initial_ode(plan)
    weights = dict(model.state_dict())
    for _ in range(plan.federation.ode_rounds):
        sent = over_the_wire(weights)
        updates = []
        for name, trainer in trainers.items():
            trainer.load_global(sent)
            done = trainer.train(coded[name], steps=plan.federation.ode_local_steps)
            updates.append((1.0, over_the_wire(done.delta)))
        weights = apply(weights, weighted_mean(updates))
    model.load_state_dict(over_the_wire(weights))
    return model.eval()


def pooled_ode(plan: Plan, vqgan: VQGAN3d, patients: Sequence[LatentPatient]) -> LatentODE:
    """One trainer on all patients, as many of them a step as there are sites."""
    together = replace(plan, ode=replace(plan.ode, accumulate=len(SITES)))
    trainer = OdeTrainer(together, vqgan.codebook.codes, seed=derive_seed(plan.seed, "site", "pooled"))
    trainer.train(patients, steps=plan.federation.ode_rounds * plan.federation.ode_local_steps)
    return trainer.model.eval()


@torch.no_grad()
def code(vqgan: VQGAN3d, patient: Patient, tokenizer: str) -> LatentPatient:
    """A patient as stage 2 reads it."""
    years = torch.tensor(patient.years, dtype=torch.float64)
    lung = latent_mask(patient.lung, vqgan.spec.compression)
    coded, means = zip(*(encode_scan(vqgan, x[None], lung) for x in patient.scans), strict=True)
    return LatentPatient(
        patient.name, torch.cat([one.indices for one in coded]), lung, years, torch.cat(means), tokenizer
    )


@torch.inference_mode()
def readout(vqgan: VQGAN3d, patients: Sequence[Patient]) -> Readout:
    """Fit severity to what the encoder makes of the training patients' real scans."""
    means = [[_lung_mean(vqgan, p, x) for x in p.scans] for p in patients]
    x = np.array([m for series in means for m in series])
    y = np.concatenate([p.ill for p in patients])
    dx = np.array([b - a for series in means for a, b in pairwise(series)])
    dy = np.concatenate([np.diff(p.ill) for p in patients])
    return Readout(_ridge(np.column_stack([x, np.ones(len(x))]), y), _calibration(dx, dy))


def image_rows(world: WorldModel, patients: Sequence[Patient], plan: Plan, rate: Tensor | None) -> dict[str, Any]:
    """Per patient, row and metric: the evaluation's own values for the third scan."""
    found: dict[str, dict[str, list[float]]] = {}
    for p in patients:
        held = LongitudinalPatient(p.name, p.years[: GIVEN + 1], partial(_scan, p), p.lung)
        for score in score_patient(world, held, plan, population_rate=rate):
            kind, _, metric = score.metric.partition("/")
            if score.row in SHOWN and kind == "extrapolation" and metric.endswith("/lung"):
                found.setdefault(score.row, {}).setdefault(metric.removesuffix("/lung"), []).append(score.value)
    return found


@torch.inference_mode()
def change_rows(world: WorldModel, patients: Sequence[Patient], read: Readout) -> dict[str, list[float]]:
    """Change of severity one year after the last given scan: true, predicted, and by the oracle's straight line.

    Also, where the truth of every voxel is known: how well the map of changes is placed (correlation over the lung's
    latent cells), and the skill of residual detail against the true scan that nobody took.
    """
    found: dict[str, list[float]] = {name: [] for name in ("true", "predicted", "oracle", "map", "unseen_skill")}
    with evaluating(world):
        for p in patients:
            given = _given(world, p)
            zhat = predict_codes(world, given, [p.asked])
            moved = (zhat[0] - given.z[-1] * given.lung).double()
            found["true"].append(p.ill_ahead - p.ill[GIVEN - 1])
            found["predicted"].append(float(moved[:, given.lung].mean(dim=1).numpy() @ read.change))
            slope = (p.ill[1] - p.ill[0]) / (p.years[1] - p.years[0])
            found["oracle"].append(slope * (p.asked - p.years[GIVEN - 1]))
            if p.future is None:
                continue
            compression = world.vqgan.spec.compression
            true_map, lung = cells(p.future.severity - p.future.severity_given, p.lung, compression)
            ours = torch.tensordot(torch.from_numpy(read.change), moved, dims=1)
            found["map"].append(float(np.corrcoef(ours[lung].numpy(), true_map[lung].numpy())[0, 1]))
            volume = residual_volumes(world, given, p.scans[:GIVEN, None], [p.asked], zhat)[0]
            errors = [(x - p.future.scan)[p.lung].square().mean() for x in (volume, p.scans[GIVEN - 1])]
            found["unseen_skill"].append(float(1 - errors[0] / errors[1]))
    return found


@torch.inference_mode()
def latent_mse(world: WorldModel, patients: Sequence[Patient]) -> float:
    """Mean squared error of the predicted codes of the third scan, over the lung."""
    errors = []
    for p in patients:
        given = _given(world, p)
        z = encode_given(world, p.scans[GIVEN : GIVEN + 1, None], [0.0], p.lung).z[0]
        zhat = predict_codes(world, given, [p.years[GIVEN]])[0]
        errors.append(float((zhat - z)[:, given.lung].square().mean()))
    return float(np.mean(errors))


@torch.inference_mode()
def interval_rows(
    world: WorldModel, random: WorldModel, sites: Sequence[Site], read: Readout, seed: int
) -> dict[str, Any]:
    """Errors of the predicted severity, per site: of calibration and of test patients; and inside which central share
    of the variational model's own samples the truth lies."""
    errors = {
        group: {s.name: [_error(world, p, read) for p in patients] for s, patients in _groups(sites, group)}
        for group in ("calibration", "test")
    }
    generator = torch.Generator().manual_seed(derive_seed(seed, "samples"))
    ranks = [_sample_rank(random, p, read, generator) for _, patients in _groups(sites, "test") for p in patients]
    return {**errors, "sample_rank": ranks}


def _groups(sites: Sequence[Site], group: str) -> list[tuple[Site, list[Patient]]]:
    return [(s, s.calibration if group == "calibration" else [*s.test, *s.interval]) for s in sites]


def _error(world: WorldModel, p: Patient, read: Readout) -> float:
    given = _given(world, p)
    zhat = predict_codes(world, given, [p.asked])[0]
    return p.ill_ahead - _severity(given, zhat, read)


def _sample_rank(world: WorldModel, p: Patient, read: Readout, generator: torch.Generator) -> float:
    """Share of the samples below the true severity."""
    given, hidden = _given(world, p), world.ode.spec.hidden
    drawn = [
        predict_codes(world, given, [p.asked], torch.randn(1, hidden, generator=generator))[0] for _ in range(SAMPLES)
    ]
    return float(np.mean([_severity(given, z, read) < p.ill_ahead for z in drawn]))


def _severity(given: GivenLatents, zhat: Tensor, read: Readout) -> float:
    moved = (zhat - given.z[-1])[:, given.lung].double().mean(dim=1).numpy()
    return read.level_of(given.means[-1].double().numpy()) + float(moved @ read.change)


def _given(world: WorldModel, p: Patient) -> GivenLatents:
    return encode_given(world, p.scans[:GIVEN, None], p.years[:GIVEN], p.lung)


def _scan(p: Patient, i: int) -> Tensor:
    return p.scans[i][None]


def _lung_mean(vqgan: VQGAN3d, p: Patient, scan: Tensor) -> np.ndarray:
    z = vqgan.encode(scan[None, None] - 0.5)[0]
    mean: np.ndarray = z[:, latent_mask(p.lung, vqgan.spec.compression)].double().mean(dim=1).numpy()
    return mean


def _ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares with a penalty of `RIDGE` times the mean square of the columns."""
    square = x.T @ x
    return np.asarray(np.linalg.solve(square + RIDGE * np.eye(len(square)) * np.trace(square) / len(square), x.T @ y))


def _calibration(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Weights w (c,) with w @ dx = dy for a change without noise, of the least variance (generalised least squares).

    dx = a dy + noise is fitted, not dy on dx: that would be drawn towards no change by the noise of dx.
    """
    a = dy @ dx / (dy @ dy)
    noise = dx - np.outer(dy, a)
    square = noise.T @ noise / len(noise)
    inverse = np.linalg.inv(square + RIDGE * np.eye(len(square)) * np.trace(square) / len(square))
    return np.asarray(inverse @ a / (a @ inverse @ a))


def note(seed: int, text: str) -> None:
    print(f"seed {seed}: {text}, {time.process_time():.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
