"""survival: the analysis for hospitals that have a table of biomarkers and no images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fourdvq.console import Result, table


def survival(
    tables: Annotated[
        list[Path], typer.Option("--table", help="CSV of one site; repeat it for every site", show_default=False)
    ],
    model: Annotated[
        list[str] | None, typer.Option(help="fit one model of this biomarker and the covariates; may be repeated")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="where the files go")] = Path("survival"),
    folds: Annotated[int, typer.Option(help="cross-validation folds of the selection", min=2)] = 5,
    permutations: Annotated[int, typer.Option(help="replicates for the permutation P", min=0, max=200)] = 99,
    baseline: Annotated[Literal["site", "shared"], typer.Option(help="whose baseline hazard")] = "site",
    rules: Annotated[Literal["policy", "off"], typer.Option(help="disclosure rules of the sites")] = "policy",
    transplant: Annotated[Literal["censor", "event"], typer.Option(help="what a transplant counts as")] = "censor",
) -> Result:
    """Select biomarkers over sites that only have a CSV, or with --model fit one model; each file is a site.

    Columns: pseudonym, time_days, event, age, sex, smoking; every other column is a biomarker.
    """
    from fourdvq_server.biomarker_tables import read_tables
    from fourdvq_server.table_survival import MODEL, TableOptions, assess_over_tables, select_over_tables
    from fourdvq_server.verbs.biomarkers import biomarker_lines, prognosis_lines

    sites = read_tables(tables, transplant=transplant)
    options = TableOptions(folds=folds, baseline=baseline, permutations=permutations, rules=rules)
    if model:
        record = assess_over_tables(sites, model, options, output)
        return Result({**record, "files": [str(output / MODEL)]}, tuple([*_model_lines(record), str(output / MODEL)]))
    record, files = select_over_tables(sites, options, output)
    lines = [*biomarker_lines(record, len(record["codes"]) or 1), *prognosis_lines(record), "", *map(str, files)]
    return Result({**record, "files": [str(path) for path in files]}, tuple(lines))


def _model_lines(record: dict[str, Any]) -> list[str]:
    """The model as a person reads it: what limits it stands above the numbers."""

    def shown(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    lines = [record["banner"], ""] if record["banner"] else []
    rows = [
        (
            r["name"],
            shown(r["coef"], ".4g"),
            shown(r["se"], ".3g"),
            shown(r["p"], ".2g"),
            shown(r["unpenalised_coef"], ".4g"),
        )
        for r in record["model"]
    ]
    lines += [
        f"{record['patients']} patients, {record['deaths']} deaths, {record['parameters']} parameters: "
        f"{record['epv']:.1f} deaths per parameter; ridge {record['ridge']:g} per SD",
        "",
        table(("column", "coef", "se", "p", "coef without ridge"), rows),
        "",
        f"C in the same patients    {shown(record['concordance'])}  (never alone: see the next two)",
        f"C cross-validated         {shown(record['cross_validated'])}  ({record['cross_validation']})",
        f"permutation P of that C   {shown(record['permutation_p'], '.3g')}  ({record['replicates']} replicates)",
        "",
    ]
    return lines
