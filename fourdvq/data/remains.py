"""What a damaged DICOM file still says about where it belongs: the UIDs in its first bytes, if they are whole."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

_PatientStudy = tuple[str, str]
_LOOK_BYTES = 1 << 16  # the UIDs come before the pixels and before what scanners add of their own
_UID = re.compile(rb"(?:UI(?P<short>..)|(?P<long>..)\0\0)(?P<text>[0-9.]{1,64})", re.DOTALL)
_STUDY, _SERIES = b"\x20\x00\x0d\x00", b"\x20\x00\x0e\x00"  # little endian, as nearly all files are


class DamagedFile(NamedTuple):
    """A file that cannot be read; its UIDs are empty where they cannot be made out."""

    path: Path
    study: str
    series: str


def remains_of(path: Path) -> DamagedFile:
    """What is left of a damaged file."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_LOOK_BYTES)
    except OSError:
        head = b""
    return DamagedFile(path, _uid(head, _STUDY), _uid(head, _SERIES))


def damage_by_study(
    unreadable: Iterable[Path], studies: Mapping[_PatientStudy, Collection[Path]]
) -> dict[_PatientStudy, list[DamagedFile]]:
    """The damaged files of each study (patient and UID to its folders), as far as they can be told.

    A file is of the study whose UID it still holds; if it holds none that is known, of all studies in its folder,
    unless that folder is of several patients.
    """
    of_uid: dict[str, list[_PatientStudy]] = {}
    of_folder: dict[Path, list[_PatientStudy]] = {}
    for study, folders in studies.items():
        of_uid.setdefault(study[1] or "none", []).append(study)
        for folder in folders:
            of_folder.setdefault(folder, []).append(study)
    result: dict[_PatientStudy, list[DamagedFile]] = {}
    for file in map(remains_of, unreadable):
        beside = of_folder.get(file.path.parent, [])
        of_one = beside if len({patient for patient, _ in beside}) == 1 else []
        for study in of_uid.get(file.study, of_one):
            result.setdefault(study, []).append(file)
    return result


def _uid(head: bytes, tag: bytes) -> str:
    found = _UID.match(head, head.find(tag) + len(tag)) if tag in head else None
    if found is None:
        return ""
    length = int.from_bytes(found["short"] or found["long"], "little")
    # A value of odd length is filled up with one zero.
    return found["text"].decode() if length - len(found["text"]) in (0, 1) else ""
