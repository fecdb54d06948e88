"""The wheel holds what git tracks, under the import names, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "fourdvq/": "fourdvq/",
    "client/fourdvq_client/": "fourdvq_client/",
    "server/fourdvq_server/": "fourdvq_server/",
    "configs/": "fourdvq_configs/",
    "site_templates/": "fourdvq_site_templates/",
}


def packed_name(tracked: str) -> str | None:
    for folder, package in FOLDERS.items():
        if tracked.startswith(folder):
            return package + tracked.removeprefix(folder)
    return None


def test_wheel_ships_every_tracked_module_config_and_template(tmp_path):
    source = tmp_path / "src"
    git = ["git", "-C", str(ROOT)]
    subprocess.run([*git, "checkout-index", "-a", f"--prefix={source}/"], check=True)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=180)
    wheel = next(tmp_path.glob("*.whl"))
    shipped = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    tracked = subprocess.run([*git, "ls-files"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert shipped == {name for t in tracked if (name := packed_name(t))}


def test_every_installed_version_is_the_pinned_one():
    """CI installs with constraints.txt: what runs is what was tested."""
    from importlib.metadata import PackageNotFoundError, version

    pins = dict(
        line.strip().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    different = {}
    for name, wanted in pins.items():
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            continue
        if found != wanted:
            different[name] = (found, wanted)
    assert different == {}
    assert pins["flwr"] == "1.41.0"
