"""How much memory preparation may take: what the machine, its batch system and its limits leave, and who uses it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from fourdvq.preprocessing.profile import Profile

GIB = 1 << 30
_READING = 1.2 * GIB  # 700 slices of 512 x 512, as read, as float32 and as masks
_WORKING_ML = 24_000.0  # a box around large lungs, with its margin
_BYTES_A_VOXEL = 600.0  # of the working grid: what CorrField holds at its peak
_KEPT_FREE = 0.9  # of what is free: the rest is the system's own


def worker_need(profile: Profile) -> int:
    """Bytes that one worker may need under a profile, at its peak and on a large scan."""
    if profile.registration.backend in ("affine", "none"):
        return int(_READING)
    voxels = _WORKING_ML * 1000.0 / profile.registration.spacing_mm**3
    return int(_READING + voxels * _BYTES_A_VOXEL)


def free_memory() -> int:
    """Bytes that this process and its children may still take: the least of machine, control group and RLIMIT_AS."""
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    limits = [_machine_free(), *_group_free()]
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    return int(_KEPT_FREE * min(limits))


def resident(pid: int) -> int:
    """Bytes of main memory that a process holds now; 0 if it is gone or this system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _machine_free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_free() -> list[int]:
    """What the control groups of this process leave (a container, a Slurm job): version 2 and version 1."""
    found = []
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    for _, kinds, path in groups:
        if kinds == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # A limit may stand at any level above; inside a container the path is the host's, and the root is ours.
        here = root / path.lstrip("/")
        for level in {root, here, *(p for p in here.parents if p.is_relative_to(root))}:
            limit, used = (_number(level / name) for name in names)
            if limit is not None and used is not None and limit < 1 << 60:
                found.append(max(0, limit - used))
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
