"""Which slices of one series can form one volume: equal in geometry and kernel, of one scan.

A slice whose pixels are stored in another way than all others' is set apart too: its header may be damaged, and what it
says about its pixels cannot be checked. Where many slices have each way, every one is decoded with its own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fourdvq.data.dicom_file import SliceHeader

FRAGMENT_SLICES = 2  # so few slices that they may be the damaged ones of another series
ORIENTATION_TOLERANCE = 1e-4
SAME_PLACE_MM = 1e-3
END_TO_END_MM = 0.1
MAX_ACQUISITIONS = 100  # comparing all with all takes long; more of them that overlap are no scan of a chest


def parts_of(members: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    """The slices of a series, all with their geometry, by the volume they belong to."""
    return [scan for alike in _alike(members) for scan in _scans_of(alike)]


def by_person_and_day(members: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    """Slices under one series UID by PatientID and StudyDate: a UID that was blanked or replaced is that of many.

    A few odd ones stay with the others, and have their series refused: a damaged header may not take its slice away.
    """
    owners = Counter((s.patient_id, s.study_date) for s in members)
    several = [owner for owner, count in owners.most_common() if count > FRAGMENT_SLICES]
    if len(several) < 2:
        return [list(members)]
    groups: dict[tuple[str, str], list[SliceHeader]] = {owner: [] for owner in several}
    for s in members:
        groups.get((s.patient_id, s.study_date), groups[several[0]]).append(s)
    return list(groups.values())


def part_key(s: SliceHeader) -> tuple[Any, ...]:
    """What is equal in all slices of a part, besides their direction and, if it says anything, frame of reference."""
    return s.rows, s.columns, s.pixel_spacing, s.kernel, s.pixels.samples, s.pixels.photometric


def has_common_frame(members: Sequence[SliceHeader]) -> bool:
    """Whether the FrameOfReferenceUID says anything: some anonymisers make a new one for every file."""
    return len({s.frame_of_reference for s in members}) <= 0.9 * len(members)


def direction_of(s: SliceHeader) -> np.ndarray:
    """The unit normal of a slice; zeros if row and column direction coincide."""
    orientation = np.array(s.orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    length = float(np.linalg.norm(normal))
    return np.asarray(normal / length if length > 0.5 else np.zeros(3))


def places_of(slices: Sequence[SliceHeader]) -> np.ndarray:
    """Positions in mm along the normal of the first slice, in the order of the slices."""
    return np.asarray(np.array([s.position for s in slices]) @ direction_of(slices[0]))


def _alike(members: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    """By geometry and kernel."""
    layouts = Counter(s.pixels.layout for s in members)
    rare = {layout for layout, count in layouts.items() if count <= FRAGMENT_SLICES < len(members)}
    with_frame = has_common_frame(members)
    groups: dict[tuple[Any, ...], list[list[SliceHeader]]] = {}
    for s in members:
        layout = s.pixels.layout if rare and s.pixels.layout in rare else ()
        frame = s.frame_of_reference if with_frame else ""
        same_kind = groups.setdefault((*part_key(s), frame, layout), [])
        for group in same_kind:
            if _same_direction(group[0], s):
                group.append(s)
                break
        else:
            same_kind.append([s])
    return [group for alike in groups.values() for group in alike]


def _scans_of(alike: list[SliceHeader]) -> list[list[SliceHeader]]:
    """By scan: acquisitions that lie end to end are one, those that overlap are several, such as two breath holds.

    Some scanners number every table position, or every few slices, as an acquisition of its own.
    """
    acquisitions: dict[str, list[SliceHeader]] = {}
    for s in alike:
        acquisitions.setdefault(s.acquisition, []).append(s)
    if len(acquisitions) == 1 or max(map(len, acquisitions.values())) <= FRAGMENT_SLICES:
        return [alike]
    in_order = [acquisitions[number] for number in sorted(acquisitions, key=lambda n: (len(n), n))]
    if _lie_end_to_end(in_order):
        return [alike]
    if len(in_order) > MAX_ACQUISITIONS:
        return in_order
    scans: list[list[list[SliceHeader]]] = []
    for acquisition in in_order:
        for scan in scans:
            if _lie_end_to_end([*scan, acquisition]):
                scan.append(acquisition)
                break
        else:
            scans.append([acquisition])
    return [[s for acquisition in scan for s in acquisition] for scan in scans]


def _lie_end_to_end(acquisitions: Sequence[Sequence[SliceHeader]]) -> bool:
    """Whether each starts one slice after another ends, or two where one is missing."""
    places = places_of([s for acquisition in acquisitions for s in acquisition])
    ends = np.cumsum([len(acquisition) for acquisition in acquisitions])[:-1]
    spans = sorted((float(p.min()), float(p.max())) for p in np.split(places, ends))
    between = np.array([start - end for (_, end), (start, _) in itertools.pairwise(spans)])
    steps = np.diff(np.sort(places))
    spacing = float(np.median(steps[steps > SAME_PLACE_MM])) if (steps > SAME_PLACE_MM).any() else 0.0
    slices = np.rint(between / max(spacing, SAME_PLACE_MM))
    off = np.abs(between - slices * spacing)
    return bool(((slices == 1) | (slices == 2)).all() and off.max() <= END_TO_END_MM)


def _same_direction(a: SliceHeader, b: SliceHeader) -> bool:
    pairs = zip(a.orientation or (), b.orientation or (), strict=True)
    return a.orientation == b.orientation or all(abs(x - y) <= ORIENTATION_TOLERANCE for x, y in pairs)
