"""What DICOM headers said when they were last read, so that a file that has not changed is not opened again.

Reading 210,000 headers takes minutes, looking at the states of as many files seconds. What is remembered holds ids,
dates and UIDs: it is for the owner's eyes alone, as headers themselves are.

The text of a memory is a line with its format, the reader that filled it and the sha256 of the rest; then two lines for
each folder: its path, and the files in it by column. A value that all images of a folder share stands there once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pydicom

from fourdvq.data.dicom_file import PixelPlace, SliceHeader, read_headers
from fourdvq.data.limits import shown
from fourdvq.data.walk import FileState
from fourdvq.errors import VolumeError

FORMAT = "fourdvq headers 1"
_READER = ("dicom_file.py", "enhanced.py", "known_headers.py")  # a change in any of them: headers are read again


class _Outcome(NamedTuple):
    """What reading a file came to: its images without their path, or the code of the error; neither: no DICOM."""

    size: int
    modified_ns: int
    changed_ns: int
    images: Sequence[tuple[Any, ...]]
    code: str


@dataclass
class _Folder:
    """What was known of a folder's files, what is true of those met in this run, and how many of them were read."""

    known: dict[str, _Outcome] = field(default_factory=dict)
    met: dict[str, _Outcome] = field(default_factory=dict)
    read: int = 0

    @property
    def changed(self) -> bool:
        return bool(self.read) or len(self.met) != len(self.known)


class KnownHeaders:
    """Headers by path, size and times of change; `text` is what an earlier one's `as_text` gave.

    A text that is damaged, of another format or filled by another version of the reader counts as empty.
    """

    def __init__(self, text: bytes = b"") -> None:
        self._stored = _folders_in(text)
        self._visited: dict[str, _Folder] = {}

    def headers(self, path: Path, state: FileState) -> tuple[SliceHeader, ...]:
        """As `read_headers` of `path`, from memory if the file is in the state in which it was read.

        An OSError is not remembered: the file may be readable the next time.
        """
        folder = self._visited.get(state.folder) or self._visit(state.folder)
        outcome = folder.met.get(state.name) or folder.known.get(state.name)
        if outcome is None or outcome[:3] != state[2:]:
            outcome = _read(path, state)
            folder.read += 1
        folder.met[state.name] = outcome
        if outcome.code:
            raise VolumeError(outcome.code, where=shown(path))
        return tuple([SliceHeader(path, *image) for image in outcome.images])

    def changed(self, *, all_met: bool) -> bool:
        """Whether `as_text` would give another text than the one at the start."""
        gone = all_met and not self._stored.keys() <= self._visited.keys()
        return gone or any(folder.changed for folder in self._visited.values())

    def as_text(self, *, all_met: bool) -> bytes:
        """What a later run may start from. With `all_met`, files and folders that were not asked for are forgotten."""
        lines = {} if all_met else dict(self._stored)
        for name, folder in self._visited.items():
            outcomes = folder.met if all_met else folder.known | folder.met
            if folder.changed or name not in self._stored:
                lines[name] = _packed(outcomes)
            else:
                lines[name] = self._stored[name]
        body = b"".join(b"%s\n%s\n" % (json.dumps(n).encode(), line) for n, line in lines.items() if line != _NOTHING)
        return _head(body) + b"\n" + body

    def _visit(self, name: str) -> _Folder:
        line = self._stored.get(name)
        self._visited[name] = folder = _Folder(_unpacked(line) if line else {})
        return folder


def _read(path: Path, state: FileState) -> _Outcome:
    try:
        headers, code = read_headers(path), ""
    except VolumeError as error:
        headers, code = (), error.code
    return _Outcome(*state[2:], [header[1:] for header in headers], code)


@cache
def _reader() -> str:
    """What stands for this version of the reader: the sha256 of its source, with pydicom's version."""
    source = b"".join(pkgutil.get_data("fourdvq.data", name) or b"" for name in _READER)
    return hashlib.sha256(source + pydicom.__version__.encode()).hexdigest()


def _head(body: bytes) -> bytes:
    return json.dumps([FORMAT, _reader(), hashlib.sha256(body).hexdigest()]).encode()


def _folders_in(text: bytes) -> dict[str, bytes]:
    """Folder to its line; the lines are unpacked when they are asked for."""
    head, _, body = text.partition(b"\n")
    if head != _head(body):
        return {}
    lines = body.splitlines()
    return {json.loads(name): line for name, line in zip(lines[::2], lines[1::2], strict=True)}


def _packed(outcomes: Mapping[str, _Outcome]) -> bytes:
    images = [image for o in outcomes.values() for image in o.images]
    images = [(*image[:_PIXELS], tuple(image[_PIXELS]), *image[_PIXELS + 1 :]) for image in images]
    files = [(name, *o[:3], o.code or len(o.images)) for name, o in outcomes.items()]
    tables = [[_packed_column(column) for column in zip(*rows, strict=True)] for rows in (files, images)]
    return json.dumps(tables, separators=(",", ":")).encode()


def _unpacked(line: bytes) -> dict[str, _Outcome]:
    of_files, of_images = (list(map(_column, columns)) for columns in json.loads(line))
    if of_images:
        of_images[_PIXELS] = map(PixelPlace._make, of_images[_PIXELS])
    images = zip(*of_images, strict=False)
    result = {}
    for name, size, modified_ns, changed_ns, came_to in zip(*of_files, strict=False):
        found, code = (0, came_to) if isinstance(came_to, str) else (came_to, "")
        result[name] = _Outcome(size, modified_ns, changed_ns, tuple(itertools.islice(images, found)), code)
    return result


def _packed_column(values: Sequence[Any]) -> dict[str, Any]:
    """One of: the value that all have, parts of tuples, the different values and which of them each has, all values."""
    if set(map(type, values)) == {tuple} and len(set(map(len, values))) == 1 and values[0]:
        return {"parts": [_packed_column(part) for part in zip(*values, strict=True)]}
    # As text, so that 0.0 and -0.0 are two values, and 1 and True.
    texts = [repr(value) for value in values]
    different = dict(zip(texts, values, strict=True))
    if len(different) == 1 and len(values) > 1:
        return {"all": values[0]}
    if len(different) > len(values) // 2:
        return {"each": values}
    numbers = {text: n for n, text in enumerate(different)}
    return {"of": list(different.values()), "which": [numbers[text] for text in texts]}


def _column(column: Mapping[str, Any]) -> Iterator[Any]:
    """One value for each; endless if all have the same."""
    if "all" in column:
        return itertools.repeat(_value(column["all"]))
    if "parts" in column:
        return zip(*map(_column, column["parts"]), strict=False)
    if "each" in column:
        return map(_value, column["each"])
    return map([_value(v) for v in column["of"]].__getitem__, column["which"])


def _value(stored: Any) -> Any:
    return tuple(stored) if isinstance(stored, list) else stored


_PIXELS = SliceHeader._fields.index("pixels") - 1  # where they stand among what follows the path
_NOTHING = _packed({})
