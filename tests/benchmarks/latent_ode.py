"""Figures of stage 2: exactness of a prediction, agreement of the solvers, CPU time of a training step.

    python tests/benchmarks/latent_ode.py --json [--quick]

Times are CPU seconds of one thread, two ways of the same step interleaved in one run, the median of 7 or more; `holds`
comes from the worse quartile. Quality figures come from models with random weights, so that every model moves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fourdvq.data.latents import LatentPatient
from fourdvq.federation.aggregate import weighted_mean
from fourdvq.models.latent_ode import LatentODE
from fourdvq.plan import ModelSpec, OdeTraining, Plan, TemporalSpec
from fourdvq.training.latent_ode import OdeTrainer
from fourdvq.training.precision import self_check
from fourdvq.training.update import apply

# Run as a script, Python sees this folder only; the helpers of the tests are one level up.
sys.path.insert(0, str(Path(__file__).parents[1]))

from _common import clock, cpu_seconds, emit, figure, quartiles  # type: ignore[import-not-found]
from _forecast_figures import rows as forecast_rows  # type: ignore[import-not-found]
from _generation import generation_figures  # type: ignore[import-not-found]
from _usual_ode import as_stiff_as_trained, usual_step  # type: ignore[import-not-found]

from temporal_cases import DIM, GRID, latent_cohort, ode_plan, ode_trainer, patients, small_ode

FORECASTS = Path(__file__).parent / "results" / "phantom_forecast.cells.json"  # finished seeds of phantom_forecast.py
PAPER_PATIENTS, PAPER_EPOCHS = 175, 100  # paper, section 2.4 and appendix A.2
RISING_CODES = 24
FULL_GRID = (24, 64, 64)
DEMO_GRID = (8, 12, 12)
SCANS_HALF_YEARS = (0, 2, 4)  # of the published code's 13 times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="accepted for uniformity: the output is always JSON")
    parser.add_argument("--quick", action="store_true", help="within a minute on two cores")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    emit("latent_ode", figures(options.quick), options.quick, out=options.out)


def figures(quick: bool) -> list[dict[str, Any]]:
    """All rows of the area; what takes too long or needs another machine is null with its reason."""
    known = json.loads(FORECASTS.read_text(encoding="utf-8")) if FORECASTS.is_file() else {}
    rows = [*exactness(), *solvers(), trained_solver(quick), federation(), *step_times(quick)]
    return [*rows, *generation_figures(quick), *forecast_rows(known)]


def exactness() -> list[dict[str, Any]]:
    """Laws of a prediction, as the largest difference found over ten models."""
    common, anchor, batch, order = [], [], [], []
    for seed in range(10):
        model = small_ode(seed=seed)
        z, t, observed = patients(3, [0.0, 1.0], seed=seed)
        t[1], t[2] = torch.tensor([0.0, 0.3]), torch.tensor([0.0, 2.2])
        fine = torch.tensor([[k / 2 for k in range(12)]]).expand(3, -1)
        with torch.no_grad():
            a, b = model(z, t, observed, fine), model(z, t, observed, fine[:, ::2])
            common.append(_worst(a[:, ::2], b))
            anchor.append(_worst(model(z, t, observed, t[:, 1:])[:, 0], z[:, 1]))
            batch.append(
                max(_worst(a[i : i + 1], model(z[i : i + 1], t[i : i + 1], observed[:1], fine[:1])) for i in range(3))
            )
            order.append(_worst(a.flip(1), model(z, t, observed, fine.flip(1))))
    rows = [
        ("interval 0.5 against 1 year, common times", common, 1e-4),
        ("prediction at the last given scan against that scan", anchor, 0.0),
        ("patient in a batch against alone", batch, 1e-4),
        ("asked times reversed", order, 1e-4),
    ]
    return [
        figure(name, max(found), "largest difference of codes", target=f"<= {limit:g}", holds=max(found) <= limit, n=10)
        for name, found, limit in rows
    ]


def solvers() -> list[dict[str, Any]]:
    """rk4 with half-year steps against dopri5 at 1e-9, relative to the predicted change; evaluations of each."""
    errors = []
    z, t, observed = patients(1, [0.0, 1.2])
    s = torch.tensor([[0.4, 1.2, 3.0, 5.9]], dtype=torch.float64)
    for seed in range(7):
        rk4 = small_ode(seed=seed).double()
        dopri5 = small_ode(seed=seed, solver="dopri5", rtol=1e-9, atol=1e-9).double()
        with torch.no_grad():
            a, b = (model(z.double(), t.double(), observed, s) for model in (rk4, dopri5))
        errors.append(_worst(a, b) / float((b - z[:, -1:]).abs().max()))
    low, middle, high = quartiles(errors)
    counts = {solver: _evaluations(solver) for solver in ("rk4", "dopri5")}
    return [
        figure(
            "rk4 against dopri5 at 1e-9",
            middle,
            "relative",
            target="< 1e-3",
            holds=high < 1e-3,
            n=7,
            spread=(low, high),
            note="random weights; a trained model is smoother or rougher than these",
        ),
        figure("evaluations of f, rk4, 5 irregular times to 3.5 years", counts["rk4"], "evaluations"),
        figure("evaluations of f, dopri5 1e-3 / 1e-4, same times", counts["dopri5"], "evaluations"),
    ]


def trained_solver(quick: bool) -> dict[str, Any]:
    """rk4 as trained against dopri5 at 1e-6 with the same weights, at times nobody trained on.

    Relative to the predicted change, which is what the solver makes. The patients' cells rise through ordered codes,
    each at a pace of its own; the learning rate is that of the forecast study.
    """
    errors = []
    asked = torch.tensor([[3.4, 4.7, 5.9]])
    book = torch.linspace(-1.0, 1.0, RISING_CODES)[:, None].expand(-1, DIM).contiguous()
    plan = replace(
        ode_plan(),
        model=ModelSpec(n_codes=RISING_CODES, code_dim=DIM),
        ode=OdeTraining(lr=2e-3, lambda_drift=100.0, precision="fp32"),
    )
    seeds = 3 if quick else 7
    for seed in range(seeds):
        trainer = OdeTrainer(plan, book, seed=seed)
        cohort = _rising_patients(book, seed)
        trainer.train(cohort, steps=60 if quick else 300)
        exact = LatentODE(replace(trainer.model.spec, solver="dopri5", rtol=1e-6, atol=1e-6), DIM)
        exact.load_state_dict(trainer.model.state_dict())
        z = book[cohort[0].indices[:3].long()].movedim(-1, 1)[None].double()
        t, observed = cohort[0].years[None, :3], torch.ones(1, 3, dtype=torch.bool)
        with torch.no_grad():
            a, b = (model.double()(z, t, observed, asked.double()) for model in (trainer.model, exact))
        errors.append(float((a - b).norm() / (b - z[:, -1:]).norm()))
    low, middle, high = quartiles(errors)
    return figure(
        "rk4 against dopri5 at 1e-6 on a trained model",
        middle,
        "relative",
        target="< 1e-3",
        holds=high < 1e-3,
        n=seeds,
        spread=(low, high),
        note=f"of the predicted change, largest of the seeds {max(errors):.1e}; codes that rise over the years",
    )


def _rising_patients(book: Tensor, seed: int) -> list[LatentPatient]:
    """Eight patients of four scans whose cells climb through the codes at 0.5 to 4 of them a year."""
    random = np.random.default_rng(seed)
    years = np.array([0.0, 0.8, 2.1, 3.0])
    found = []
    for i in range(8):
        start, pace = random.integers(0, RISING_CODES // 2, GRID), random.uniform(0.5, 4.0, GRID)
        codes = torch.from_numpy(np.stack([np.floor(start + pace * y) for y in years])).clamp(max=RISING_CODES - 1)
        means = book[codes.long()].mean(dim=(1, 2, 3))
        lung = torch.ones(GRID, dtype=torch.bool)
        found.append(LatentPatient(f"p{i}", codes.to(torch.uint8), lung, torch.from_numpy(years), means, "t"))
    return found


def federation() -> dict[str, Any]:
    """One site, one round, against local training on the same schedule."""
    local, site = ode_trainer(), ode_trainer()
    start = {name: tensor.clone() for name, tensor in local.model.state_dict().items()}
    local.train(latent_cohort(), steps=10)
    site.load_global(start)
    merged = apply(start, weighted_mean([(1.0, site.train(latent_cohort(), steps=10).delta)]))
    worst = max(_worst(merged[name], tensor) for name, tensor in local.model.state_dict().items())
    return figure(
        "one-site federation against local training",
        worst,
        "largest difference of weights",
        target="<= 1e-6",
        holds=worst <= 1e-6,
    )


def step_times(quick: bool) -> list[dict[str, Any]]:
    """CPU seconds of the trainer's step with three scans, in both precisions, against the published code's step."""
    began = clock()
    grid, code_dim, width = (DEMO_GRID, 8, 16) if quick else (FULL_GRID, 16, 64)
    steps = {
        "bf16": _our_step(grid, code_dim, width, "bf16"),
        "fp32": _our_step(grid, code_dim, width, "fp32"),
        "wide": usual_step(code_dim, grid, SCANS_HALF_YEARS, width=width, layers=3),
        "narrow": usual_step(code_dim, grid, SCANS_HALF_YEARS, width=8, layers=5),  # the released code's own dynamics
    }
    repeats = 7
    runs = [{name: cpu_seconds(step)[0] for name, step in steps.items()} for _ in range(repeats + 1)][1:]
    rounds = self_check("cpu").sound
    size = "x".join(map(str, grid))
    rows = []
    for precision in ("bf16", "fp32"):
        mine = quartiles([run[precision] for run in runs])
        rows.append(
            figure(
                f"training step of one patient, 3 scans, latent {size}, one thread, {precision}",
                mine[1],
                "CPU s",
                n=repeats,
                spread=(mine[0], mine[2]),
                seconds=clock() - began,
                note="" if rounds else "no bfloat16 arithmetic here: both are float32",
            )
        )
    for precision, other, name, target in (
        ("bf16", "wide", "our step over one with the published solver and times and our dynamics", 0.5),
        ("fp32", "wide", "the same, float32", None),
        (
            "bf16",
            "narrow",
            "our step over one with the published solver, times and dynamics (5 convolutions of 8)",
            None,
        ),
    ):
        ratio = quartiles([run[precision] / run[other] for run in runs])
        rows.append(
            figure(
                name,
                ratio[1],
                "ratio of CPU",
                target=None if target is None else f"<= {target:g}",
                holds=None if target is None or quick else ratio[2] <= target,
                n=repeats,
                spread=(ratio[0], ratio[2]),
                note=f"latent {size}; ours to 2.1 years, theirs to 6; theirs takes "
                f"{quartiles([run[other] for run in runs])[1]:.2f} CPU s in float32",
            )
        )
    per_epoch = quartiles([run["bf16"] for run in runs])[1] * PAPER_PATIENTS * PAPER_EPOCHS
    hours = None if quick else per_epoch / 3600 / 16
    return [
        *rows,
        figure(
            "100 epochs of 175 patients on 16 cores, estimate",
            hours,
            "h",
            target="<= 4",
            holds=None if hours is None else hours <= 4,
            note="needs the full latent grid: not in quick mode"
            if quick
            else f"one thread's time over 16, no loss assumed; {per_epoch / 3600:.1f} h on one thread",
        ),
        figure("100 epochs of 175 patients on a GPU", None, "min", target="<= 5", note="no GPU here"),
        figure("generation of 6 times at 96x256x256 on a GPU", None, "s", target="<= 5", note="no GPU here"),
    ]


def _our_step(
    grid: tuple[int, int, int], code_dim: int, width: int, precision: Literal["fp32", "bf16"]
) -> Callable[[], object]:
    """The trainer's own step on one patient with three scans, two of which are given."""
    plan = Plan(
        name="step",
        profile_sha256="",
        model=ModelSpec(size=(grid[0] * 4, grid[1] * 4, grid[2] * 4), code_dim=code_dim),
        temporal=TemporalSpec(dynamics_width=width, lung_context=True),
        ode=OdeTraining(lr=1e-6, precision=precision),
    )
    random = torch.Generator().manual_seed(0)
    trainer = OdeTrainer(plan, torch.randn(plan.model.n_codes, code_dim, generator=random), seed=0)
    as_stiff_as_trained(trainer.model.dynamics)
    codes = torch.randint(plan.model.n_codes, (3, *grid), generator=random).to(torch.uint8)
    years = torch.tensor([0.0, 0.9, 2.1], dtype=torch.float64)
    patient = LatentPatient("p", codes, torch.ones(grid, dtype=torch.bool), years, torch.zeros(3, code_dim), "t")
    return partial(trainer.train, [patient], steps=1)


def _evaluations(solver: str) -> int:
    model = small_ode(solver=solver)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.dynamics.register_forward_hook(count)
    z, t, observed = patients(1, [0.0, 0.7])
    with torch.no_grad():
        model(z, t, observed, torch.tensor([[0.7, 1.1, 1.9, 2.6, 3.5]]))
    return calls


def _worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


if __name__ == "__main__":
    main()
