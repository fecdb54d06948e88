"""Speed, size and exactness of the federated Cox selection, against lifelines in the same run.

    python tests/benchmarks/survival.py --json [--quick] [--out FILE]

CPU time of all sites and the coordinator together, one thread.
"""

from __future__ import annotations

import os

os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})

import argparse
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from _common import clock, cpu_seconds, emit, figure, quartiles  # type: ignore[import-not-found]

from fourdvq.survival import CoxSite, CoxSiteState, ModelRun, Settings, fit_cox_batch, select_biomarkers
from fourdvq.survival.local import drive, share_masks
from fourdvq.survival.messages import HelloRequest
from fourdvq.survival.small_sample import assess_model
from peak_memory import peak_bytes
from survival_data import KEY, TIGHT, cohorts, stacked, with_folds

PAPER = (85, 56)  # 141 patients, paper section 3
REPEATS = 7


def main() -> None:
    """Measure, print the JSON object, and write it to --out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="the output is always JSON; accepted for uniformity")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", action="store_true", help="print the peak memory of the 4,096-code batch and stop")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory:
        print(_peak_of_4096_codes())
        return
    emit("survival", figures(options.quick), options.quick, out=options.out)


def figures(quick: bool) -> list[dict[str, Any]]:
    """Every figure of the area."""
    import _survival_truth  # type: ignore[import-not-found]  # not in the process whose memory is measured

    sites = cohorts(PAPER, seed=11, true=6, log_hr=0.6)
    found = [*speed(sites, quick=quick), *traffic(), *sizes(quick=quick), *exactness(quick=quick), *masks()]
    return [*found, *statistics(sites, quick=quick), *_survival_truth.figures(quick)]


def speed(sites: list[CoxSite], *, quick: bool) -> list[dict[str, Any]]:
    """1,280 models of 141 patients at two sites, interleaved with lifelines fits of the same models."""
    start, folded = clock(), [with_folds(s) for s in sites]
    batch = fit_cox_batch(folded)
    frames = _frames(folded, [(f, b) for f in range(5) for b in range(0, 256, 43)][: 6 if quick else 30], batch.status)
    ours, theirs = [], []
    for _ in range(REPEATS):
        ours += cpu_seconds(lambda: fit_cox_batch(folded))
        theirs += [cpu_seconds(lambda: [_lifelines(frame) for frame in frames])[0] / len(frames) * 1280]
    low, middle, high = quartiles(ours)
    ratios = quartiles([b / a for a, b in zip(ours, theirs, strict=True)])
    selection = cpu_seconds(lambda: select_biomarkers(sites, key=KEY, permutations=0), REPEATS)
    s_low, s_middle, s_high = quartiles(selection)
    seconds = clock() - start
    note = f"lifelines with default options on {len(frames)} of the models, per model, times 1,280"
    return [
        figure(
            "1,280 models, 141 patients, 2 sites",
            middle,
            "CPU s",
            target="<= 0.4",
            holds=high <= 0.4,
            n=REPEATS,
            spread=(low, high),
            seconds=seconds,
        ),
        figure(
            "lifelines loop over ours",
            ratios[1],
            "times",
            target=">= 150",
            holds=ratios[0] >= 150,
            n=REPEATS,
            spread=(ratios[0], ratios[2]),
            seconds=seconds,
            note=note,
        ),
        figure(
            "whole selection with policy, folds, C and rule",
            s_middle,
            "CPU s",
            target="<= 1",
            holds=s_high <= 1,
            n=REPEATS,
            spread=(s_low, s_high),
            seconds=seconds,
        ),
    ]


def traffic() -> list[dict[str, Any]]:
    """Rounds and bytes of one selection under the default policy."""
    start = clock()
    found = [
        select_biomarkers(cohorts(PAPER, seed=seed, true=6, log_hr=0.6), key=KEY, permutations=0)
        for seed in (1, 11, 21, 31, 41)
    ]
    rounds, sent = max(f.rounds for f in found), [f.bytes_up / 1e6 for f in found]
    kept = [256 - len(f.withheld) for f in found]
    note = f"five cohorts; {min(kept)} to {max(kept)} of 256 codes kept by the rules"
    seconds = clock() - start
    return [
        figure(
            "evaluation rounds", rounds, "rounds", target="<= 8", holds=rounds <= 8, n=5, seconds=seconds, note=note
        ),
        figure(
            "sent by a site",
            max(sent),
            "MB",
            target="<= 0.6",
            holds=max(sent) <= 0.6,
            n=5,
            spread=(min(sent), max(sent)),
            seconds=seconds,
            note=note,
        ),
    ]


def sizes(*, quick: bool) -> list[dict[str, Any]]:
    """Larger cohorts and codebooks."""
    start = clock()
    big = [with_folds(s) for s in cohorts(PAPER, codes=4096, seed=11)]
    repeats = 1 if quick else REPEATS
    low, middle, high = quartiles(cpu_seconds(lambda: fit_cox_batch(big), repeats))
    peak = float(
        subprocess.run([sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True).stdout
    )
    many = [with_folds(s) for s in cohorts([200] * 5, seed=5)]
    m_low, m_middle, m_high = quartiles(cpu_seconds(lambda: fit_cox_batch(many), repeats))
    seconds = clock() - start
    return [
        figure(
            "4,096 codes x 5 folds, 141 patients",
            middle,
            "CPU s",
            target="<= 6",
            holds=high <= 6,
            n=repeats,
            spread=(low, high),
            seconds=seconds,
        ),
        figure("peak memory of that process", peak, "MB", target="<= 600", holds=peak <= 600, n=1, seconds=seconds),
        figure(
            "1,000 patients, 5 sites, 1,280 models",
            m_middle,
            "CPU s",
            target="<= 1.5",
            holds=m_high <= 1.5,
            n=repeats,
            spread=(m_low, m_high),
            seconds=seconds,
        ),
    ]


def exactness(*, quick: bool) -> list[dict[str, Any]]:
    """Distance to lifelines at tight options, stratified by site."""
    start = clock()
    sites = [with_folds(s) for s in cohorts(PAPER, seed=11, step=7.0)]
    batch = fit_cox_batch(sites)
    models = [(f, b) for f in range(5) for b in range(0, 256, 9)][: 10 if quick else 120]
    models = [m for m in models if batch.status[m] == "ok"]
    coef, p = 0.0, 0.0
    for (fold, code), frame in zip(models, _frames(sites, models, batch.status), strict=True):
        theirs = _lifelines(frame, TIGHT)
        sd = frame.attrs["sd"]
        estimate = batch.coef[fold, code] * np.array([sd, 1, 1, 1])
        coef = max(
            coef, float(np.abs((estimate - theirs.params_.to_numpy()) / theirs.standard_errors_.to_numpy()).max())
        )
        p = max(p, float(np.abs(batch.p[fold, code] - theirs.summary["p"].to_numpy()).max()))
    seconds = clock() - start
    return [
        figure(
            "coefficient against lifelines",
            coef,
            "standard errors",
            target="<= 1e-8",
            holds=coef <= 1e-8,
            n=len(models),
            seconds=seconds,
            note="precision 1e-22, r_precision -1: its default stops early",
        ),
        figure(
            "p against lifelines", p, "probability", target="<= 1e-8", holds=p <= 1e-8, n=len(models), seconds=seconds
        ),
    ]


def masks() -> list[dict[str, Any]]:
    """Largest move of a coefficient when the sums of three sites are masked."""
    start, sites = clock(), [with_folds(s) for s in cohorts([60, 50, 45], codes=64)]
    fitted = []
    for masked in (False, True):
        states = [CoxSiteState(s, "off", KEY) for s in sites]
        if masked:
            share_masks(states, run="bench")
        fitted.append(drive(ModelRun(HelloRequest(folds=-1), Settings()), states).fits)
    ok = fitted[0].ok & fitted[1].ok
    move = float(np.nanmax(np.abs(fitted[0].beta - fitted[1].beta)[ok]))
    return [
        figure(
            "masked against unmasked coefficient",
            move,
            "SD",
            target="<= 1e-11",
            holds=move <= 1e-11,
            n=int(ok.sum()),
            seconds=clock() - start,
        )
    ]


def statistics(sites: list[CoxSite], *, quick: bool) -> list[dict[str, Any]]:
    """What the rule does on noise, and what permutations cost."""
    if quick:
        note = "minutes: full mode only"
        return [
            figure("selection with 99 permutations", None, "CPU s", target="<= 25", note=note),
            figure("in-sample C of noise, 14 patients, 9 deaths, 8 parameters, ridge 1", None, "C", note=note),
            figure("leave-one-out C of the same", None, "C", target="0.40 to 0.56", note=note),
        ]
    start = clock()
    low, middle, high = quartiles(cpu_seconds(lambda: select_biomarkers(sites, key=KEY, permutations=99), 3))
    noise = [_noise(seed) for seed in range(60)]
    inside, left_out = (float(np.mean([pair[k] for pair in noise])) for k in range(2))
    seconds = clock() - start
    return [
        figure(
            "selection with 99 permutations",
            middle,
            "CPU s",
            target="<= 25",
            holds=high <= 25,
            n=3,
            spread=(low, high),
            seconds=seconds,
        ),
        figure(
            "in-sample C of noise, 14 patients, 9 deaths, 8 parameters, ridge 1",
            inside,
            "C",
            n=60,
            seconds=seconds,
            note="why the banner stands above such a number",
        ),
        figure(
            "leave-one-out C of the same",
            left_out,
            "C",
            target="0.40 to 0.56",
            holds=0.4 <= left_out <= 0.56,
            n=60,
            seconds=seconds,
        ),
    ]


def _noise(seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    C = np.column_stack([rng.normal(size=14), rng.integers(0, 2, (14, 2))])
    e = rng.permutation(14) < 9
    found = assess_model([CoxSite(X=rng.normal(size=(14, 5)), C=C, t=rng.exponential(500, 14), e=e)], replicates=0)
    return found.concordance, found.cross_validated


def _frames(sites: list[CoxSite], models: list[tuple[int, int]], status: np.ndarray) -> list[pd.DataFrame]:
    """Training rows of each model with status ok, the code per SD (in attrs), the site as stratum."""
    pooled = stacked(sites)
    assert pooled.train is not None
    frames = []
    for fold, code in models:
        if status[fold, code] != "ok":
            continue
        sd = float(pooled.X[:, code].std(ddof=1))
        data = {"b": pooled.X[:, code] / sd, **{f"c{k}": pooled.C[:, k] for k in range(3)}}
        frame = pd.DataFrame({**data, "t": pooled.t, "e": pooled.e, "site": pooled.strata})[pooled.train[fold]]
        frame.attrs["sd"] = sd
        frames.append(frame)
    return frames


def _lifelines(frame: pd.DataFrame, options: dict[str, float] | None = None) -> Any:
    from lifelines import CoxPHFitter

    return CoxPHFitter().fit(frame, "t", "e", strata=["site"], fit_options=options or {})


def _peak_of_4096_codes() -> float:
    """MB of this fresh process after one batch."""
    fit_cox_batch([with_folds(s) for s in cohorts(PAPER, codes=4096, seed=11)])
    return peak_bytes() / 2**20


if __name__ == "__main__":
    main()
