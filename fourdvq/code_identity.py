"""Which code is installed: one sha256 per package, so that a site can allow exactly the code a person looked at."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from fourdvq.errors import Refused


def package_sha256(package: str) -> str:
    """sha256 over the sorted lines `relative/path<TAB>sha256(file)` of the .py and .yaml files, as on disk now.

    About 10 ms a package. Raises Refused CODE_MISMATCH if it is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise Refused("CODE_MISMATCH", where=package, found="not installed")
    return folder_sha256(Path(spec.origin).parent)


def folder_sha256(folder: Path) -> str:
    """The same over any folder."""
    lines = sorted(
        f"{path.relative_to(folder).as_posix()}\t{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in folder.rglob("*")
        if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
