"""Reading a hospital's CSV: any usual separator, with or without byte-order mark, every field as text."""

from __future__ import annotations

import csv
import datetime
import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourdvq.errors import CohortError

_SEPARATORS = ",;\t"


@dataclass(frozen=True)
class SourceTable:
    """Rows by our column names; `numbers` are the row numbers of the file as a spreadsheet shows them."""

    name: str
    rows: tuple[dict[str, str], ...]
    numbers: tuple[int, ...]
    columns: frozenset[str]
    separator: str


def read_source_table(
    path: Path, *, required: Sequence[str], optional: Sequence[str], columns: Mapping[str, str]
) -> SourceTable:
    """Read a table whose columns `columns` translates (ours to theirs; absent means the same name).

    An optional column that is translated must be there. What is neither required nor optional is another table's.

    Raises CohortError E_FILE, E_TABLE (not text, no rows, or a row with too many fields) and E_COLUMN.
    """
    if not path.is_file():
        raise CohortError("E_FILE", where=str(path), found="nothing")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CohortError("E_TABLE", where=str(path), found="not UTF-8", fix="save the table as CSV UTF-8") from None
    header = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(_SEPARATORS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    lines = [(reader.line_num, [field.strip() for field in line]) for line in reader if any(f.strip() for f in line)]
    if len(lines) < 2:
        raise CohortError("E_TABLE", where=str(path), found="no rows")
    names = lines[0][1]
    theirs = {ours: columns.get(ours, ours) for ours in (*required, *optional)}
    for ours in theirs:
        if theirs[ours] not in names and (ours in required or ours in columns):
            raise _missing_column(path, ours, theirs[ours], names)
    for number, fields in lines[1:]:
        if len(fields) > len(names):
            found = f"{len(fields)} fields, the header has {len(names)}"
            raise CohortError("E_TABLE", where=f"{path.name} row {number}", found=found)
    at = {ours: names.index(name) for ours, name in theirs.items() if name in names}
    rows = tuple({ours: _field(fields, i) for ours, i in at.items()} for _, fields in lines[1:])
    return SourceTable(path.name, rows, tuple(n for n, _ in lines[1:]), frozenset(at), separator)


def parse_number(text: str, *, comma_is_decimal: bool) -> float | None:
    """A number, or None; with `comma_is_decimal`, 71,5 is 71.5."""
    try:
        return float(text.replace(",", ".") if comma_is_decimal else text)
    except ValueError:
        return None


def parse_whole(text: str) -> int | None:
    """A whole number, also written as 12.0 or 12,0; None for anything else."""
    number = parse_number(text, comma_is_decimal=True)
    return int(number) if number is not None and number == int(number) else None


def parse_date(text: str) -> datetime.date | None:
    """YYYY-MM-DD (a time of day after it is ignored) or YYYYMMDD as in DICOM; None for anything else."""
    head = text[:10] if len(text) > 10 and text[10] in " T" else text
    if len(head) == 8 and head.isdigit():
        head = f"{head[:4]}-{head[4:6]}-{head[6:]}"
    try:
        return datetime.date.fromisoformat(head) if len(head) == 10 else None
    except ValueError:
        return None


def nearest(word: str, words: Sequence[str]) -> str:
    """ "did you mean ...?", or an empty text if nothing is close."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def _field(fields: Sequence[str], i: int) -> str:
    return fields[i] if i < len(fields) else ""


def _missing_column(path: Path, ours: str, theirs: str, names: Sequence[str]) -> CohortError:
    label = repr(theirs) if ours == theirs else f"{theirs!r} (for {ours})"
    found = "columns " + ", ".join(names[:12])
    return CohortError("E_COLUMN", where=f"{path.name}, column {label}", found=found, fix=nearest(theirs, names))
