"""Which slices of one series can form one volume: equal in geometry and kernel, of one scan.

A slice whose pixels are stored in another way than all others' is set apart too: its header may be damaged, and what it
says about its pixels cannot be checked. Where many slices have each way, every one is decoded with its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fourdvq.data.dicom_file import SliceHeader

FRAGMENT_SLICES = 2  # so few slices that they may be the damaged ones of another series
ORIENTATION_TOLERANCE = 1e-4


def parts_of(members: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    """The slices of a series, all with their geometry, by the volume they belong to."""
    parts = _parts(members, by_acquisition=True)
    if len(parts) > 1 and max(map(len, parts)) <= FRAGMENT_SLICES:
        # Some scanners number every table position of one scan as an acquisition of its own.
        parts = _parts(members, by_acquisition=False)
    return parts


def part_key(s: SliceHeader) -> tuple[Any, ...]:
    """What is equal in all slices of a part, besides their direction."""
    return s.frame_of_reference, s.rows, s.columns, s.pixel_spacing, s.kernel, s.pixels.samples, s.pixels.photometric


def direction_of(s: SliceHeader) -> np.ndarray:
    """The unit normal of a slice; zeros if row and column direction coincide."""
    orientation = np.array(s.orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    length = float(np.linalg.norm(normal))
    return np.asarray(normal / length if length > 0.5 else np.zeros(3))


def _parts(members: Sequence[SliceHeader], *, by_acquisition: bool) -> list[list[SliceHeader]]:
    layouts = Counter(s.pixels.layout for s in members)
    rare = {layout for layout, count in layouts.items() if count <= FRAGMENT_SLICES < len(members)}
    groups: dict[tuple[Any, ...], list[list[SliceHeader]]] = {}
    for s in members:
        layout = s.pixels.layout if rare and s.pixels.layout in rare else ()
        key = (*part_key(s), layout, s.acquisition if by_acquisition else "")
        for group in groups.setdefault(key, []):
            if _same_direction(group[0], s):
                group.append(s)
                break
        else:
            groups[key].append([s])
    return [group for alike in groups.values() for group in alike]


def _same_direction(a: SliceHeader, b: SliceHeader) -> bool:
    pairs = zip(a.orientation or (), b.orientation or (), strict=True)
    return a.orientation == b.orientation or all(abs(x - y) <= ORIENTATION_TOLERANCE for x, y in pairs)
