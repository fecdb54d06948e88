"""The coordinator's folder that a verb works in: --workdir, or the folder it is called from."""

from __future__ import annotations

from fourdvq.console import options
from fourdvq_server.project import Project, open_project


def here() -> Project:
    """Raises ConfigError E_NOT_A_PROJECT if the folder is not a coordinator's."""
    return open_project(options().workdir)
