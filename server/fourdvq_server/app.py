"""Run or resume an experiment over a grid: the same function in process (demo, tests) and in Flower's ServerApp.

A run is a folder. Running it again goes on where it stopped: finished stages are read, a stage that was under way goes
on after its last complete round, and replies that had arrived are not asked for twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fourdvq import __version__
from fourdvq.code_identity import package_sha256
from fourdvq.config import to_plain
from fourdvq.errors import TemporaryStop
from fourdvq.wire.messages import PROTOCOL, Role
from fourdvq_server.experiment import Experiment, TrackingSpec, flatten
from fourdvq_server.project import Project
from fourdvq_server.revalidate import answer, take_question
from fourdvq_server.rounds import Federation
from fourdvq_server.stages.context import Progress, StageContext
from fourdvq_server.stages.table import STAGES, Stage
from fourdvq_server.store import Control, RunStore, create_store, open_store
from fourdvq_server.tracking import MlflowStore, Tracker

app = ServerApp()

_LONGEST_RUN_NAME = 48


@dataclass(frozen=True)
class RunOptions:
    """What is around a run and not part of it. The defaults are those of a real federation.

    `roles` is the register (site to role); None welcomes every site of the grid. `on_unapproved` is called with the
    sites whose people have not approved yet; `approval_wait_s` bounds that wait.
    """

    roles: Mapping[str, Role] | None = None
    on_unapproved: Callable[[Sequence[str]], None] | None = None
    approval_wait_s: float | None = None
    notify: Callable[[str], None] | None = None
    progress: Progress | None = None
    stages: tuple[Stage, ...] = STAGES
    tracking: TrackingSpec | None = None  # None: what the run folder says


def new_run(project: Project, experiment: Experiment, *, name: str = "") -> str:
    """Make the run folder of an experiment; returns the run's name. ConfigError E_EXISTS if the name is taken."""
    name = name or _free_name(project, experiment.plan.name)
    facts = {
        "overrides": list(experiment.overrides),
        "tracking": to_plain(experiment.tracking),
        "version": __version__,
        "code": package_sha256("fourdvq"),
        "protocol": PROTOCOL,
    }
    create_store(project.runs / name, experiment.plan, experiment.profile_plain, facts)
    return name


def run_experiment(grid: Grid, project: Project, run: str, options: RunOptions | None = None) -> dict[str, Any]:
    """Run or resume `run` over `grid` and return its summary.

    Raises TemporaryStop where the same command resumes (quorum, approval, stop, another process), ConfigError for a
    combination that cannot work, ModelError for a damaged checkpoint that cannot be made again. If `validate` left a
    question in the run folder, that is asked instead and its answer returned.
    """
    options = options or RunOptions()
    store = open_store(project.run_folder(run))
    with store.locked():
        tracker = make_tracker(project, store, options.tracking).start()
        tell = _teller(store, options.notify)
        context = _context(grid, project, store, tracker, tell, options)
        try:
            question = take_question(store)
            if question is not None:
                return answer(context, question)
            summary = _run_stages(context, options.stages)
        except TemporaryStop as stop:
            _end(store, tracker, "stopped", "KILLED", {"code": stop.code, "text": str(stop)})
            raise
        except BaseException as error:
            _end(store, tracker, "failed", "FAILED", {"code": getattr(error, "code", "INTERNAL")})
            raise
        tracker.artifact(store.folder / "plan.json")
        summary["mlflow_waiting"] = _end(store, tracker, "done", "FINISHED", {})
        return summary


def allow_to_run(project: Project, run: str) -> RunStore:
    """Take back an earlier pause or stop; returns the run's store. Raises ConfigError E_RUN if there is no such run."""
    store = open_store(project.run_folder(run))
    store.set_control(Control())
    return store


