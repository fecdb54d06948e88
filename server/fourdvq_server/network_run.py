"""Run an experiment over the network: hand the run to the SuperLink, follow it, and read what it left in its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from fourdvq.errors import CODES, FourdvqError, TemporaryStop
from fourdvq_server.control import Control, RunState
from fourdvq_server.coordinator import find_door, open_door
from fourdvq_server.fab import build_bundle
from fourdvq_server.membership import certificate_files
from fourdvq_server.project import Project
from fourdvq_server.settings import load_settings
from fourdvq_server.stages.table import STAGES
from fourdvq_server.store import RunStore, open_store

_LONG = ("sites", "groups", "tables")


def run_over_network(project: Project, run: str, *, notify: Callable[[str], None]) -> dict[str, Any]:
    """Run or resume the run folder `run` over the sites that connect; returns the summary of the finished run.

    Uses the door that `serve` holds open, or opens it for the length of the run. Raises what stopped the experiment:
    TemporaryStop where the same command resumes, else FourdvqError.
    """
    with _control(project, notify) as control:
        return follow(project, run, control, notify)


def follow(project: Project, run: str, control: Control, notify: Callable[[str], None]) -> dict[str, Any]:
    """Start the run through `control` and wait for its end; leaving early (Ctrl-C) stops it."""
    run_id = control.start_run(build_bundle(), {"project": str(project.root.resolve()), "run": run})
    try:
        for line in control.logs(run_id):
            if _is_ours(line):
                notify(line)
        state = control.wait(run_id)
    except BaseException:
        with contextlib.suppress(FourdvqError):
            control.stop_run(run_id)
        raise
    store = open_store(project.run_folder(run))
    if not state.is_completed:
        raise _error_of(store, state)
    return summary_of(store)


def summary_of(store: RunStore) -> dict[str, Any]:
    """Stages, their short results and the traffic of a run, from its folder; long tables stay in it."""
    results = {stage.name: store.stage(stage.name).result for stage in STAGES}
    status = store.status
    return {
        "run": store.name,
        "plan": store.plan.hash,
        "stages": {
            name: {key: value for key, value in result.items() if key not in _LONG}
            for name, result in results.items()
            if result is not None
        },
        "bytes_down": dict(sorted(status.get("bytes_down", {}).items())),
        "bytes_up": dict(sorted(status.get("bytes_up", {}).items())),
    }


@contextlib.contextmanager
def _control(project: Project, notify: Callable[[str], None]) -> Iterator[Control]:
    door = find_door(project.root)
    if door is not None:
        with Control(door.private_address, certificate_files(project.root).ca) as control:
            yield control
        return
    with open_door(project.root, load_settings(project.server_yaml), notify) as running:
        yield running.control


def _is_ours(line: str) -> bool:
    """Flower's own lines about its processes say nothing about the experiment."""
    return bool(line.strip()) and not line.startswith(("\x1b[", "Successfully installed fourdvq-run"))


def _error_of(store: RunStore, state: RunState) -> FourdvqError:
    """What the experiment itself wrote down before it ended, or what Flower knows."""
    status = store.status
    code = str(status.get("code", ""))
    if state.outcome == "stopped":
        return TemporaryStop("E_INTERRUPTED", where=store.name, found="the run was stopped", fix=_resume(store))
    if status.get("state") == "stopped" and code in CODES:
        return TemporaryStop(code, where=store.name, found=str(status.get("text", "")), fix=_resume(store))
    if status.get("state") == "failed" and code in CODES:
        return FourdvqError(code, where=store.name, found=state.details, fix=_resume(store))
    return FourdvqError("E_INTERNAL", where=store.name, found=state.details or state.outcome, fix=_resume(store))


def _resume(store: RunStore) -> str:
    return f"fourdvq-server resume {store.name}"
