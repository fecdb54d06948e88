"""Facts to one self-contained HTML file: escaped text, charts as inline SVG, pictures as data addresses."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fourdvq.reports.charts import interval_chart, line_chart
from fourdvq.reports.validation import (
    SMALL_CELL,
    Edition,
    MetricRow,
    Picture,
    ReportData,
    report_json,
    share_edition,
    verdicts,
)

# Metrics in the order of their columns: (name in the facts, heading); the change metrics are a table of their own.
_LEVEL_METRICS = {
    "skill": "skill against the last scan",
    "mse": "MSE",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "mae_hu": "mean error, HU",
}
_CHANGE_METRICS = {
    "change_correlation": "correlation of changes",
    "change_slope": "slope (1 = right size)",
    "auroc_increase": "AUROC of increases",
    "auroc_decrease": "AUROC of decreases",
}
# Rows in the order in which they are read: ours, what it must beat, controls, the ceiling.
_ROW_NAMES = {
    "model": "model (re-quantised decode)",
    "model_residual": "model + residual detail",
    "persistence": "last scan carried forward",
    "persistence_decoded": "last scan, through the decoder",
    "linear_latent": "linear in latents",
    "population_change": "mean change of the training patients",
    "noise_control": "last scan + noise (control)",
    "ceiling": "ceiling: the real scan, through the decoder",
    "paper_pooled": "as the paper pools it (given and target times)",
    "lung": "inside the lung",
    "whole": "whole volume",
}

Table = tuple[list[str], list[tuple[str, dict[str, MetricRow]]]]


def render_report(data: ReportData, edition: Edition) -> str:
    """The report as one HTML document that needs no network, no script and no other file."""
    facts = share_edition(data) if edition == "share" else data
    # The tables show what the JSON of the same edition holds, small cells included: no second source of numbers.
    plain = report_json(data, edition)
    return str(
        _environment()
        .get_template("report.html.j2")
        .render(
            facts=facts,
            plain=plain,
            edition=edition,
            verdicts=verdicts(facts),
            charts=_charts(facts, edition),
            grades=sorted(Counter(case.grade for case in facts.cases).items()),
            tables={
                name: [_pivot(_rows(facts, plain, name), metrics) for metrics in (_LEVEL_METRICS, _CHANGE_METRICS)]
                for name in ("reconstruction", "extrapolation", "interpolation")
            },
            row_names=_ROW_NAMES,
            headings=_LEVEL_METRICS | _CHANGE_METRICS,
        )
    )


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fourdvq.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_address"] = _data_address
    environment.filters["bytes"] = _human_bytes
    return environment


def _rows(facts: ReportData, plain: dict[str, Any], name: str) -> tuple[MetricRow, ...]:
    kept = {(row["row"], row["metric"]) for row in plain[name]}
    return tuple(r for r in getattr(facts, name) if (r.row, r.metric) in kept)


def _pivot(rows: tuple[MetricRow, ...], metrics: Mapping[str, str]) -> Table:
    """Columns that occur, in the order of `metrics`, and lines that occur, in the order of `_ROW_NAMES`."""
    found = {(r.row, r.metric): r for r in rows if r.metric in metrics}
    columns = [m for m in metrics if any(metric == m for _, metric in found)]
    names = [n for n in _ROW_NAMES if any(row == n for row, _ in found)]
    return columns, [(name, {m: found[name, m] for m in columns if (name, m) in found}) for name in names]


def _charts(facts: ReportData, edition: Edition) -> dict[str, str]:
    charts = {}
    if facts.history:
        charts["history"] = line_chart(
            facts.history,
            title="Training at this site: L1 error of reconstructions over rounds",
            x_label="round",
            y_label="mean absolute error",
        )
    # Rows that went through the decoder lie far off at this scale; the table has them.
    shown = ("model_residual", "persistence", "noise_control")
    skill = [r for r in facts.extrapolation if (r.metric, r.row in shown) == ("skill", True)]
    skill = [r for r in skill if edition == "local" or r.n >= SMALL_CELL]
    if skill:
        rows = [(_ROW_NAMES.get(r.row, r.row), r.mean, r.low, r.high) for r in skill]
        charts["skill"] = interval_chart(
            rows,
            title="Skill against the last scan carried forward",
            x_label="1 - MSE / MSE of the last scan",
            reference=0.0,
        )
    if facts.biomarkers.rows:
        best = sorted(facts.biomarkers.rows, key=lambda b: (not b.selected, -b.concordance))[:12]
        rows = [(f"code {b.code}{' *' if b.selected else ''}", b.hazard_ratio, b.low, b.high) for b in best]
        charts["hazard"] = interval_chart(
            rows,
            title="Hazard ratio per SD of the code's share (* selected)",
            x_label="hazard ratio, 95 % interval",
            reference=1.0,
        )
    return charts


def _data_address(picture: Picture) -> str:
    return f"data:{picture.media};base64,{base64.b64encode(picture.data).decode()}"


def _human_bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