def make_tracker(project: Project, store: RunStore, spec: TrackingSpec | None = None) -> Tracker:
    """The run's line to MLflow, with the parent run announced."""
    stored = store.facts.get("tracking", {})
    spec = spec or TrackingSpec(**stored)
    mlflow = MlflowStore(project.mlflow_db, project.mlartifacts, spec.experiment) if spec.store == "sqlite" else None
    tracker = Tracker(store.folder, store.name, mlflow)
    params = flatten(to_plain(store.plan), "plan") | {"plan_sha256": store.plan.hash}
    tags = {name: str(store.facts.get(name, "")) for name in ("version", "code", "protocol")}
    tracker.begin(params, tags)
    return tracker


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's way in: `project` and `run` come with the Flower run, everything else lies in the run folder."""
    config = context.run_config
    project = Project(Path(str(config["project"])))
    roles = registered_roles(project)
    run_experiment(grid, project, str(config["run"]), RunOptions(roles=roles, notify=_print))


def registered_roles(project: Project) -> dict[str, Role]:
    """Site to role of every approved member of the federation."""
    from fourdvq_server.membership import approved_roles

    return approved_roles(project.root)


def _context(
    grid: Grid,
    project: Project,
    store: RunStore,
    tracker: Tracker,
    tell: Callable[[str], None],
    options: RunOptions,
) -> StageContext:
    federation = Federation(grid, store, code_sha256=package_sha256("fourdvq"), notify=tell)
    # Bytes are counted over the whole run, not since the last start.
    for total, key in ((federation.bytes_down, "bytes_down"), (federation.bytes_up, "bytes_up")):
        total.update(store.status.get(key, {}))
    return StageContext(
        plan=store.plan,
        store=store,
        federation=federation,
        metrics=tracker,
        notify=tell,
        progress=options.progress or _no_progress,
        releases=project.releases,
        roles=options.roles,
        on_unapproved=options.on_unapproved,
        approval_wait_s=options.approval_wait_s,
    )


def _run_stages(context: StageContext, stages: Sequence[Stage]) -> dict[str, Any]:
    summary: dict[str, Any] = {"run": context.store.name, "plan": context.plan.hash, "stages": {}}
    for number, stage in enumerate(stages, start=1):
        part = context.store.stage(stage.name)
        started = time.monotonic()
        reused = part.is_done and not stage.always
        context.progress("stages", number - 1, len(stages), stage.name)
        if reused:
            facts = part.result or {}
        else:
            facts = stage.run(context)
            part.finish(facts)
        summary["stages"][stage.name] = {
            "seconds": round(time.monotonic() - started, 3),
            "resumed": reused,
            **_short(facts),
        }
    context.progress("stages", len(stages), len(stages), "")
    summary["bytes_down"] = dict(sorted(context.federation.bytes_down.items()))
    summary["bytes_up"] = dict(sorted(context.federation.bytes_up.items()))
    return summary


def _short(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without the long tables, which lie in the stage's result.json."""
    return {name: value for name, value in facts.items() if name not in ("sites", "groups", "tables")}


def _end(store: RunStore, tracker: Tracker, state: str, mlflow_status: str, facts: Mapping[str, Any]) -> int:
    store.set_status({**store.status, "state": state, "waiting_for": [], **facts})
    tracker.end(mlflow_status, {})
    return tracker.close()


def _teller(store: RunStore, notify: Callable[[str], None] | None) -> Callable[[str], None]:
    def tell(text: str) -> None:
        store.add_event({"at": round(time.time(), 3), "text": text})
        if notify:
            notify(text)

    return tell


def _free_name(project: Project, base: str) -> str:
    """`<plan name>-<n>`, the first n that is free; letters, digits and dashes as run names must have."""
    stem = "".join(c if c.isalnum() else "-" for c in base.lower()).strip("-") or "run"
    stem = stem[: _LONGEST_RUN_NAME - 5]
    taken = {p.name for p in project.runs.glob(f"{stem}-*")} if project.runs.is_dir() else set()
    number = 1
    while f"{stem}-{number}" in taken:
        number += 1
    return f"{stem}-{number}"


def _print(text: str) -> None:
    # Flower streams what a ServerApp prints to whoever started the run.
    print(text, flush=True)


def _no_progress(stage: str, done: int, total: int, text: str) -> None:
    del stage, done, total, text
