"""What a survival analysis looks like to people: a table in CSV, a forest plot, a map of correlations."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourdvq.data.files import write_atomic

CODES, FOREST, CORRELATIONS = "biomarkers.csv", "forest.svg", "correlations.svg"
COLUMNS = ("code", "hazard_ratio", "low", "high", "worst_p", "concordance", "worst_concordance", "selected")
SHOWN = 20  # codes of the forest plot


def write_biomarkers(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """biomarkers.csv (a row per code), forest.svg and, for two or more selected codes, correlations.svg.

    `record` is the content of selection.json. Without a fitted code there is nothing to write.
    """
    codes = record["codes"]
    if not codes:
        return []
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: row[name] for name in COLUMNS} for row in codes)
    pages = {CODES: stream.getvalue(), FOREST: _forest(codes)}
    if len(record.get("correlations") or ()) > 1:
        pages[CORRELATIONS] = _correlations(record)
    for name, text in pages.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in pages]


def _forest(codes: list[dict[str, Any]]) -> str:
    from fourdvq.reports.charts import interval_chart

    rows = [
        (f"{_label(r['code'])}{' *' if r['selected'] else ''}", r["hazard_ratio"], r["low"], r["high"])
        for r in codes[:SHOWN]
    ]
    return interval_chart(
        rows, title="Hazard ratio per SD, mean over folds (* selected)", x_label="hazard ratio", reference=1.0
    )


def _label(code: int | str) -> str:
    """Codes of a model have numbers, biomarkers of a table have names."""
    return code if isinstance(code, str) else f"code {code}"


def _correlations(record: Mapping[str, Any]) -> str:
    from fourdvq.reports.charts import heat_map

    labels = [str(code) for code in record["selected"]]
    return heat_map(labels, record["correlations"], title="Correlation of the selected codes")
