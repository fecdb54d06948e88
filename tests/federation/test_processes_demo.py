"""The demo with real processes: the same experiment, over TLS, and nothing left running at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def _processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name the demo's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found


@pytest.mark.slow
def test_the_demo_runs_over_real_processes_and_leaves_none(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from fourdvq_server.cli import main; main()", "demo", "--processes", "--quick"]
    done = subprocess.run([*command, "--json", "--out", str(tmp_path / "demo")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["metrics"]) == {"leuven", "southampton", "external"}
    assert all(result["bytes_up"][site] > 0 for site in result["metrics"])
    assert any(Path(result["paths"]["release"]).iterdir())
    assert _processes_of(tmp_path) == []
    log = (tmp_path / "demo" / "coordinator" / "logs" / "superlink.log").read_text()
    assert "GetFab" not in log
