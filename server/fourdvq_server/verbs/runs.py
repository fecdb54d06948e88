"""Start, resume, watch and steer runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fourdvq.console import Result, note, table
from fourdvq_server.verbs._project import here
from fourdvq_server.verbs.experiments import Overrides

RunName = Annotated[str, typer.Argument(help="name of the run; the newest if left out")]
_POLL_S = 1.0


def run(overrides: Overrides = None, name: Annotated[str, typer.Option(help="name of the run")] = "") -> Result:
    """Run an experiment over the sites that are approved; opens the door if `serve` does not hold it open."""
    from fourdvq_server.app import new_run
    from fourdvq_server.experiment import compose

    project = here()
    made = new_run(project, compose(overrides or ()), name=name)
    note(f"run {made}; if it stops: fourdvq-server resume {made}")
    return _follow(made)


def resume(run: RunName = "") -> Result:
    """Go on with a run that was paused, stopped or killed; finished rounds are not repeated."""
    from fourdvq_server.app import allow_to_run

    store = allow_to_run(here(), run)
    if store.is_running:
        return Result({"run": store.name, "state": "running"}, (f"{store.name} goes on in its own process",))
    return _follow(store.name)


def status(run: RunName = "") -> Result:
    """One look at a run: stage, round, who is waited for, bytes per site."""
    from fourdvq_server.store import open_store

    store = open_store(here().run_folder(run))
    found = {"run": store.name, "plan": store.plan.hash, **store.status}
    if found.get("state") == "running" and not store.is_running:
        found["state"] = "interrupted"
    return Result(found, tuple(status_lines(found)))


def watch(run: RunName = "") -> Result:
    """Print what happens in a run until it ends; Ctrl-C leaves the run alone."""
    from fourdvq_server.store import open_store, read_lines

    store = open_store(here().run_folder(run))
    shown = 0
    while True:
        events = read_lines(store.folder / "events.jsonl")
        for event in events[shown:]:
            note(_event_line(event))
        shown = len(events)
        if not store.is_running:
            return status(store.name)
        time.sleep(_POLL_S)


def logs(run: RunName = "", last: Annotated[int, typer.Option(help="how many lines; 0 for all")] = 50) -> Result:
    """What was noted during a run, oldest first."""
    from fourdvq_server.store import open_store, read_lines

    store = open_store(here().run_folder(run))
    events = read_lines(store.folder / "events.jsonl")[-last if last else None :]
    return Result({"run": store.name, "events": events}, tuple(map(_event_line, events)))


def pause(run: RunName = "", off: Annotated[bool, typer.Option("--off", help="go on")] = False) -> Result:
    """Hold a run after the exchange that is under way; `--off` or `resume` goes on."""
    return _steer(run, pause=not off)


def stop(run: RunName = "") -> Result:
    """End a run after the exchange that is under way; `resume` goes on where it stopped."""
    return _steer(run, stop=True)


def status_lines(found: dict[str, Any]) -> list[str]:
    """The status as a person reads it."""
    rounds = f" of {found['rounds']}" if found.get("rounds") else ""
    lines = [f"run {found['run']}  {found.get('state', 'not started')}"]
    if found.get("stage"):
        lines.append(f"stage {found['stage']}  {found.get('exchange', '')}{rounds}")
    if found.get("waiting_for"):
        lines.append("waiting for " + ", ".join(found["waiting_for"]))
    if found.get("code"):
        lines.append(f"{found['code']}  {found.get('text', '')}")
    down, up = found.get("bytes_down", {}), found.get("bytes_up", {})
    rows = [
        (name, site["role"], "yes" if site["ready"] else "no", down.get(name, 0), up.get(name, 0))
        for name, site in sorted(found.get("sites", {}).items())
    ]
    outside = {name: code for name, code in found.get("refused", {}).items() if name not in found.get("sites", {})}
    rows += [(name, "-", code, 0, 0) for name, code in sorted(outside.items())]
    if rows:
        lines += ["", table(["site", "role", "approved", "bytes down", "bytes up"], rows)]
    return lines


def _steer(run: str, **changes: bool) -> Result:
    from dataclasses import replace

    from fourdvq_server.store import open_store

    store = open_store(here().run_folder(run))
    store.set_control(replace(store.control, **changes))
    asked = vars(store.control)
    return Result({"run": store.name, **asked}, (f"{store.name}: " + json.dumps(asked),))


def _follow(run: str) -> Result:
    from fourdvq_server.network_run import run_over_network

    project = here()
    summary = run_over_network(project, run, notify=note)
    release = summary["stages"].get("release", {})
    lines = [f"run {run} is done", f"released model  {release.get('folder', '-')}"]
    lines.append(f"pages           fourdvq-server ui --workdir {_shown(project.root)}")
    return Result(summary, tuple(lines))


def _shown(folder: Path) -> str:
    return str(folder) if folder != Path() else "."


def _event_line(event: dict[str, Any]) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(event.get("at", 0))))
    return f"{at}  {event.get('text', '')}"
