"""What every stage gets: the plan, the run folder, the sites that take part, and ways to tell people and MLflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fourdvq.plan import Plan
from fourdvq.wire.messages import Role, Task
from fourdvq_server.journal import Journal
from fourdvq_server.rounds import Federation, Replies
from fourdvq_server.store import RunStore, StageStore

Progress = Callable[[str, int, int, str], None]  # stage, done, total, text


class MetricsSink(Protocol):
    """Where metrics and files go beside the run folder."""

    def site(self, site: str, role: str) -> None: ...

    def log_metrics(self, stage: str, number: int, site: str, values: Mapping[str, float]) -> None: ...

    def artifact(self, path: Path, folder: str = "") -> None: ...


@dataclass(frozen=True)
class SiteInfo:
    """What a site said of itself when it was admitted; counts are rounded by the site's policy and fixed from then."""

    role: Role
    ode: bool
    patients: int
    scans: int
    train_scans: int
    version: str
    device: str
    profile: str


@dataclass
class StageContext:
    """`sites` are those admitted, `ready` those that approved the plan; both are filled by the first two stages.

    `roles` is the coordinator's register (site to role), None where every site of the grid is welcome. `on_unapproved`
    gets the names of sites whose people have not approved the plan yet.
    """

    plan: Plan
    store: RunStore
    federation: Federation
    metrics: MetricsSink
    notify: Callable[[str], None]
    progress: Progress
    releases: Path
    roles: Mapping[str, Role] | None = None
    on_unapproved: Callable[[Sequence[str]], None] | None = None
    approval_wait_s: float | None = None
    sites: dict[str, SiteInfo] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)  # site to code: why it is not in

    @property
    def members(self) -> list[str]:
        """Admitted sites that approved the plan, by name."""
        return sorted(self.ready & set(self.sites))

    @property
    def trainers(self) -> list[str]:
        return [site for site in self.members if self.sites[site].role == "train"]

    def ask(
        self, stage: StageStore, exchange: str, task: Task, sites: Sequence[str], *, quorum: int, total: int = 0
    ) -> Replies:
        """One journaled exchange of a stage; every asked site gets the same task."""
        self.show(stage.folder.name, exchange, total, waiting=sites)
        journal = Journal(stage.exchange_folder(exchange))
        return self.federation.ask(dict.fromkeys(sites, task), journal=journal, quorum=quorum)

    def show(self, stage: str, exchange: str, total: int, *, waiting: Sequence[str] = ()) -> None:
        """Write what `status` and `watch` show."""
        self.store.set_status(
            {
                "run": self.store.name,
                "state": "running",
                "stage": stage,
                "exchange": exchange,
                "rounds": total,
                "waiting_for": list(waiting),
                "sites": {name: {"role": info.role, "ready": name in self.ready} for name, info in self.sites.items()},
                "refused": dict(self.refused),
                "bytes_down": dict(self.federation.bytes_down),
                "bytes_up": dict(self.federation.bytes_up),
            }
        )

    def record(self, stage: str, number: int, by_site: Mapping[str, Mapping[str, float]]) -> None:
        """Metrics of one round: "" is the federation as a whole. What is already recorded is left alone."""
        for site, values in by_site.items():
            self.store.metrics.append(stage, number, site, values)
            self.metrics.log_metrics(stage, number, site, values)
