"""The same scan under two names: equal pixels of two DICOM series, whatever their headers say, or equal image files.

One copy is kept. If the two belong to different patients, one person may be known by two ids, and would else be counted
twice and stand in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fourdvq.data.cohort_rows import DatedScan, Finding, finding
from fourdvq.data.dicom_file import SliceHeader
from fourdvq.data.files import file_sha256
from fourdvq.data.parts import direction_of
from fourdvq.data.pixels import stored_bytes


def without_doubles(scans: Sequence[DatedScan], findings: list[Finding]) -> list[DatedScan]:
    """The scans, of which copies are no longer usable; each is a finding W_DOUBLE_PIXELS, and the first is kept."""
    doubled: dict[int, DatedScan] = {}
    usable = [i for i, scan in enumerate(scans) if scan.usable]
    for alike in _groups(usable, lambda i: _glance(scans[i])):
        for same in _groups(alike, lambda i: _content(scans[i])):
            doubled |= {i: scans[same[0]] for i in same[1:]}
    for i, first in doubled.items():
        row = scans[i].row
        found = f"the pixels of scan {first.row.scan_id!r} of patient {first.row.patient_id!r}"
        findings.append(finding("W_DOUBLE_PIXELS", scans[i].where, found, patient=row.patient_id, scan=row.scan_id))
    return [replace(scan, usable=False) if i in doubled else scan for i, scan in enumerate(scans)]


def _groups(items: Sequence[int], key: Callable[[int], object]) -> list[list[int]]:
    """Items with equal keys, two or more of them; a None key stands alone."""
    groups: dict[object, list[int]] = {}
    for item in items:
        if (value := key(item)) is not None:
            groups.setdefault(value, []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def _glance(scan: DatedScan) -> object:
    """What two copies share and most other scans do not, without reading much."""
    if scan.series is None:
        return _of_file(scan.row.path, lambda p: p.stat().st_size or None)
    ordered = _ordered(scan)
    head = ordered[0]
    some = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    return _of_file(head.path, lambda _: ("series", len(ordered), head.rows, head.columns, _digest(some)))


def _content(scan: DatedScan) -> object:
    if scan.series is None:
        return _of_file(scan.row.path, file_sha256)
    ordered = _ordered(scan)
    return _of_file(ordered[0].path, lambda _: _digest(ordered))


def _of_file(path: Path, look: Callable[[Path], object]) -> object:
    """None for a file that cannot be read: preparation will say so."""
    try:
        return look(path)
    except OSError:
        return None


def _ordered(scan: DatedScan) -> list[SliceHeader]:
    if scan.series is None:
        return []
    slices = list(scan.series.slices)
    if not scan.series.has_geometry:
        return sorted(slices, key=lambda s: s.path)
    nx, ny, nz = direction_of(slices[0]).tolist()
    # By place and not by name: a copy has other file names.
    places = [round(x * nx + y * ny + z * nz, 3) for x, y, z in (s.position or () for s in slices)]
    return [slices[i] for i in sorted(range(len(slices)), key=places.__getitem__)]


def _digest(slices: Sequence[SliceHeader]) -> str:
    digest = hashlib.sha256()
    for s in slices:
        digest.update(stored_bytes(s))
    return digest.hexdigest()
