"""Does federated training of stage 1 lose anything against pooling the scans, and does it beat training alone?

    python tests/benchmarks/federated_quality.py --state FOLDER [--quick] [--seeds 3] [--out results/federated.json]

Hospitals of phantom patients that are not alike: scanners differ in noise, kernel and HU offset, and the first two
hospitals have patients with little and with much fibrosis. Three models from one initialisation, with the same number
of optimiser steps and rounds and the same codebook rule:
    federated   every site trains alone during a round; means of the changes with server momentum, merged codebook
                sums, bfloat16 both ways
    pooled      one trainer on all scans, with as many scans a step as there are sites
    local       one site alone, with its own first codebook
Each finished model is one cell in FOLDER/cells.json: a run that was stopped goes on where it was. The whole takes
about two hours on one core; the area's script reads the finished cells.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _common import emit, figure  # type: ignore[import-not-found]
from _phantom_scans import MemoryScans, phantom_scans  # type: ignore[import-not-found]
from _rounds import codes_used, federate, first_server, train_alone, trainer_of  # type: ignore[import-not-found]
from torch import Tensor

from fourdvq.data.files import write_atomic
from fourdvq.federation.aggregate import site_shares
from fourdvq.metrics import mse
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.plan import FederationSpec, GanSpec, ModelSpec, Plan, VqganTraining

RESULTS = Path(__file__).parent / "results" / "federated_quality.cells.json"
SIZE = (16, 32, 32)
SITES = ("leuven", "southampton", "external", "fourth", "fifth")  # names that choose a scanner
EXTENTS = ("mild", "severe", "all", "all", "all")
TEST_SCANS = 12  # at each site


@dataclass(frozen=True)
class Setting:
    """One federation: training scans at each site."""

    name: str
    scans: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """Rounds and optimiser steps a round; one scan a step and site."""

    rounds: int
    steps: int


SETTINGS = (Setting("2 even", (48, 48)), Setting("2 uneven", (72, 24)), Setting("5 sites", (40, 30, 24, 16, 10)))
FULL = Schedule(rounds=100, steps=20)
QUICK = Schedule(rounds=3, steps=4)
QUICK_SETTINGS = (Setting("2 even", (4, 4)), Setting("2 uneven", (6, 2)))


@dataclass(frozen=True)
class Site:
    """A hospital's scans."""

    name: str
    train: MemoryScans
    test: list[Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (always done)")
    parser.add_argument("--quick", action="store_true", help="two rounds of everything, to see that it runs")
    parser.add_argument("--state", type=Path, required=True, help="folder of finished cells and rendered phantoms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings, schedule = (QUICK_SETTINGS, QUICK) if options.quick else (SETTINGS, FULL)
    cells = run(options.state, settings, schedule, range(1 if options.quick else options.seeds))
    for line in table(cells):
        print(line)
    emit("federated_quality", rows(cells, settings), options.quick, out=options.out)


def figures(quick: bool) -> list[dict[str, Any]]:
    """The rows of the area's table, from the cells that the full run left; null where it has not been run."""
    if quick or not RESULTS.is_file():
        return [_missing(f"federated over pooled test MSE, {s.name}", "<= 1.03, none > 1.06") for s in SETTINGS]
    return rows(json.loads(RESULTS.read_text(encoding="utf-8")), SETTINGS)


def run(state: Path, settings: Sequence[Setting], schedule: Schedule, seeds: Sequence[int]) -> dict[str, Any]:
    """Train every cell that is not there yet; seed by seed, so that a run cut short has whole pairs."""
    state.mkdir(parents=True, exist_ok=True)
    path = state / "cells.json"
    cells: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for seed in seeds:
        for setting in settings:
            sites = hospitals(setting, seed, state / "phantoms")
            for name, train in _models(sites, schedule, seed).items():
                key = f"{setting.name}|{seed}|{name}"
                if key in cells:
                    continue
                before = time.process_time()
                model, facts = train()
                cells[key] = {
                    "test_mse": {site.name: test_mse(model, site.test) for site in sites},
                    "cpu_s": round(time.process_time() - before, 1),
                    "rounds": schedule.rounds,
                    "steps": schedule.steps,
                    **facts,
                }
                write_atomic(path, (json.dumps(cells, indent=1, sort_keys=True) + "\n").encode())
                print(f"{key}: {_mean(cells[key]):.6f}, {cells[key]['cpu_s']} CPU s", flush=True)
    return cells


def hospitals(setting: Setting, seed: int, folder: Path) -> list[Site]:
    """The sites of a setting, each with scans of its own scanner and its own mixture of disease."""
    sites = []
    for name, extent, count in zip(SITES, EXTENTS, setting.scans, strict=False):
        scans = phantom_scans(folder, name, count + TEST_SCANS, seed=seed, size=SIZE, extent=extent)
        sites.append(Site(name, MemoryScans(scans[TEST_SCANS:]), scans[:TEST_SCANS]))
    return sites


def plan_of(seed: int, schedule: Schedule, *, scans_a_step: int) -> Plan:
    """Stage 1 without discriminators: the comparison is of reconstruction."""
    return Plan(
        name="federated-quality",
        profile_sha256="0" * 64,
        seed=seed,
        model=ModelSpec(size=SIZE, base_width=8, n_codes=64, code_dim=8, decoder="half"),
        gan=GanSpec(loss="none"),
        vqgan=VqganTraining(accumulate=scans_a_step, lr=1e-3, precision="fp32"),
        federation=FederationSpec(
            rounds=schedule.rounds, local_steps=schedule.steps, server_optimizer="momentum", server_lr=0.7
        ),
    )


def federated(sites: Sequence[Site], schedule: Schedule, seed: int, *, averaged: bool = False) -> VQGAN3d:
    """Rounds as the coordinator runs them; `averaged`: the codes are averaged as if they were weights."""
    plan = plan_of(seed, schedule, scans_a_step=1)
    spec, scans = plan.federation, _scans(sites)
    registered = {site.name: float(len(site.train)) for site in sites}
    shares = site_shares(registered, registered, cap_two=spec.weight_cap_two, cap_many=spec.weight_cap_many)
    return federate(plan, scans, first_server(plan, scans), shares, averaged=averaged)


def pooled(sites: Sequence[Site], schedule: Schedule, seed: int, *, order: str = "pooled") -> VQGAN3d:
    """One trainer on the union, as many scans a step as there are sites; `order` names its random stream."""
    plan = plan_of(seed, schedule, scans_a_step=len(sites))
    union = MemoryScans([volume for site in sites for volume in site.train.volumes])
    return train_alone(plan, trainer_of(plan, order), union, first_server(plan, _scans(sites)), copies=len(sites))


def local(sites: Sequence[Site], schedule: Schedule, seed: int, *, which: int) -> VQGAN3d:
    """One site alone: its own first codebook, its own scans."""
    plan, site = plan_of(seed, schedule, scans_a_step=1), sites[which]
    return train_alone(plan, trainer_of(plan, site.name), site.train, first_server(plan, _scans([site])))


def test_mse(model: VQGAN3d, scans: Sequence[Tensor]) -> float:
    """Mean over scans of the MSE on [0, 1] of the clamped reconstruction."""
    model.eval()
    with torch.no_grad():
        errors = [mse((model(x[None] - 0.5).recon + 0.5).clamp(0.0, 1.0), x[None]) for x in scans]
    return statistics.fmean(errors)


def table(cells: Mapping[str, Any]) -> list[str]:
    """All finished cells, a line each."""
    lines = [f"{'setting':10} {'seed':>4} {'model':18} {'MSE all':>9}  MSE by site"]
    for key in sorted(cells):
        setting, seed, model = key.split("|")
        by_site = "  ".join(f"{value:.6f}" for value in cells[key]["test_mse"].values())
        lines.append(f"{setting:10} {seed:>4} {model:18} {_mean(cells[key]):9.6f}  {by_site}")
    return lines


def rows(cells: Mapping[str, Any], settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Figures: the ratios to pooled, the floor of their noise, and the gain over local models on others' scans."""
    found = []
    for setting in settings:
        seeds = sorted({key.split("|")[1] for key in cells if key.startswith(f"{setting.name}|")})
        done = [s for s in seeds if f"{setting.name}|{s}|pooled" in cells and f"{setting.name}|{s}|federated" in cells]
        if not done:
            found.append(_missing(f"federated over pooled test MSE, {setting.name}", "<= 1.03, none > 1.06"))
            continue
        found += [_ratio_row(cells, setting, done), *_averaged_rows(cells, setting, done)]
        found += _local_rows(cells, setting, done)
    return found


def _ratio_row(cells: Mapping[str, Any], setting: Setting, seeds: Sequence[str]) -> dict[str, Any]:
    def of(seed: str, model: str) -> float:
        return _mean(cells[f"{setting.name}|{seed}|{model}"])

    ratios = [of(s, "federated") / of(s, "pooled") for s in seeds]
    again = [of(s, "pooled again") / of(s, "pooled") for s in seeds if f"{setting.name}|{s}|pooled again" in cells]
    row = cells[f"{setting.name}|{seeds[0]}|pooled"]
    note = f"{row['rounds']} rounds x {row['steps']} steps, scans {setting.scans}; each seed {_listed(ratios)}"
    if again:
        note += f"; pooled in another order over pooled {_listed(again)}"
    result: dict[str, Any] = figure(
        f"federated over pooled test MSE, {setting.name}",
        round(statistics.fmean(ratios), 4),
        "ratio",
        target="<= 1.03, none > 1.06",
        holds=statistics.fmean(ratios) <= 1.03 and max(ratios) <= 1.06,
        n=len(ratios),
        spread=(round(min(ratios), 4), round(max(ratios), 4)),
        seconds=sum(cells[f"{setting.name}|{s}|{m}"]["cpu_s"] for s in seeds for m in ("federated", "pooled")),
        note=note,
    )
    return result


def _averaged_rows(cells: Mapping[str, Any], setting: Setting, seeds: Sequence[str]) -> list[dict[str, Any]]:
    """The merged codebook against one whose codes are averaged like weights."""
    keys = [(f"{setting.name}|{s}|federated", f"{setting.name}|{s}|codes averaged") for s in seeds]
    ratios = [_mean(cells[ours]) / _mean(cells[other]) for ours, other in keys if other in cells]
    if not ratios:
        return []
    row: dict[str, Any] = figure(
        f"merged codebook over averaged codes, test MSE, {setting.name}",
        round(statistics.fmean(ratios), 4),
        "ratio",
        target="< 1",
        holds=max(ratios) < 1.0,
        n=len(ratios),
        spread=(round(min(ratios), 4), round(max(ratios), 4)),
        note=f"each seed {_listed(ratios)}",
    )
    return [row]


def _local_rows(cells: Mapping[str, Any], setting: Setting, seeds: Sequence[str]) -> list[dict[str, Any]]:
    """Federated against each local-only model, on the scans of the sites that the local model never saw."""
    ratios = []
    for seed in seeds:
        together = cells[f"{setting.name}|{seed}|federated"]["test_mse"]
        for name in together:
            key = f"{setting.name}|{seed}|local {name}"
            if key in cells:
                others = [site for site in together if site != name]
                own = statistics.fmean(cells[key]["test_mse"][site] for site in others)
                ratios.append(statistics.fmean(together[site] for site in others) / own)
    if not ratios:
        return []
    row: dict[str, Any] = figure(
        f"federated over local-only test MSE on the other sites' scans, worst, {setting.name}",
        round(max(ratios), 4),
        "ratio",
        target="< 1",
        holds=max(ratios) < 1.0,
        n=len(ratios),
        spread=(round(min(ratios), 4), round(max(ratios), 4)),
        note="every site and seed",
    )
    return [row]


def _models(
    sites: Sequence[Site], schedule: Schedule, seed: int
) -> dict[str, Callable[[], tuple[VQGAN3d, dict[str, Any]]]]:
    """The cells of one setting and seed, each as a call that trains it."""

    def cell(train: Callable[..., VQGAN3d], **more: Any) -> Callable[[], tuple[VQGAN3d, dict[str, Any]]]:
        def call() -> tuple[VQGAN3d, dict[str, Any]]:
            model = train(sites, schedule, seed, **more)
            return model, {"codes_used": codes_used(model, [x for site in sites for x in site.test])}

        return call

    cells = {"pooled": cell(pooled), "federated": cell(federated)}
    if len(sites) == 2:
        cells["pooled again"] = cell(pooled, order="another order")
        cells["codes averaged"] = cell(federated, averaged=True)
    return cells | {f"local {site.name}": cell(local, which=i) for i, site in enumerate(sites)}


def _scans(sites: Sequence[Site]) -> dict[str, MemoryScans]:
    return {site.name: site.train for site in sites}


def _mean(cell: Mapping[str, Any]) -> float:
    """Test MSE over all sites' scans, of which each site has equally many."""
    value = statistics.fmean(cell["test_mse"].values())
    return value if math.isfinite(value) else math.inf


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _missing(name: str, target: str) -> dict[str, Any]:
    row: dict[str, Any] = figure(
        name,
        None,
        "ratio",
        target=target,
        note="an experiment of more than an hour: python tests/benchmarks/federated_quality.py --state FOLDER",
    )
    return row


if __name__ == "__main__":
    main()
