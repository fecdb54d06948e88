"""The coordinator inside another program of the same machine: what `fourdvq-client dry-run` calls, by name.

Entry point `fourdvq.apps: server`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def run_local(
    folder: Path,
    client_apps: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    until: str = "release",
    on_unapproved: Callable[[Sequence[str]], None] | None = None,
    approval_wait_s: float = 60.0,
    notify: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run an experiment over ClientApps of this process; returns the run's summary.

    `folder` becomes a coordinator folder; `until` names the last stage. Without `on_unapproved` the sites must have
    approved the plan, or E_NO_APPROVAL comes after `approval_wait_s`.
    """
    from fourdvq_server.app import RunOptions, new_run, run_experiment
    from fourdvq_server.experiment import TrackingSpec, compose
    from fourdvq_server.local_grid import LocalGrid
    from fourdvq_server.project import Project
    from fourdvq_server.stages.table import stages_until

    project = Project(folder)
    run = new_run(project, compose(overrides))
    options = RunOptions(
        on_unapproved=on_unapproved,
        approval_wait_s=approval_wait_s,
        notify=notify,
        stages=stages_until(until),
        tracking=TrackingSpec(store="none"),
    )
    with LocalGrid(client_apps) as grid:
        return run_experiment(grid, project, run, options)


def default_profile(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The preprocessing profile of an experiment as plain data, for a site folder that has no invitation."""
    from fourdvq_server.experiment import compose

    return compose(overrides).profile_plain
