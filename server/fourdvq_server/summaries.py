"""The sites' evaluation sums as numbers for tables, MLflow and the model card."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fourdvq.evaluation.summary import RowSums, combine, from_key, mean_interval
from fourdvq.wire.messages import EvalSummary, Reply


def row_sums(body: Reply) -> list[RowSums]:
    """The rows of one site's summary; nothing for any other reply."""
    if not isinstance(body, EvalSummary):
        return []
    columns = zip(body.rows, body.n, body.total, body.total_sq, strict=True)
    return [from_key(key, int(n), float(total), float(squares)) for key, n, total, squares in columns]


def means(sums: Iterable[RowSums]) -> dict[str, float]:
    """Row name, as MLflow allows it, to mean; rows without a value are left out."""
    return {metric_name(s): s.total / s.n for s in sums if s.n > 0}


def interval_rows(sums: Iterable[RowSums]) -> list[dict[str, Any]]:
    """One object per row: mean and 95 % t interval over the items of all sites; null where it does not exist."""
    rows = []
    for one in combine(sums):
        mean, low, high = (v if math.isfinite(v) else None for v in mean_interval(one))
        rows.append({"row": one.row, "metric": one.metric, "n": one.n, "mean": mean, "low": low, "high": high})
    return rows


def plain_sums(sums: Iterable[RowSums]) -> list[list[Any]]:
    """[key, n, total, total of squares] per row: what intervals can be made from again."""
    return [[s.key, s.n, s.total, s.total_sq] for s in sums]


def sums_from(plain: Iterable[Any]) -> list[RowSums]:
    """The inverse of `plain_sums`."""
    return [from_key(*row) for row in plain]


def find(rows: Iterable[Mapping[str, Any]], row: str, metric: str) -> Mapping[str, Any] | None:
    """The row of `interval_rows` with this name, or None."""
    return next((r for r in rows if (r["row"], r["metric"]) == (row, metric)), None)


def metric_name(sums: RowSums) -> str:
    """`row/metric` in the letters that MLflow allows; a metric that already begins with its row is not doubled."""
    key = sums.metric if sums.metric.startswith(f"{sums.row}/") else sums.key
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", key)
