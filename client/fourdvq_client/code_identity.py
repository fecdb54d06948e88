"""What code is installed: a sha256 per package, so that a policy can allow exactly the code that was looked at."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fourdvq.errors import Refused
from fourdvq_client.policy import SitePolicy

PACKAGES = ("fourdvq", "fourdvq_client")


@dataclass(frozen=True)
class Installed:
    """One installed package of ours."""

    package: str
    version: str
    sha256: str


def installed_code() -> tuple[Installed, ...]:
    """The packages as they lie on disk now; about 10 ms, so it is affordable before each task."""
    from fourdvq import __version__

    return tuple(Installed(name, __version__, package_sha256(_folder(name))) for name in PACKAGES)


def package_sha256(folder: Path) -> str:
    """sha256 over the sorted lines `relative/path<TAB>sha256(file)` of all .py and .yaml files below `folder`."""
    lines = sorted(
        f"{path.relative_to(folder).as_posix()}\t{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in folder.rglob("*")
        if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_code(policy: SitePolicy, installed: tuple[Installed, ...]) -> None:
    """Raise Refused CODE_MISMATCH unless every package is one that the policy lists, or it says `allowed_code: any`."""
    if policy.allowed_code == "any":
        return
    allowed = {(c.package, c.version, c.sha256) for c in policy.allowed_code}
    for one in installed:
        if (one.package, one.version, one.sha256) not in allowed:
            raise Refused(
                "CODE_MISMATCH",
                where=f"policy.yaml: allowed_code, {one.package}",
                found=f"{one.version} {one.sha256}",
                wanted="an entry with this version and sha256",
            )


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise Refused("CODE_MISMATCH", where=package, found="not installed")
    return Path(spec.origin).parent
