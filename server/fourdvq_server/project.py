"""The coordinator's folder: where everything is. See docs/reference/server-cli.md for what each file holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fourdvq.errors import ConfigError


@dataclass(frozen=True)
class Project:
    """Paths of a folder made by `fourdvq-server init`, or of the demo's coordinator folder."""

    root: Path

    @property
    def server_yaml(self) -> Path:
        return self.root / "server.yaml"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def releases(self) -> Path:
        return self.root / "releases"

    @property
    def mlflow_db(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def mlartifacts(self) -> Path:
        return self.root / "mlartifacts"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def run_folder(self, name: str) -> Path:
        """The folder of an existing run; "" means the newest. Raises ConfigError E_RUN with the names there are."""
        names = self.run_names()
        if not name and names:
            return self.runs / names[-1]
        if name not in names:
            raise ConfigError(
                "E_RUN", where=str(self.runs), found=name or "no run", wanted=", ".join(names) or "a run", fix=""
            )
        return self.runs / name

    def run_names(self) -> list[str]:
        """Names of all runs, oldest first."""
        if not self.runs.is_dir():
            return []
        found = [p for p in self.runs.iterdir() if (p / "plan.json").is_file()]
        return [p.name for p in sorted(found, key=lambda p: ((p / "plan.json").stat().st_mtime_ns, p.name))]


def open_project(root: Path) -> Project:
    """The project at `root`. Raises ConfigError E_NOT_A_PROJECT if it holds neither server.yaml nor runs."""
    project = Project(root.expanduser())
    if not project.server_yaml.is_file() and not project.runs.is_dir():
        raise ConfigError("E_NOT_A_PROJECT", where=str(root), found="no server.yaml")
    return project
