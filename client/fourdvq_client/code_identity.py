"""What code is installed: a sha256 per package, so that a policy can allow exactly the code that was looked at."""

from __future__ import annotations

from dataclasses import dataclass

from fourdvq.code_identity import package_sha256
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

    return tuple(Installed(name, __version__, package_sha256(name)) for name in PACKAGES)


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
