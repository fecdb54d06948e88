"""Registration backends that other packages offer: their entry points, and the version that is part of a scan's key.

Only what is installed is read; nothing of a plug-in is imported here.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

ENTRY_POINTS = "fourdvq.registration"
OWN_BACKENDS = ("corrfield", "demons", "affine", "none")


def plugged_in() -> dict[str, EntryPoint]:
    """Entry points by the name of the backend."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


@cache
def backend_version(name: str) -> str:
    """Package and version of a plug-in, so that an update makes its scans again; empty for a backend of ours.

    Ours are versioned by the profile's `step_versions`.
    """
    point = None if name in OWN_BACKENDS else plugged_in().get(name)
    return f"{point.dist.name} {point.dist.version}" if point is not None and point.dist is not None else ""
