"""A tiny experiment over sites in memory, for tests of the coordinator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Message

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


# Sites in memory have no clinical table; what the analysis does is tested with real ones.
NO_SURVIVAL = tuple(stage for stage in STAGES if stage.name not in ("survival", "longitudinal"))


def stages_until(name: str) -> tuple[Any, ...]:
    """The row of stages up to and including `name`, without the survival analysis."""
    names = [stage.name for stage in NO_SURVIVAL]
    return NO_SURVIVAL[: names.index(name) + 1]


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


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


class DyingGrid(LocalGrid):
    """Ends the coordinator from its `n`-th exchange on, as soon as one of several replies has been taken."""

    def __init__(self, apps: Mapping[str, Any], n: int) -> None:
        super().__init__(apps, one_at_a_time=True)
        self.left, self.taken = n, 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.left, self.taken = self.left - 1, 0
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self.left <= 0 and self.taken:
            raise Killed
        got = super().pull_messages(message_ids)
        self.taken += len(got)
        return got
