"""The rows of the forecast study from its finished seeds: plain numbers in, figures out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from _common import figure  # type: ignore[import-not-found]

from fourdvq.evaluation.conformal import merged_quantile, public_bins, score_counts
from fourdvq.evaluation.summary import bootstrap_interval

COMMAND = "python tests/benchmarks/phantom_forecast.py --state FOLDER"
EDGES = public_bins(0.5, 500)  # of the error of severity
ENOUGH = 100  # a share of fewer patients is reported, not judged


def rows(done: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All figures; null and the command where no seed is finished."""
    if not done:
        return [figure("forecasts on phantoms", None, "", note=f"an experiment of an hour: {COMMAND}")]
    seeds = [done[name] for name in sorted(done)]
    return [
        *_image_figures(seeds),
        *_change_figures(seeds),
        *_variant_figures(seeds),
        *_interval_figures(seeds),
        _federated_figure(seeds),
    ]


def _image_figures(seeds: Sequence[Any]) -> list[dict[str, Any]]:
    n, size = sum(s["patients"]["test"] for s in seeds), seeds[0]["patients"]
    note = f"{len(seeds)} seeds, each {size['train']} train and {size['test']} test patients"
    found = []
    for control, name in (
        ("persistence_decoded", "persistence through the decoder"),
        ("linear_latent", "decoded linear latents"),
    ):
        ratios = [_mean(s, "model", "mse") / _mean(s, control, "mse") for s in seeds]
        found.append(
            figure(
                f"paper's decode: MSE over that of {name}",
                round(statistics.fmean(ratios), 4),
                "ratio",
                target="<= 0.85",
                holds=statistics.fmean(ratios) <= 0.85,
                n=n,
                spread=(round(min(ratios), 4), round(max(ratios), 4)),
                note=note,
            )
        )
    # What is left of the copy's error after the autoencoder's own: only this part can a forecast win.
    floors = [_mean(s, "ceiling", "mse") / _mean(s, "persistence_decoded", "mse") for s in seeds]
    found.append(
        figure(
            "autoencoder ceiling: MSE over that of persistence through the decoder",
            round(statistics.fmean(floors), 4),
            "ratio",
            n=n,
            spread=(round(min(floors), 4), round(max(floors), 4)),
            note="no forecast of codes can come below it",
        )
    )
    skills = [v for s in seeds for v in s["images"]["model_residual"]["skill"]]
    mean, low, high = bootstrap_interval(skills, seed=0)
    found.append(
        figure(
            "residual detail: paired skill over raw persistence",
            round(mean, 4),
            "1 - MSE/MSE",
            target="95 % interval above 0",
            holds=low > 0,
            n=len(skills),
            spread=(round(low, 4), round(high, 4)),
            note=note + "; spread: 95 % bootstrap over patients",
        )
    )
    for row in ("model", "model_residual", "persistence", "persistence_decoded", "linear_latent", "ceiling"):
        by_seed = [_mean(s, row, "mse") for s in seeds]
        spread = (min(by_seed), max(by_seed))
        found.append(figure(f"extrapolation, lung: MSE of {row}", statistics.fmean(by_seed), "MSE", n=n, spread=spread))
    return found


def _change_figures(seeds: Sequence[Any]) -> list[dict[str, Any]]:
    parts = {name: [v for s in seeds for v in s["change"][name]] for name in seeds[0]["change"]}
    slopes = [_slope(s["change"]["predicted"], s["change"]["true"]) for s in seeds]
    slope = _slope(parts["predicted"], parts["true"])
    ours, oracle = (_correlation(parts[name], parts["true"]) for name in ("predicted", "oracle"))
    shares = [
        _correlation(s["change"]["predicted"], s["change"]["true"])
        / _correlation(s["change"]["oracle"], s["change"]["true"])
        for s in seeds
    ]
    unseen = bootstrap_interval(parts["unseen_skill"], seed=0)
    n = len(parts["true"])
    return [
        figure(
            "true on predicted change of severity at one year: slope",
            round(slope, 4),
            "1 = right size",
            target="0.7 to 1.3",
            holds=0.7 <= slope <= 1.3,
            n=n,
            spread=(round(min(slopes), 4), round(max(slopes), 4)),
            note="spread: smallest and largest seed",
        ),
        figure(
            "predicted against true change of severity at one year: correlation, as a share of the oracle's",
            round(ours / oracle, 4),
            "share",
            target=">= 0.9",
            holds=ours / oracle >= 0.9,
            n=n,
            spread=(round(min(shares), 4), round(max(shares), 4)),
            note=f"ours {ours:.4f}, oracle {oracle:.4f}; spread: smallest and largest seed",
        ),
        figure(
            "map of predicted against true change of severity, correlation over the lung's latent cells",
            round(statistics.fmean(parts["map"]), 4),
            "mean over patients",
            n=len(parts["map"]),
        ),
        figure(
            "residual detail against the true scan at a time that nobody observed: skill over persistence",
            round(unseen[0], 4),
            "1 - MSE/MSE",
            n=n,
            spread=(round(unseen[1], 4), round(unseen[2], 4)),
            note="one year after the last given scan; spread: 95 % bootstrap over patients",
        ),
    ]


