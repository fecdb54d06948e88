"""Stage validate: held-out reconstruction and trajectory scores of every site, training sites and external ones apart.

Scores arrive as n, sum and sum of squares per row; means and t intervals over patients are made here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fourdvq.errors import FourdvqError
from fourdvq.evaluation.scalars import bands
from fourdvq.evaluation.summary import RowSums, combine, format_table
from fourdvq.tensors import payload_sha256
from fourdvq.wire.messages import ConformalCounts, ConformalTask, ReconstructionTask, Task, TrajectoryTask
from fourdvq_server.stages.context import StageContext
from fourdvq_server.stages.freeze import frozen_model
from fourdvq_server.stages.ode import trained_ode
from fourdvq_server.summaries import interval_rows, means, plain_sums, row_sums

NAME = "validate"


def run(context: StageContext) -> dict[str, Any]:
    """Scores by site and combined. A site that may not or cannot answer is listed with its code."""
    stage = context.store.stage(NAME)
    facts = score(context, context.members, exchange=NAME)
    context.record(NAME, 1, facts.pop("metrics"))
    stage.forget_replies()
    return facts


def score(context: StageContext, sites: Sequence[str], *, exchange: str) -> dict[str, Any]:
    """Ask `sites` for test scores of the frozen model and the trained ODE."""
    stage = context.store.stage(NAME)
    by_site: dict[str, list[RowSums]] = {site: [] for site in sites}
    failed: dict[str, dict[str, str]] = {}
    for name, task in _tasks(context).items():
        replies = context.ask(stage, f"{exchange}-{name}", task, sites, quorum=0)
        for site, body in replies.bodies().items():
            by_site[site] += row_sums(body)
        for site, code in replies.failed.items():
            failed.setdefault(site, {})[name] = code
    groups = {"all": list(sites)}
    for role in ("train", "external"):
        groups[role] = [site for site in sites if context.sites[site].role == role]
    combined = {group: combine(s for site in names for s in by_site[site]) for group, names in groups.items()}
    metrics = {site: means(sums) for site, sums in by_site.items()} | {"": means(combined["all"])}
    return {
        "sites": {site: {"role": context.sites[site].role, "sums": plain_sums(sums)} for site, sums in by_site.items()},
        "groups": {group: interval_rows(sums) for group, sums in combined.items()},
        "tables": {group: _table(context, sums) for group, sums in combined.items() if sums},
        "bands": _bands(context, sites, exchange, failed),
        "failed": failed,
        "metrics": metrics,
    }


def _bands(
    context: StageContext, sites: Sequence[str], exchange: str, failed: dict[str, dict[str, str]]
) -> list[dict[str, Any]]:
    """Bands around predicted numbers from the sites' calibration patients (split validation), if the plan asks for it.

    A half-width without a bound, for want of patients, is null.
    """
    if not context.plan.evaluation.conformal:
        return []
    ode, (_, tokenizer) = trained_ode(context), frozen_model(context)
    task = ConformalTask(split="validation", model_sha256=payload_sha256(ode), tokenizer_sha256=tokenizer, weights=ode)
    calibrating = [site for site in context.trainers if site in sites]
    replies = context.ask(context.store.stage(NAME), f"{exchange}-conformal", task, calibrating, quorum=0)
    for site, code in replies.failed.items():
        failed.setdefault(site, {})["conformal"] = code
    parts = [body for body in replies.bodies().values() if isinstance(body, ConformalCounts)]
    if not parts:
        return []
    found = bands(sum(parts[1:], parts[0]).counts, context.plan.evaluation)
    return [asdict(b) | {"half_width": b.half_width if math.isfinite(b.half_width) else None} for b in found]


def _tasks(context: StageContext) -> dict[str, Task]:
    model, tokenizer = frozen_model(context)
    ode = trained_ode(context)
    tasks: dict[str, Task] = {
        "reconstruction": ReconstructionTask(
            split="test", model_sha256=model.sha256, weights=model.generator, **model.codebook_fields()
        )
    }
    for mode in context.plan.evaluation.modes:
        tasks[mode] = TrajectoryTask(
            split="test", mode=mode, model_sha256=payload_sha256(ode), tokenizer_sha256=tokenizer, weights=ode
        )
    return tasks


def _table(context: StageContext, sums: Sequence[RowSums]) -> str:
    """The printed table per mode, or why there is none: without its control rows a figure is not printed."""
    parts = []
    for mode in context.plan.evaluation.modes:
        try:
            parts.append(format_table(sums, mode=mode))
        except FourdvqError as error:
            parts.append(f"{mode}: no table: {error.found}")
    return "\n\n".join(parts)
