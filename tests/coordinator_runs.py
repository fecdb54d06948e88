"""A tiny experiment over sites in memory, for tests of the coordinator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fourdvq_server.app import RunOptions, new_run, run_experiment
from fourdvq_server.experiment import Experiment, compose
from fourdvq_server.local_grid import LocalGrid
from fourdvq_server.project import Project
from fourdvq_server.stages.table import STAGES
from fourdvq_server.store import RunStore, open_store
from memory_sites import MemorySite

# Two rounds of two steps: enough for every path, a second or two of CPU. No discriminator: it costs most of the time.
SMALL = (
    "experiment=tiny",
    "tracking=none",
    "gan.loss=none",
    "federation.local_steps=2",
    "federation.ode_local_steps=2",
    "federation.wait_sites_s=0.2",
    "model.n_codes=16",
)


def experiment(*overrides: str) -> Experiment:
    return compose([*SMALL, *overrides])


def three_sites() -> dict[str, MemorySite]:
    """Two training hospitals of unlike size and an external one."""
    return {
        "leuven": MemorySite("leuven", scans=6, seed=1),
        "southampton": MemorySite("southampton", scans=4, seed=2),
        "external": MemorySite("external", role="external", scans=4, seed=3),
    }


def stages_until(name: str) -> tuple[Any, ...]:
    """The row of stages up to and including `name`."""
    names = [stage.name for stage in STAGES]
    return STAGES[: names.index(name) + 1]


@contextlib.contextmanager
def grid_of(sites: dict[str, MemorySite]) -> Iterator[LocalGrid]:
    # One at a time: the bits must be the same every time.
    with LocalGrid(sites, one_at_a_time=True) as grid:
        yield grid


def run(
    folder: Path,
    sites: dict[str, MemorySite],
    *overrides: str,
    until: str = "release",
    options: RunOptions | None = None,
    offline: Sequence[str] = (),
) -> tuple[dict[str, Any], RunStore]:
    """Start (or resume, in the same folder) the run `r` and return its summary and store."""
    project = Project(folder)
    new_run(project, experiment(*overrides), name="r")
    options = replace(options or RunOptions(approval_wait_s=0.5), stages=stages_until(until))
    with grid_of(sites) as grid:
        grid.offline.update(offline)
        summary = run_experiment(grid, project, "r", options)
    return summary, open_store(project.runs / "r")
