"""Headers that are lines of text, as MetaImage and NRRD have them: short, each key once."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import BinaryIO

from fourdvq.data.limits import shown
from fourdvq.errors import VolumeError

MAX_HEADER = 1 << 16
_WHOLE = re.compile(r"\d{1,9}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class TextHeader:
    """Keys and values of a header; `end` is the byte behind it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, str] = {}
        self.end = 0

    def line(self, stream: BinaryIO) -> str:
        """The next line, without its end. Raises VolumeError E_CORRUPT for a header that is no text or never ends."""
        raw = stream.readline(MAX_HEADER + 1)
        self.end += len(raw)
        if not raw.endswith(b"\n") or self.end > MAX_HEADER:
            raise self.broken("a header that does not end")
        try:
            return raw.decode("ascii").rstrip("\r\n")
        except UnicodeDecodeError:
            raise self.broken("a header that is not text") from None

    def add(self, key: str, value: str) -> None:
        """Note a field. Raises VolumeError E_CORRUPT if it is there already: of two values one would be taken."""
        name = key.strip().lower()
        if name in self.fields:
            raise self.broken(f"two lines {name!r}")
        self.fields[name] = value.strip()

    def wholes(self, key: str) -> tuple[int, ...]:
        """Whole numbers of a field; empty if it is absent."""
        words = self.fields.get(key, "").split()
        if not all(_WHOLE.fullmatch(w) for w in words):
            raise self.broken(f"{key} that are not whole numbers")
        return tuple(int(w) for w in words)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Finite numbers of a field; empty if it is absent. Brackets and commas are passed over."""
        words = re.sub(r"[(),]", " ", self.fields.get(key, "")).split()
        if not all(_NUMBER.fullmatch(w) for w in words) or not all(math.isfinite(float(w)) for w in words):
            raise self.broken(f"{key} that are not numbers")
        return tuple(float(w) for w in words)

    def broken(self, found: str) -> VolumeError:
        """The error for a header that cannot be read."""
        return VolumeError("E_CORRUPT", where=shown(self.path), found=found)

    def unusable(self, found: str, wanted: str) -> VolumeError:
        """The error for a header that says something we do not take."""
        return VolumeError("E_NIFTI", where=shown(self.path), found=found, wanted=wanted)
