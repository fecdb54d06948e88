"""`fourdvq-server demo`: the whole federation on synthetic lungs, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fourdvq.console import Result, table

_SHOWN = ("mse", "psnr", "ssim", "skill")
ROW_LABELS = {
    "model": "model",
    "model_residual": "model, residual detail",
    "persistence": "copy of the last scan",
    "persistence_decoded": "copy, through the decoder",
    "linear_latent": "linear in the codes",
    "ceiling": "autoencoder ceiling",
}


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="e.g. federation.rounds=6 seed=3")] = None,
    out: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="fewer patients and rounds: about a minute")] = False,
    pooled: Annotated[bool, typer.Option("--pooled", help="also train on the pooled data, and compare")] = False,
    processes: Annotated[bool, typer.Option("--processes", help="real processes with TLS and keys")] = False,
    fresh: Annotated[bool, typer.Option("--fresh/--keep", help="throw an earlier demo in this folder away")] = False,
) -> Result:
    """Two hospitals and an external one with synthetic lungs: prepare, train, validate, release, report.

    Nothing leaves this machine. A second demo in the same folder uses the prepared scans again.
    """
    from fourdvq_server.demo import DemoOptions, run_demo

    data = run_demo(DemoOptions(out, tuple(overrides or ()), quick, pooled, processes, fresh))
    return Result(data, tuple(_lines(data)))


def _lines(data: dict[str, Any]) -> list[str]:
    names = sorted(data["metrics"])
    lines = [*_scores(data), table(["site", "received", "sent"], [_traffic(data, name) for name in names]), ""]
    lines += [_biomarkers(data["biomarkers"]), ""]
    paths, trajectory = data["paths"], data["paths"]["trajectory"]
    rows = [(f"report of {site}", files["local"]) for site, files in paths["reports"].items()]
    rows += [("generated trajectory", trajectory["figure"]), ("  as NIfTI", trajectory["volumes"][-1])]
    if paths["biomarkers"]:
        rows.append(("biomarker table", paths["biomarkers"]))
    rows += [("released model", paths["release"]), ("run folder", paths["run"]), ("MLflow store", paths["mlflow"])]
    rows += [("  open its page", paths["open_mlflow"])]
    lines.append(table(["result", "where"], rows))
    return lines


def _scores(data: dict[str, Any]) -> list[str]:
    """Means on held-out patients, in the lung, extrapolation; the full tables with intervals are in the model card."""
    lines = []
    for group in ("train", "external"):
        cells = {(r["row"], r["metric"]): r for r in data["groups"].get(group, ())}
        found = [row for row in ROW_LABELS if (row, "extrapolation/mse/lung") in cells]
        rows = [(ROW_LABELS[row], *(_cell(cells, row, name) for name in _SHOWN)) for row in found]
        if rows:
            n = cells["model", "extrapolation/mse/lung"]["n"]
            lines += [table([f"{group}, {n} patients", *_SHOWN], rows), ""]
    if "pooled" in data:
        lines += [_side_by_side(data), ""]
    return lines


def _cell(cells: dict[tuple[str, str], dict[str, Any]], row: str, name: str) -> str:
    found = cells.get((row, f"extrapolation/{name}/lung"))
    return _number(found["mean"]) if found else "-"


def _side_by_side(data: dict[str, Any]) -> str:
    """Federated and pooled means on the external site, in the lung; the copy is the same scan for both."""
    ours = {(r["row"], r["metric"]): r["mean"] for r in data["groups"].get("external", ())}
    theirs = {(r["row"], r["metric"]): r["mean"] for r in data["pooled"]["groups"].get("external", ())}
    places = [("reconstruction", "reconstruction", "autoencoder")]
    places += [(row, "extrapolation", label) for row, label in ROW_LABELS.items() if row != "ceiling"]
    keys = [(row, f"{mode}/{name}/lung", label, name) for row, mode, label in places for name in _SHOWN[:3]]
    rows = [
        (f"{label}, {name}", _number(ours[row, metric]), _number(theirs[row, metric]))
        for row, metric, label, name in keys
        if (row, metric) in ours and (row, metric) in theirs
    ]
    return table(["external site", "federated", "pooled"], rows)


def _traffic(data: dict[str, Any], site: str) -> tuple[str, str, str]:
    down, up = data["bytes_down"].get(site, 0), data["bytes_up"].get(site, 0)
    return site, f"{down / 1e6:.2f} MB", f"{up / 1e6:.2f} MB"


def _biomarkers(found: dict[str, Any]) -> str:
    names = ", ".join(f"code {b}" for b in found["selected"]) or "none"
    return f"biomarkers: {names}" + (f"\n  {found['why']}" if found["why"] else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"
