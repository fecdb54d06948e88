"""The paper's ablation tables: one run per row, over the demo's synthetic hospitals or over a real federation.

Table 1 compares four latent ODEs on one tokenizer (every row trains the same stage 1 from the same seed), table 3 five
tokenizers. A row is a preset of configs/experiment; over the synthetic hospitals the row keeps what its preset changes
and takes the demo's sizes. A row whose run is finished is not run again, and one that was stopped goes on.

The printed figures are scores on target scans only, with the control rows; beside them stands the paper's own way of
scoring (the input scans pooled in), which flatters every model. The paper's numbers are of other patients: what can be
compared is the order of the rows. Source: paper tables 1 and 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourdvq.data.files import csv_bytes, write_atomic
from fourdvq.errors import ConfigError
from fourdvq_server.experiment import Experiment, compose, compose_plain
from fourdvq_server.project import Project
from fourdvq_server.stages.table import STAGES, Stage
from fourdvq_server.store import RunStore, open_store

# Survival and release follow from a trained model and are no part of these tables.
_LEFT_OUT = ("survival", "longitudinal", "release")
ABLATION_STAGES: tuple[Stage, ...] = tuple(stage for stage in STAGES if stage.name not in _LEFT_OUT)
_METRICS = ("mse", "ssim", "psnr")
_MODES = ("interpolation", "extrapolation")
CONTROLS = ("persistence", "persistence_decoded", "linear_latent", "population_change", "noise_control", "ceiling")


@dataclass(frozen=True)
class Row:
    """A row of a table: its preset, its words, and the numbers that the paper prints."""

    preset: str
    label: str
    paper: tuple[float, ...]

    def run_name(self) -> str:
        """The name of the row's run."""
        return "ablate-" + self.preset.replace("_", "-")


# MSE, SSIM, PSNR of interpolation, then of extrapolation.
TABLE_1 = (
    Row("table1_no_skip", "ConvGRU, no skip", (0.018, 0.500, 17.913, 0.023, 0.472, 16.974)),
    Row("table1_proposed", "ConvGRU + skip (proposed)", (0.020, 0.469, 17.387, 0.019, 0.489, 17.816)),
    Row("table1_ode_conv_gru", "ODE-ConvGRU + skip", (0.018, 0.508, 17.900, 0.026, 0.440, 16.913)),
    Row("table1_masked", "ConvGRU + skip + masked inputs", (0.035, 0.343, 15.366, 0.036, 0.340, 15.240)),
)
# MSE at the training sites' test patients, then at the external site.
TABLE_3 = (
    Row("table3_k1024", "K 1024, r 4, lr 3e-4", (3.76e-3, 6.84e-3)),
    Row("table3_k4096", "K 4096, r 4, lr 3e-4", (3.54e-3, 6.64e-3)),
    Row("table3_lr1e4", "K 256, r 4, lr 1e-4", (4.88e-3, 8.67e-3)),
    Row("table3_chosen", "K 256, r 4, lr 3e-4 (chosen)", (4.23e-3, 8.10e-3)),
    Row("table3_r8", "K 256, r 8, lr 3e-4", (6.17e-3, 1.15e-2)),
)
TABLES: Mapping[int, tuple[Row, ...]] = {1: TABLE_1, 3: TABLE_3}
# What the rows of a table differ in; over the synthetic hospitals everything else is the demo's.
_VARIED: Mapping[int, tuple[str, ...]] = {
    1: (
        "temporal.encoder", "temporal.skip", "temporal.projector", "temporal.anchor", "temporal.grid",
        "temporal.solver", "temporal.mask_prob", "temporal.velocity_input", "temporal.lung_context",
        "ode.lambda_drift",
    ),
    3: ("model.n_codes", "model.compression", "vqgan.lr"),
}  # fmt: skip
_PAPER_LR = 3e-4  # of the demo's rate so many times as of this one, since the demo takes far fewer steps

RunRow = Callable[[Experiment, str], None]  # runs (or resumes) an experiment under a name, through stage validate


def experiment_of(table: int, row: Row, base: Sequence[str], *, demo: bool) -> Experiment:
    """The row's experiment: its preset with the overrides `base`, or the demo's with what the preset varies."""
    if not demo:
        return compose((f"experiment={row.preset}", *base))
    theirs = compose_plain((f"experiment={row.preset}",))
    varied = {key: _at(theirs, key) for key in _VARIED[table]}
    if table == 3:
        ours = compose_plain(tuple(base))
        varied["vqgan.lr"] = _at(ours, "vqgan.lr") * float(varied["vqgan.lr"]) / _PAPER_LR
        # Stage 2 is not looked at here.
        varied |= {"federation.ode_rounds": 1, "federation.ode_local_steps": 1}
    words = tuple(f"{key}={_word(value)}" for key, value in varied.items())
    return compose((*base, *words, f"name={row.preset}"))


