"""Images beside a series that may be slices of it, taken away by a damaged header: the series is then refused.

One is of the same study or series, as far as it says, and lies where a slice is missing. One that does not say where it
lies is of the same series, or says nothing of its size either: its header breaks off. What forms a series of its own (a
reformat, a projection) is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fourdvq.data.dicom_file import CT_CLASSES, SliceHeader
from fourdvq.data.parts import FRAGMENT_SLICES, direction_of, places_of

if TYPE_CHECKING:
    from fourdvq.data.dicom import SeriesCandidate

_LATTICE_TOLERANCE = 0.02  # of the spacing
_SIDEWAYS_MM = 0.5
_Key = tuple[Path, str, str]


def with_strays(candidates: Sequence[SeriesCandidate], aside: Sequence[SliceHeader]) -> list[SeriesCandidate]:
    """Each candidate with its strays among the small candidates and the images `aside` that are no CT slices."""
    loose = _by_place_and_uid(candidates, aside)
    if not loose:
        return list(candidates)
    return [replace(c, strays=_strays_of(c, loose)) if len(c.slices) > FRAGMENT_SLICES else c for c in candidates]


def _by_place_and_uid(
    candidates: Sequence[SeriesCandidate], aside: Sequence[SliceHeader]
) -> dict[_Key, list[SliceHeader]]:
    """What may be a stray, under its folder with its study and with its series; folders may hold many patients."""
    loose: dict[_Key, list[SliceHeader]] = {}
    members = Counter((s.study, s.series) for s in aside)
    small = [s for c in candidates if len(c.slices) <= FRAGMENT_SLICES for s in c.slices]
    images = [s for s in aside if s.rows and s.columns and (s.position is not None or s.sop_class in CT_CLASSES)]
    for s in (*small, *images):
        folder = s.path.parent
        loose.setdefault((folder, "series", s.series), []).append(s)
        breaks_off = s.position is None and not s.rows
        if (s.position is not None or breaks_off) and members[s.study, s.series] <= FRAGMENT_SLICES:
            loose.setdefault((folder, "study", s.study), []).append(s)
    return loose


def _strays_of(candidate: SeriesCandidate, loose: dict[_Key, list[SliceHeader]]) -> tuple[SliceHeader, ...]:
    head = candidate.first
    # An image without one of the UIDs may be of any study.
    uids = (("series", head.series), ("study", head.study), ("series", ""), ("study", ""))
    keys = ((folder, kind, uid) for folder in candidate.folders for kind, uid in uids)
    near = list({(s.path, s.frame): s for key in keys for s in loose.get(key, ())}.values())
    if not near or not candidate.has_geometry:
        return ()
    places = np.sort(places_of(candidate.slices))
    normal = direction_of(head)
    first = np.array(min(candidate.slices, key=lambda s: float(np.array(s.position) @ normal)).position)
    last = np.array(max(candidate.slices, key=lambda s: float(np.array(s.position) @ normal)).position)
    spacing = float(np.median(np.diff(places)))
    line = (last - first) / max(float(places[-1] - places[0]), 1e-6)
    found = []
    for s in near:
        if s.position is None:
            found.append(s)
            continue
        offset = np.array(s.position) - first
        along = float(offset @ normal)
        step = along / max(spacing, 1e-6)
        beside = -1.1 < step < (places[-1] - places[0]) / max(spacing, 1e-6) + 1.1
        free = float(np.abs(places - places[0] - along).min()) > _LATTICE_TOLERANCE * spacing
        in_line = float(np.linalg.norm(offset - along * line)) <= _SIDEWAYS_MM
        if beside and free and in_line and abs(step - round(step)) <= _LATTICE_TOLERANCE * max(1.0, abs(step)):
            found.append(s)
    return tuple(found)
