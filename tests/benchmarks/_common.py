"""What the benchmark scripts share: one figure, the machine it was measured on, and the JSON object that is printed."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def figure(
    name: str,
    value: float | None,
    unit: str,
    *,
    target: str | float | None = None,
    holds: bool | None = None,
    n: int | None = None,
    spread: Sequence[float] | float | None = None,
    seconds: float | None = None,
    note: str = "",
) -> dict[str, Any]:
    """One row of an issue's table; `value=None`: this machine or mode cannot measure it, and `note` says why.

    `spread` is the pair of quartiles (or one width), `n` how many measurements, `seconds` how long measuring took.
    """
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "target": target,
        "n": n,
        "spread": list(spread) if isinstance(spread, Sequence) else spread,
        "seconds": None if seconds is None else round(seconds, 2),
        "holds": holds,
        "note": note,
    }


def emit(area: str, figures: Sequence[dict[str, Any]], quick: bool, *, out: Path | None = None) -> dict[str, Any]:
    """Print the area's JSON object last on standard output, and write it to `out` if given; returns it."""
    result = {
        "area": area,
        "machine": machine(),
        "mode": "quick" if quick else "full",
        "commit": commit(),
        "figures": list(figures),
    }
    text = json.dumps(result, indent=1, allow_nan=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return result


def cpu_seconds(fn: Callable[[], object], repeat: int = 1) -> list[float]:
    """CPU seconds (user and system, this process and its finished children) of each of `repeat` calls."""
    times = []
    for _ in range(repeat):
        before = os.times()
        fn()
        after = os.times()
        times.append(sum(after[:4]) - sum(before[:4]))
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; all three equal for a single value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def machine() -> str:
    """Processor, cores, memory and versions, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, {sys.platform}"


def commit() -> str:
    """The commit of the working tree, with `+` if tracked files differ from it; `unknown` outside a repository."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def clock() -> float:
    """Wall seconds from an arbitrary zero."""
    return time.perf_counter()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()
