"""The coordinator's doctor: one finding per question, with what to do about it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fourdvq.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from fourdvq_server.project import Project

State = Literal["PASS", "WARN", "FAIL"]
MIN_FREE_GB = 5.0  # a run of 100 rounds of a 22 MB model, and room to work
_PINNED = {"flwr": "1.41."}
_FLOORS = {"mlflow": (3, 17), "torch": (2, 10)}


@dataclass(frozen=True)
class Check:
    """One answer. `code` is explained by `fourdvq-server explain`; `exit` counts if the state is FAIL."""

    name: str
    state: State
    found: str
    fix: str = ""
    code: str = ""
    exit: int = EXIT_FAILED


def run_checks(root: Path) -> list[Check]:
    """All checks that can be made without a running door; those of the network only in a project folder."""
    project = Project(root)
    checks: list[Callable[[Project], Check]] = [_python, _packages, _telemetry, _folder, _disk, _mlflow]
    return [check(project) for check in checks]


def exit_code(findings: Sequence[Check]) -> int:
    """0, or the exit of the first failure; warnings alone are 0."""
    return next((finding.exit for finding in findings if finding.state == "FAIL"), EXIT_OK)


def _python(_project: Project) -> Check:
    return Check("python", "PASS", sys.version.split()[0])


def _packages(_project: Project) -> Check:
    from importlib.metadata import PackageNotFoundError, version

    found, wrong = [], []
    for name in (*_PINNED, *_FLOORS):
        try:
            number = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        found.append(f"{name} {number}")
        parts = tuple(int(part) for part in number.split("+")[0].split(".")[:2] if part.isdigit())
        if not number.startswith(_PINNED.get(name, "")) or parts < _FLOORS.get(name, ()):
            wrong.append(f"{name} {number}")
    if wrong:
        return Check("packages", "FAIL", ", ".join(wrong), "install the pinned versions: make setup", "E_UNSUPPORTED")
    return Check("packages", "PASS", ", ".join(found))


def _telemetry(_project: Project) -> Check:
    wanted = {"FLWR_TELEMETRY_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    on = [name for name, value in wanted.items() if os.environ.get(name) != value]
    if on:
        return Check("telemetry", "WARN", "may be on: " + ", ".join(on), "unset these variables")
    return Check("telemetry", "PASS", "off")


def _folder(project: Project) -> Check:
    if not project.server_yaml.is_file():
        return Check(
            "folder", "FAIL", f"{project.root}: no server.yaml", "fourdvq-server init", "E_NOT_A_PROJECT", EXIT_USAGE
        )
    runs = len(project.run_names())
    return Check("folder", "PASS", f"{runs} runs")


def _disk(project: Project) -> Check:
    free = shutil.disk_usage(project.root if project.root.exists() else Path()).free / 1e9
    if free < MIN_FREE_GB:
        return Check("disk", "WARN", f"{free:.1f} GB free", f"free {MIN_FREE_GB:.0f} GB", "DISK_FULL")
    return Check("disk", "PASS", f"{free:.0f} GB free")


def _mlflow(project: Project) -> Check:
    path = project.mlflow_db
    if not path.is_file():
        return Check("mlflow store", "PASS", "none yet; the first run makes it")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            answer = connection.execute("PRAGMA quick_check").fetchone()[0]
            runs = connection.execute("SELECT COUNT(*) FROM runs").fetchone()[0]
    except sqlite3.DatabaseError as error:
        answer, runs = str(error), 0
    if answer != "ok":
        return Check(
            "mlflow store", "FAIL", str(answer), "move mlflow.db away; runs tell a new one from their outbox", "E_FILE"
        )
    return Check("mlflow store", "PASS", f"{runs} runs")
