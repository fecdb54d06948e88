"""`fourdvq-server ablate`: the paper's ablation tables, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fourdvq.console import Result, note, table

_SHOWN = {
    1: [
        (f"{mode[:6]}. {metric}", f"{mode}_{key}")
        for mode in ("interpolation", "extrapolation")
        for metric, key in (("MSE", "mse"), ("SSIM", "ssim"), ("PSNR", "psnr"), ("skill", "skill"))
    ],
    3: [("MSE internal", "internal_mse"), ("MSE external", "external_mse")],
}
_PAPER = {
    1: [(f"paper {mode[:6]}. MSE", f"paper_{mode}_mse") for mode in ("interpolation", "extrapolation")],
    3: [("paper internal", "paper_internal_mse"), ("paper external", "paper_external_mse")],
}


def ablate(
    overrides: Annotated[list[str] | None, typer.Argument(help="e.g. federation.rounds=6 seed=3")] = None,
    number: Annotated[int, typer.Option("--table", help="1 (latent ODE) or 3 (tokenizer)")] = 1,
    out: Annotated[Path, typer.Option(help="folder of the synthetic hospitals and of the tables")] = Path("ablation"),
    quick: Annotated[bool, typer.Option("--quick", help="fewer patients and rounds: a minute a row")] = False,
    over_sites: Annotated[
        bool, typer.Option("--over-sites", help="over the federation of --workdir instead of synthetic hospitals")
    ] = False,
) -> Result:
    """Train every row of the paper's table 1 or 3, one after the other, and print the table with its control rows.

    A row that is finished is not run again: the same command goes on where it stopped.
    """
    from fourdvq.errors import ConfigError
    from fourdvq_server import ablation

    if number not in ablation.TABLES:
        raise ConfigError("E_USAGE", where="--table", found=str(number), wanted="1 or 3")
    if over_sites:
        rows = _over_sites(number, tuple(overrides or ()))
    else:
        rows = _over_synthetic(number, out, tuple(overrides or ()), quick)
    paths = ablation.write_table(out, number, rows)
    lines = [_printed(number, rows), "", *map(str, paths)]
    return Result({"table": number, "rows": list(rows), "files": [str(p) for p in paths]}, tuple(lines))


def _over_synthetic(number: int, out: Path, overrides: Sequence[str], quick: bool) -> list[dict[str, Any]]:
    from fourdvq_server import ablation, demo
    from fourdvq_server.app import new_run
    from fourdvq_server.experiment import Experiment, compose

    client = demo.load_client()
    options = demo.DemoOptions(out, tuple(overrides), quick)
    folders = demo.Folders(out.resolve())
    base = options.all_overrides
    demo.prepare(folders, options, compose(base), client)
    roots = {site.name: folders.site(site.name) for site in options.sites}
    project = folders.coordinator

    def run_row(experiment: Experiment, name: str) -> None:
        if not (project.runs / name).is_dir():
            new_run(project, experiment, name=name)
        demo.run_in_process(project, experiment, roots, client, name, run=name, stages=ablation.ABLATION_STAGES)

    rows = ablation.TABLES[number]
    experiments = {row.preset: ablation.experiment_of(number, row, base, demo=True) for row in rows}
    return ablation.run_rows(project, number, experiments, run_row, note)


def _over_sites(number: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    from fourdvq_server import ablation
    from fourdvq_server.app import allow_to_run, new_run
    from fourdvq_server.experiment import Experiment
    from fourdvq_server.network_run import run_over_network
    from fourdvq_server.verbs._project import here

    project = here()

    def run_row(experiment: Experiment, name: str) -> None:
        if (project.runs / name).is_dir():
            allow_to_run(project, name)
        else:
            new_run(project, experiment, name=name)
        run_over_network(project, name, notify=note)

    rows = ablation.TABLES[number]
    experiments = {row.preset: ablation.experiment_of(number, row, overrides, demo=False) for row in rows}
    return ablation.run_rows(project, number, experiments, run_row, note)


def _printed(number: int, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [*_SHOWN[number], *_PAPER[number]]
    body = [(row["row"], *(_shown(row.get(key)) for _, key in columns)) for row in rows]
    notes = ["the paper's figures are of its own patients and pool the input scans in; compare the order, not the size"]
    if number == 1:
        notes.append("target scans only, lung; skill is 1 - MSE / MSE of copying the last scan")
    return "\n".join([table(["", *(name for name, _ in columns)], body), *notes])


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
