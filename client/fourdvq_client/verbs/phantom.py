"""phantom: a synthetic cohort with known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result


def phantom(
    out: Annotated[Path, typer.Option(help="New folder for scans and tables.")],
    patients: Annotated[int, typer.Option(help="How many.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    format: Annotated[str, typer.Option(help="nifti or dicom.")] = "nifti",
    size: Annotated[str, typer.Option(help="Voxels, D,H,W.")] = "96,256,256",
    site: Annotated[
        str, typer.Option(help="Whose scanner: leuven, southampton, external; any other name has one of its own.")
    ] = "leuven",
    scans: Annotated[str, typer.Option(help="Fewest and most scans of a patient.")] = "2,4",
    longitudinal: Annotated[float, typer.Option(help="Share of patients with more than one scan.", min=0, max=1)] = 1.0,
    truth: Annotated[bool, typer.Option("--truth/--no-truth", help="Also write the truth.")] = True,
    workers: Annotated[int, typer.Option(help="Processes side by side.", min=1)] = 1,
) -> Result:
    """Make a synthetic hospital: chest scans whose disease is known, with its two tables. For dry runs and teaching."""
    from fourdvq.data.phantom import make_cohort

    depth, height, width = _numbers(size, 3, "--size")
    fewest, most = _numbers(scans, 2, "--scans")
    with console.progress("patients", patients) as advance:
        cohort = make_cohort(
            out,
            patients=patients,
            seed=seed,
            size=(depth, height, width),
            format=format,  # type: ignore[arg-type]  # the library names the words it knows
            scans_per_patient=(fewest, most),
            site=site,
            longitudinal_share=longitudinal,
            truth=truth,
            progress=lambda _done, _total: advance(1),
            workers=workers,
        )
    count = sum(len(p.visits) for p in cohort.patients)
    facts = {"folder": str(cohort.folder), "patients": len(cohort.patients), "scans": count}
    return Result(facts, (f"{count} scans of {len(cohort.patients)} synthetic patients in {cohort.folder}",))


def _numbers(text: str, count: int, where: str) -> tuple[int, ...]:
    from fourdvq.errors import ConfigError

    parts = text.replace("x", ",").split(",")
    if len(parts) != count or not all(p.strip().isdigit() for p in parts):
        raise ConfigError("E_USAGE", where=where, found=text, wanted=f"{count} whole numbers, as 2,4")
    return tuple(int(p) for p in parts)
