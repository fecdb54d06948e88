"""Sums over patients that a site may send, and what a reader makes of them: means, intervals, verdicts, tables.

A row is (row, metric): `row` says who predicted (model, persistence, ...), `metric` what was measured, as
`mode/name/region` or `mode/name/region/stratum`, for example `extrapolation/skill/lung/1-2` (years ahead), `/fast`,
`/scanner-siemens`, `/slices-thin`. The unit of n is the patient (the scan, in mode `reconstruction`): two scans of one
patient are not two independent results.

Intervals over sites come from n, sum and sum of squares (Student's t); a bootstrap needs the single values and is
possible where all patients lie at one site.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fourdvq.errors import ModelError

CONTROL_ROWS = ("persistence", "persistence_decoded", "linear_latent", "noise_control", "ceiling")
ROW_ORDER = ("model", "model_residual", *CONTROL_ROWS, "population_change", "paper_pooled")
ROW_LABELS = {
    "model": "model",
    "model_residual": "model, residual detail",
    "persistence": "copy of the last scan",
    "persistence_decoded": "copy, through the decoder",
    "linear_latent": "linear in the codes",
    "population_change": "mean change of the population",
    "noise_control": "copy + noise of the size of the true change",
    "ceiling": "autoencoder ceiling (sees the target)",
    "paper_pooled": "model, input scans pooled in as in the paper (not a forecast score)",
}
TABLE_METRICS = ("mse", "psnr", "ssim", "mae_hu", "skill", "psnr_gain", "change_correlation", "change_slope")
FEW_PATIENTS = 64  # below it, half-widths of the gain are wider than 0.41 dB; evaluation page, section 2

Verdict = Literal["better than copying", "not better than copying", "worse than copying"]


@dataclass(frozen=True)
class RowSums:
    """n values, their sum and their sum of squares: additive over patients and over sites."""

    row: str
    metric: str
    n: int
    total: float
    total_sq: float

    @property
    def key(self) -> str:
        """`row/metric`, the name under which the sums travel."""
        return f"{self.row}/{self.metric}"

    def __add__(self, other: RowSums) -> RowSums:
        if (self.row, self.metric) != (other.row, other.metric):
            raise ValueError(f"{self.key} and {other.key} are different rows")
        return RowSums(
            self.row, self.metric, self.n + other.n, self.total + other.total, self.total_sq + other.total_sq
        )


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; not a number where nothing was measured."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class TableRow:
    """One printed row: an interval per metric; a metric that the row does not have is absent."""

    row: str
    label: str
    cells: Mapping[str, Interval]


def from_key(key: str, n: int, total: float, total_sq: float) -> RowSums:
    """The inverse of `RowSums.key`."""
    row, _, metric = key.partition("/")
    return RowSums(row, metric, int(n), float(total), float(total_sq))


def sums_of(row: str, metric: str, values: Iterable[float]) -> RowSums:
    """Sums of the finite values; one that is undefined for a patient is left out and lowers n."""
    x = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    return RowSums(row, metric, len(x), float(x.sum()), float(np.square(x).sum()))


def combine(sums: Iterable[RowSums]) -> list[RowSums]:
    """Add up the sums of the same (row, metric), from any number of sites; sorted by row and metric."""
    merged: dict[tuple[str, str], RowSums] = {}
    for one in sums:
        key = (one.row, one.metric)
        merged[key] = merged[key] + one if key in merged else one
    return [merged[key] for key in sorted(merged)]


def mean_interval(sums: RowSums, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and t interval (mean, low, high). One value has no interval (infinite), none has no mean (not a number)."""
    if sums.n == 0:
        return math.nan, math.nan, math.nan
    mean = sums.total / sums.n
    if sums.n == 1:
        return mean, -math.inf, math.inf
    from scipy.special import stdtrit

    variance = max(0.0, sums.total_sq - sums.n * mean * mean) / (sums.n - 1)
    half = float(stdtrit(sums.n - 1, (1 + confidence) / 2)) * math.sqrt(variance / sums.n)
    return mean, mean - half, mean + half


def bootstrap_interval(
    values: Sequence[float], *, seed: int, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean and percentile bootstrap interval over patients, for one site that holds all of them."""
    x = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    if len(x) < 2:
        return mean_interval(sums_of("", "", x), confidence)
    rng = np.random.default_rng(seed)
    means = np.array([x[rng.integers(0, len(x), len(x))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(x.mean()), float(low), float(high)


def verdict(skill: RowSums) -> Verdict:
    """What may be claimed from a `skill` or `psnr_gain` row: only an interval that excludes 0 is a claim."""
    _, low, high = mean_interval(skill)
    if low > 0:
        return "better than copying"
    return "worse than copying" if high < 0 else "not better than copying"


def table(sums: Sequence[RowSums], *, mode: str = "extrapolation", region: str = "lung") -> list[TableRow]:
    """The rows of one mode and region, in a fixed order.

    Raises ModelError E_CONTROLS if a control row is missing: a model's figures mean nothing without them.
    """
    cells: dict[str, dict[str, Interval]] = {}
    for one in combine(sums):
        parts = one.metric.split("/")
        if len(parts) == 3 and parts[0] == mode and parts[2] == region:
            cells.setdefault(one.row, {})[parts[1]] = Interval(*mean_interval(one), one.n)
    missing = [row for row in CONTROL_ROWS if "mse" not in cells.get(row, {})]
    if missing:
        raise ModelError("E_CONTROLS", where=f"{mode} table", found=f"no row {', '.join(missing)}")
    others = sorted(row for row in cells if row not in ROW_ORDER)
    order = [row for row in (*ROW_ORDER, *others) if row in cells]
    return [TableRow(row, ROW_LABELS.get(row, row), cells[row]) for row in order]


def format_table(sums: Sequence[RowSums], *, mode: str = "extrapolation", region: str = "lung") -> str:
    """The table as text, with the number of patients and pairs, the verdict, and a warning if patients are few.

    Raises ModelError E_CONTROLS as `table` does.
    """
    rows = table(sums, mode=mode, region=region)
    shown = [metric for metric in TABLE_METRICS if any(metric in row.cells for row in rows)]
    width = max(len(row.label) for row in rows)
    lines = [" ".join([f"{mode}, {region}".ljust(width), *[metric.rjust(26) for metric in shown]])]
    lines += [
        " ".join([row.label.ljust(width), *[_cell(row.cells.get(metric)).rjust(26) for metric in shown]])
        for row in rows
    ]
    merged = {(one.row, one.metric): one for one in combine(sums)}
    pairs = merged.get(("cohort", f"{mode}/pairs"))
    n = pairs.n if pairs else 0
    lines.append(f"{n} patients, {int(pairs.total) if pairs else 0} predicted scans")
    skill = merged.get(("model", f"{mode}/skill/{region}"))
    lines.append(f"the model is {verdict(skill) if skill else 'not compared with copying'} (95 % interval of skill)")
    if n < FEW_PATIENTS:
        lines.append(f"warning: fewer than {FEW_PATIENTS} patients; small differences cannot be seen")
    return "\n".join(lines)


def _cell(interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.mean):
        return "-"
    if math.isinf(interval.low):
        return f"{interval.mean:.4g}"
    return f"{interval.mean:.4g} [{interval.low:.3g}, {interval.high:.3g}]"