def run_rows(
    project: Project,
    table: int,
    experiments: Mapping[str, Experiment],
    run_row: RunRow,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run every row that is not finished; returns the table's rows, controls last.

    Raises ConfigError E_EXISTS if a run of that name was made from another plan, and what a run raises.
    """
    made: list[dict[str, Any]] = []
    for number, row in enumerate(TABLES[table], start=1):
        name, experiment = row.run_name(), experiments[row.preset]
        store = existing(project, name, experiment)
        if store is not None and store.stage("validate").is_done:
            tell(f"row {number} of {len(TABLES[table])}: {row.label}: finished before")
        else:
            tell(f"row {number} of {len(TABLES[table])}: {row.label}: run {name}")
            run_row(experiment, name)
        made.append(_line(table, row, open_store(project.runs / name)))
    if table == 1:
        made += _controls(open_store(project.runs / TABLE_1[1].run_name()))
    return made


def existing(project: Project, name: str, experiment: Experiment) -> RunStore | None:
    """The run of that name, if there is one. Raises ConfigError E_EXISTS if it is of another plan."""
    if not (project.runs / name).is_dir():
        return None
    store = open_store(project.runs / name)
    if store.plan.hash != experiment.plan.hash:
        raise ConfigError(
            "E_EXISTS",
            where=str(store.folder),
            found="a run with other settings",
            wanted="the same settings",
            fix="repeat the command with the settings of that run, or with another folder (--out)",
        )
    return store


def write_table(out: Path, table: int, rows: Sequence[Mapping[str, Any]]) -> tuple[Path, Path]:
    """Write table<N>.csv and table<N>.json under `out`; returns both paths."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    paths = (out / f"table{table}.csv", out / f"table{table}.json")
    write_atomic(paths[0], csv_bytes(columns, ([row.get(c) for c in columns] for row in rows)))
    write_atomic(paths[1], (json.dumps({"table": table, "rows": list(rows)}, indent=1) + "\n").encode())
    return paths


def _line(table: int, row: Row, store: RunStore) -> dict[str, Any]:
    groups = (store.stage("validate").result or {"groups": {}})["groups"]
    line: dict[str, Any] = {"row": row.label, "preset": row.preset, "run": store.name, "plan": store.plan.hash}
    if table == 3:
        for place, group in (("internal", "train"), ("external", "external")):
            line |= _cell(groups.get(group, []), "reconstruction", "reconstruction/mse/whole", f"{place}_mse")
        return line | dict(zip(("paper_internal_mse", "paper_external_mse"), row.paper, strict=True))
    everyone = groups.get("all", [])
    for mode in _MODES:
        for metric in _METRICS:
            line |= _cell(everyone, "model", f"{mode}/{metric}/lung", f"{mode}_{metric}")
        for metric in _METRICS:
            line |= _cell(everyone, "paper_pooled", f"{mode}/{metric}/lung", f"{mode}_{metric}_pooled", n=False)
        line |= _cell(everyone, "model", f"{mode}/skill/lung", f"{mode}_skill", interval=True, n=False)
    names = [f"paper_{mode}_{metric}" for mode in _MODES for metric in _METRICS]
    return line | dict(zip(names, row.paper, strict=True))


def _controls(store: RunStore) -> list[dict[str, Any]]:
    """The control rows of the proposed model's run; those of the other rows are the same, as their tokenizer is."""
    everyone = (store.stage("validate").result or {"groups": {}})["groups"].get("all", [])
    lines = []
    for name in CONTROLS:
        line: dict[str, Any] = {"row": f"control: {name.replace('_', ' ')}", "preset": "", "run": store.name}
        for mode in _MODES:
            for metric in (*_METRICS, "skill"):
                line |= _cell(everyone, name, f"{mode}/{metric}/lung", f"{mode}_{metric}", n=False)
        if any(key.endswith("_mse") for key in line):
            lines.append(line)
    return lines


def _cell(
    rows: Sequence[Mapping[str, Any]], row: str, metric: str, name: str, *, interval: bool = False, n: bool = True
) -> dict[str, Any]:
    """The mean under `name`, with its n and (if asked) its 95 % interval; empty where nothing was measured."""
    found = next((r for r in rows if (r["row"], r["metric"]) == (row, metric)), None)
    if found is None:
        return {}
    cell = {name: found["mean"]}
    if n and name.endswith("_mse"):
        cell[f"{name}_n"] = found["n"]
    if interval:
        cell |= {f"{name}_low": found["low"], f"{name}_high": found["high"]}
    return cell


def _at(plain: Mapping[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        plain = plain[key]
    return plain


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
