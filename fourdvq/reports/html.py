"""Facts to one self-contained HTML file: escaped text, charts as inline SVG, pictures as data addresses."""

from __future__ import annotations

import base64
from collections import Counter
from typing import Any

from fourdvq.reports.charts import interval_chart, line_chart
from fourdvq.reports.validation import Edition, MetricRow, Picture, ReportData, report_json, share_edition, verdicts

_UNITS = {"psnr": "dB", "ssim": "", "mse": "", "mae_hu": "HU", "skill": ""}
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
    "whole": "whole volume",
    "lung": "inside the lung",
}


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
                name: _pivot(_rows(facts, plain, name)) for name in ("reconstruction", "extrapolation", "interpolation")
            },
            row_names=_ROW_NAMES,
            units=_UNITS,
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


def _pivot(rows: tuple[MetricRow, ...]) -> tuple[list[str], list[tuple[str, dict[str, MetricRow]]]]:
    metrics = list(dict.fromkeys(r.metric for r in rows))
    names = list(dict.fromkeys(r.row for r in rows))
    return metrics, [(name, {r.metric: r for r in rows if r.row == name}) for name in names]


def _charts(facts: ReportData, edition: Edition) -> dict[str, str]:
    charts = {}
    if facts.history:
        charts["history"] = line_chart(
            facts.history,
            title="Training at this site: L1 error of reconstructions over rounds",
            x_label="round",
            y_label="mean absolute error",
        )
    skill = [r for r in facts.extrapolation if r.metric == "skill" and (edition == "local" or r.n >= 5)]
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
