"""Largest resident memory of this process alone, as the Linux kernel counts it.

`getrusage` will not do: its maximum outlives exec, so a child starts with the peak of the process that started it.
"""

from __future__ import annotations

from pathlib import Path


def peak_bytes() -> int:
    """Largest resident memory in bytes since the program started, or since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def forget_peak() -> None:
    """Count the peak anew, from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