def _variant_figures(seeds: Sequence[Any]) -> list[dict[str, Any]]:
    """What the model loses or gains with one part changed: correlation of the change, and skill at an unseen time."""
    found = []
    for label in seeds[0]["variants"]:
        changes = [s["variants"][label] for s in seeds]
        by_seed = [_correlation(c["predicted"], c["true"]) for c in changes]
        oracle = [_correlation(c["oracle"], c["true"]) for c in changes]
        skill, own = (
            statistics.fmean(v for c in each for v in c["unseen_skill"])
            for each in (changes, [s["change"] for s in seeds])
        )
        shares = [ours / best for ours, best in zip(by_seed, oracle, strict=True)]
        found.append(
            figure(
                f"{label}: correlation of predicted and true change, as a share of the oracle's",
                round(statistics.fmean(shares), 4),
                "share, mean of seeds",
                n=len(shares),
                spread=(round(min(shares), 4), round(max(shares), 4)),
                note=f"skill against the unseen true scan {skill:.4f}, the whole model's {own:.4f}",
            )
        )
    return found


def _interval_figures(seeds: Sequence[Any]) -> list[dict[str, Any]]:
    """Coverage of conformal intervals, each seed's calibrated on that seed's own calibration patients of both sites."""
    found = []
    for coverage, margin in ((0.8, 0.05), (0.95, 0.03)):
        inside: list[bool] = []
        widths = []
        for s in seeds:
            parts = s["intervals"]
            counts = [score_counts(errors, EDGES) for errors in parts["calibration"].values()]
            widths.append(merged_quantile(counts, EDGES, coverage))
            inside += [abs(e) <= widths[-1] for errors in parts["test"].values() for e in errors]
        found.append(
            _coverage_figure(f"conformal {coverage:.0%} intervals of severity", inside, coverage, margin, widths)
        )
        ranks = [r for s in seeds for r in s["intervals"]["sample_rank"]]
        raw = [(1 - coverage) / 2 <= r <= (1 + coverage) / 2 for r in ranks]
        found.append(
            _coverage_figure(
                f"the variational model's own {coverage:.0%} intervals, uncorrected", raw, coverage, None, []
            )
        )
    return found


def _coverage_figure(
    name: str, inside: Sequence[bool], coverage: float, margin: float | None, widths: Sequence[float]
) -> dict[str, Any]:
    from scipy.stats import binomtest

    n, k = len(inside), sum(inside)
    exact = binomtest(k, n).proportion_ci(0.95, method="exact")
    judged = margin is not None and n >= ENOUGH
    note = "spread: exact 95 % (Clopper-Pearson) interval"
    if widths:
        note += "; half-widths " + ", ".join(f"{w:.3f}" for w in widths)
    result: dict[str, Any] = figure(
        f"{name}: coverage",
        round(k / n, 4),
        "share of patients",
        target=None if margin is None else f"{coverage:g} +- {margin:g}",
        holds=abs(k / n - coverage) <= (margin or 0.0) if judged else None,
        n=n,
        spread=(round(float(exact.low), 4), round(float(exact.high), 4)),
        note=note,
    )
    return result


def _federated_figure(seeds: Sequence[Any]) -> dict[str, Any]:
    ratios = [s["latent_mse"]["federated"] / s["latent_mse"]["pooled"] for s in seeds]
    result: dict[str, Any] = figure(
        "stage 2 federated over pooled: MSE of the predicted codes of test patients",
        round(statistics.fmean(ratios), 4),
        "ratio",
        target="<= 1.03, none > 1.06",
        holds=statistics.fmean(ratios) <= 1.03 and max(ratios) <= 1.06,
        n=len(ratios),
        spread=(round(min(ratios), 4), round(max(ratios), 4)),
        seconds=sum(s["cpu_s"] for s in seeds),
        note="each seed " + ", ".join(f"{r:.4f}" for r in ratios),
    )
    return result


def _mean(seed: Mapping[str, Any], row: str, metric: str) -> float:
    return statistics.fmean(seed["images"][row][metric])


def _slope(predicted: Sequence[float], true: Sequence[float]) -> float:
    p, g = np.array(predicted), np.array(true)
    return float(((p - p.mean()) * g).sum() / np.square(p - p.mean()).sum())


def _correlation(predicted: Sequence[float], true: Sequence[float]) -> float:
    return float(np.corrcoef(predicted, true)[0, 1])
