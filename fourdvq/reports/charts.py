"""Charts as SVG text, drawn by matplotlib without a display, one style for all reports."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

INK, GRID = "#22303c", "#d8dee4"
COLOURS = ("#0b6e99", "#c8553d", "#588157", "#8a5a9e", "#b08900", "#5b6770")


def line_chart(series: Mapping[str, Sequence[float]], *, title: str, x_label: str, y_label: str) -> str:
    """One line per name over 1, 2, 3, ...: losses and scores over rounds."""
    figure, axes = _canvas(title, x_label, y_label)
    for colour, (name, values) in zip(COLOURS * 4, series.items(), strict=False):
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, linewidth=1.6, color=colour, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def interval_chart(
    rows: Sequence[tuple[str, float, float | None, float | None]],
    *,
    title: str,
    x_label: str,
    reference: float | None = None,
) -> str:
    """A forest plot: per row (label, value, low, high); `reference` is drawn as the line of no effect."""
    figure, axes = _canvas(title, x_label, "", height=0.7 + 0.32 * max(len(rows), 1))
    if reference is not None:
        axes.axvline(reference, color=INK, linewidth=0.9, linestyle="--")
    for place, (_, value, low, high) in enumerate(rows):
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=1.6)
        axes.plot([value], [place], "o", color=COLOURS[0], markersize=5)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return _svg(figure)


def step_chart(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, x_label: str, y_label: str
) -> str:
    """Survival curves: per name (times, survival), drawn as steps from 1."""
    figure, axes = _canvas(title, x_label, y_label)
    for colour, (name, (times, survival)) in zip(COLOURS, curves.items(), strict=False):
        axes.step([0, *times], [1, *survival], where="post", linewidth=1.6, color=colour, label=name)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def heat_map(labels: Sequence[str], values: Sequence[Sequence[float]], *, title: str) -> str:
    """A square matrix of correlations from -1 (red) over 0 (white) to 1 (blue), each cell with its number."""
    from matplotlib.colors import LinearSegmentedColormap

    side = max(len(labels), 1)
    figure, axes = _canvas(title, "", "", height=1.2 + 0.5 * side)
    colours = LinearSegmentedColormap.from_list("correlation", [COLOURS[1], "#ffffff", COLOURS[0]])
    axes.pcolormesh(values, cmap=colours, vmin=-1, vmax=1, edgecolors="white", linewidth=1)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=INK)
    places = [place + 0.5 for place in range(len(labels))]
    axes.set_xticks(places, labels)
    axes.set_yticks(places, labels)
    axes.set_ylim(side, 0)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    return _svg(figure)


def _canvas(title: str, x_label: str, y_label: str, height: float = 2.8) -> tuple[Any, Any]:
    # The object interface: pyplot would keep every figure alive and look for a display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(x_label, fontsize=8, color=INK)
    axes.set_ylabel(y_label, fontsize=8, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(visible=True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    stream = io.StringIO()
    # A fixed salt and no date: the same numbers give the same file.
    with mpl.rc_context({"svg.hashsalt": "fourdvq", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :]
