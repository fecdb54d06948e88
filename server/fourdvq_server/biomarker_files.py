"""What a survival analysis looks like to people: tables in CSV, forest plots, correlations, curves, and pictures.

One row of `_DRAWINGS` is one figure: its file, title, and what draws it from the record, or None where the record has
nothing for it. Files and the section of a report are made from the same row.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fourdvq.data.files import csv_bytes, write_atomic
from fourdvq_server.store import read_json

RECORD = "selection.json"
CODES, MODEL, PICTURES = "biomarkers.csv", "model.csv", "codes.png"
COLUMNS = ("code", "hazard_ratio", "low", "high", "worst_p", "concordance", "worst_concordance", "selected")
MODEL_COLUMNS = ("name", "hazard_ratio", "low", "high", "p", "ph_chi2", "ph_p", "beta_per_sd", "se", "mean", "sd")
SHOWN = 20  # codes of the forest plot
Record = Mapping[str, Any]


def write_biomarkers(folder: Path, record: Record) -> list[Path]:
    """biomarkers.csv (a row per code), model.csv (a row per coefficient of the model of the selected codes), figures.

    `record` is the content of selection.json. Without a fitted code there is nothing to write.
    """
    if not record["codes"]:
        return []
    pages = {CODES: _csv(COLUMNS, record["codes"])}
    if _model(record):
        pages[MODEL] = _csv(MODEL_COLUMNS, _model(record))
    pages |= {name: svg for name, _, svg in drawings(record)}
    for name, text in pages.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in pages]


def drawings(record: Record) -> Iterator[tuple[str, str, str]]:
    """(file name, title, SVG) of every figure that the record has numbers for."""
    for name, title, draw in _DRAWINGS:
        svg = draw(record, title)
        if svg is not None:
            yield name, title, svg


def report_figures(folder: Path) -> list[dict[str, str]]:
    """`title` and `source` (a data address) of every figure of a stage's folder, for a page that must hold everything
    itself."""
    record = read_json(folder / RECORD, {})
    if not record.get("codes"):
        return []
    found = [{"title": title, "source": _address(svg.encode(), "svg+xml")} for _, title, svg in drawings(record)]
    if (folder / PICTURES).is_file():
        title = "Selected codes: what the model draws for each alone (no patient's scan)"
        found.append({"title": title, "source": _address((folder / PICTURES).read_bytes(), "png")})
    return found


def _forest(record: Record, title: str) -> str:
    from fourdvq.reports.charts import interval_chart

    rows = [
        (f"{_label(r['code'])}{' *' if r['selected'] else ''}", r["hazard_ratio"], r["low"], r["high"])
        for r in record["codes"][:SHOWN]
    ]
    return interval_chart(rows, title=title, x_label="hazard ratio", reference=1.0)


def _correlations(record: Record, title: str) -> str | None:
    from fourdvq.reports.charts import heat_map

    matrix = record.get("correlations") or ()
    return heat_map([str(code) for code in record["selected"]], matrix, title=title) if len(matrix) > 1 else None


def _model_forest(record: Record, title: str) -> str | None:
    from fourdvq.reports.charts import interval_chart

    rows = [(r["name"], r["hazard_ratio"], r["low"], r["high"]) for r in _model(record)]
    return interval_chart(rows, title=title, x_label="hazard ratio", reference=1.0) if rows else None


def _curves(record: Record, title: str) -> str | None:
    from fourdvq.reports.charts import step_chart

    groups = record.get("risk_groups") or {}
    shown = {f"{g} risk": (c["years"], c["survival"]) for g, c in groups.get("curves", {}).items() if c["years"]}
    p = groups.get("logrank_p")
    heading = title + (f", log-rank p {p:.2g}" if p is not None else "")
    return step_chart(shown, title=heading, x_label="years", y_label="alive") if shown else None


def _calibration(record: Record, title: str) -> str | None:
    from fourdvq.reports.charts import interval_chart

    rows = [
        (f"{r['group']} risk, {r['years']:.1f} y", *(r[k] - r["expected"] for k in ("observed", "low", "high")))
        for r in (record.get("risk_groups") or {}).get("calibration", ())
        if None not in (r["observed"], r["low"], r["high"], r["expected"])
    ]
    label = "observed minus expected survival"
    return interval_chart(rows, title=title, x_label=label, reference=0.0) if rows else None


_DRAWINGS: tuple[tuple[str, str, Callable[[Record, str], str | None]], ...] = (
    ("forest.svg", "Hazard ratio per SD, mean over folds (* selected)", _forest),
    ("correlations.svg", "Correlation of the selected codes", _correlations),
    ("model.svg", "Model of the selected codes, hazard ratio per SD", _model_forest),
    ("risk_groups.svg", "Survival by risk group", _curves),
    ("calibration.svg", "Calibration near 1, 3 and 5 years", _calibration),
)


def _model(record: Record) -> list[dict[str, Any]]:
    return list((record.get("model") or {}).get("coefficients", ()))


def _label(code: int | str) -> str:
    """Codes of a model have numbers, biomarkers of a table have names."""
    return code if isinstance(code, str) else f"code {code}"


def _csv(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    return csv_bytes(columns, ([row[name] for name in columns] for row in rows)).decode()


def _address(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
