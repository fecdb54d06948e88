"""MLflow's page over the local store, with settings that suit one person on one machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from fourdvq.console import Result, note
from fourdvq.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, ConfigError
from fourdvq_server.loopback import bind
from fourdvq_server.project import Project
from fourdvq_server.verbs._project import here

# As it comes, the server starts 15 processes and needs a minute; job execution is what most of them are for.
LIGHT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def ui(
    port: Annotated[int, typer.Option(help="on the loopback address")] = 5000,
    print_only: Annotated[bool, typer.Option("--print-only", help="show the command instead of running it")] = False,
) -> Result:
    """Open the experiment's figures: MLflow on this machine's loopback address. Ctrl-C ends it."""
    project = here()
    if not project.mlflow_db.is_file():
        raise ConfigError(
            "E_FILE", where=str(project.mlflow_db), found="no MLflow store", fix="run an experiment first"
        )
    command = mlflow_command(project, port)
    shown = " ".join([*(f"{name}={value}" for name, value in LIGHT.items()), shlex.join(command)])
    address = f"http://127.0.0.1:{port}"
    if print_only:
        return Result({"command": shown, "address": address}, (shown,))
    bind("127.0.0.1", port).close()  # E_PORT now, instead of another program's traceback in ten seconds
    note(f"{address} in some ten seconds; Ctrl-C ends it")
    try:
        code = subprocess.run(command, env={**os.environ, **LIGHT}, check=False).returncode
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    return Result({"command": shown, "address": address}, (), EXIT_OK if code in (0, EXIT_INTERRUPTED) else EXIT_FAILED)


def mlflow_command(project: Project, port: int) -> list[str]:
    """The server's command line; artifacts are served from where the runs put them."""
    return [
        str(Path(sys.executable).with_name("mlflow")),
        "server",
        "--backend-store-uri",
        f"sqlite:///{project.mlflow_db.resolve()}",
        "--artifacts-destination",
        project.mlartifacts.resolve().as_uri(),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
