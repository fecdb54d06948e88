"""pull, evaluate, generate: what a site does with a released model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq_client.verbs._site import here

Model = Annotated[str, typer.Option(help="Version of the model; without it the one that came last.")]


def pull(
    bundle: Annotated[Path, typer.Option("--import", help="Folder of a released bundle, or a file in it.")],
) -> Result:
    """Take in a released model from a folder, after checking every file of it, and show its card."""
    from fourdvq.errors import ModelError
    from fourdvq_client.released import import_release

    workspace, _ = here()
    if not bundle.exists():
        raise ModelError("E_RELEASE", where=str(bundle), found="nothing", wanted="a released bundle")
    release = import_release(workspace, bundle)
    facts = {"version": release.card["version"], "folder": str(release.folder), "card": dict(release.card)}
    lines = [f"model {release.card['version']} in {release.folder}"]
    lines += [
        f"  {name}  {release.card[name]}" for name in ("run", "plan_sha256", "weights_sha256") if name in release.card
    ]
    return Result(facts, tuple(lines))


def evaluate(
    model: Model = "",
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
) -> Result:
    """Score a model on this site's own patients; the figures stay here unless a person submits them."""
    from fourdvq.errors import ConfigError, ModelError
    from fourdvq.evaluation.summary import format_table
    from fourdvq_client.local_scores import score_locally
    from fourdvq_client.released import open_release
    from fourdvq_client.site_report import metric_rows

    if split not in ("test", "validation"):
        raise ConfigError("E_USAGE", where="--split", found=split, wanted="test or validation")
    workspace, config = here()
    release = open_release(workspace, model)
    scores = score_locally(workspace, config, release, split)
    rows = metric_rows(scores.sums, "reconstruction")
    lines = [f"model {release.card['version']} on split {split}"]
    shown = [(r.row, r.metric, r.n, f"{r.mean:.4g}") for r in rows]
    lines.append(console.table(("reconstruction", "metric", "n", "mean"), shown))
    for mode in release.plan.evaluation.modes:
        try:
            lines.append(format_table(scores.sums, mode=mode))
        except ModelError as error:
            lines.append(f"{mode}: no table: {error.found}")
    sums = [{"row": s.row, "metric": s.metric, "n": s.n, "total": s.total, "total_sq": s.total_sq} for s in scores.sums]
    return Result({"model": release.card["version"], "split": split, "sums": sums}, tuple(lines))


def generate(
    patient: Annotated[str, typer.Option(help="Pseudonym or hospital id; without it the first with two scans.")] = "",
    interval: Annotated[float | None, typer.Option(help="Years between generated scans.")] = None,
    years: Annotated[float | None, typer.Option(help="Up to so many years after the first scan.")] = None,
    times: Annotated[str, typer.Option(help="Years after the first scan: 0.5:3:0.5 (first:last:step) or 1,2.5.")] = "",
    model: Model = "",
    given: Annotated[int, typer.Option(help="Use only so many of the first scans; 0 uses all.", min=0)] = 0,
    residual: Annotated[
        bool, typer.Option("--residual", help="Last scan plus the predicted change, not the decoder's own image.")
    ] = False,
    samples: Annotated[
        int, typer.Option(help="Courses to draw of a variational model: adds mean and spread.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the drawn courses.")] = 0,
    precision: Annotated[
        str, typer.Option(help="Of the decoder: fp32 or bf16 (faster where the CPU has it).")
    ] = "fp32",
    dicom: Annotated[bool, typer.Option("--dicom", help="Also a CT series per time, marked synthetic.")] = False,
    beyond_horizon: Annotated[
        bool, typer.Option("--beyond-horizon", help="Also for times later than any patient was seen.")
    ] = False,
) -> Result:
    """Generate scans of a patient at other times, labelled synthetic: NIfTI, a figure, a moving picture, a manifest."""
    from fourdvq.errors import ConfigError
    from fourdvq.training.memory import keep_freed_memory
    from fourdvq_client.generated_files import How
    from fourdvq_client.site_generation import Asked, generate_for, parse_times

    if bool(times) == (interval is not None or years is not None):
        raise ConfigError("E_USAGE", where="generate", found="", wanted="--interval with --years, or --times")
    if precision not in ("fp32", "bf16"):
        raise ConfigError("E_USAGE", where="--precision", found=precision, wanted="fp32 or bf16")
    workspace, config = here()
    asked = Asked(interval=interval, years=years, times=parse_times(times) if times else None)
    how = How(
        detail="residual" if residual else "decode",
        given=given,
        samples=samples,
        seed=seed,
        precision="bf16" if precision == "bf16" else "fp32",
        beyond_horizon=beyond_horizon,
        dicom=dicom,
    )
    keep_freed_memory()
    made = generate_for(workspace, config, patient=patient, asked=asked, version=model, how=how)
    lines = [f"patient {made.pseudonym}, model {made.model}: {len(made.times)} synthetic scans"]
    lines += [f"  {time:g} years  {path}" for time, path in zip(made.times, made.volumes, strict=True)]
    lines += [f"  picture  {made.figure}", f"  moving   {made.animation}", *(f"  {flag}" for flag in made.flags)]
    return Result(made.as_dict(), tuple(lines))
