"""Which code is installed: name, version and sha256 of each of our packages that the coordinator uses."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("fourdvq", "fourdvq_server")


@cache
def package_sha256(package: str) -> str:
    """sha256 over the sorted lines `relative/path<TAB>sha256(file)` of the package's .py and .yaml files."""
    spec = find_spec(package)
    folder = Path(str(spec.origin if spec else "")).parent
    lines = sorted(
        f"{path.relative_to(folder).as_posix()}\t{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in folder.rglob("*")
        if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
