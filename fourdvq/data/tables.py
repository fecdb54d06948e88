"""Reading a hospital's CSV: any usual separator, with or without byte-order mark, every field as text."""

from __future__ import annotations

import csv
import datetime
import difflib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourdvq.errors import CohortError
from fourdvq.os_errors import reading

_SEPARATORS = ",;\t"
_NAMED_SEPARATOR = re.compile(r'"?sep=([,;\t])"?\s*', re.IGNORECASE)


@dataclass(frozen=True)
class Lines:
    """A CSV as it stands: `rows` with their numbers as a spreadsheet shows them, blank ones left out."""

    separator: str
    names: list[str]
    rows: list[tuple[int, list[str]]]


@dataclass(frozen=True)
class SourceTable:
    """Rows by our column names; `numbers` are the row numbers of the file as a spreadsheet shows them."""

    name: str
    rows: tuple[dict[str, str], ...]
    numbers: tuple[int, ...]
    columns: frozenset[str]
    separator: str


def read_lines(path: Path, *, fix: str = "") -> Lines:
    """Header and rows of a CSV, whoever wrote it; `fix` is the remedy if it is no text.

    Raises CohortError E_FILE and E_TABLE (not UTF-8, a quote without an end, or a row with too many fields), and what
    `from_os` says of a file that cannot be read.
    """
    text = _text_of(path, fix)
    header = next((line for line in text.splitlines() if line.strip()), "")
    named = _NAMED_SEPARATOR.fullmatch(header)  # a first line that some spreadsheets write and understand
    separator = named[1] if named else max(_SEPARATORS, key=header.count)
    lines = _fields(path, text, separator, fix)[1 if named else 0 :]
    names = lines[0][1] if lines else []
    for number, fields in lines[1:]:
        if any(fields[len(names) :]):
            found = f"{len(fields)} fields, the header has {len(names)}"
            raise CohortError("E_TABLE", where=f"{path.name} row {number}", found=found, fix=fix)
    return Lines(separator, names, lines[1:])


def read_source_table(
    path: Path, *, required: Sequence[str], optional: Sequence[str], columns: Mapping[str, str]
) -> SourceTable:
    """Read a table whose columns `columns` translates (ours to theirs; absent means the same name).

    An optional column that is translated must be there. What is neither required nor optional is another table's.
    Raises CohortError E_FILE, E_TABLE (not text, no rows, or a row with too many fields) and E_COLUMN, and what
    `from_os` says of a file that cannot be read.
    """
    lines = read_lines(path)
    names = lines.names
    if not lines.rows:
        raise CohortError("E_TABLE", where=str(path), found="no rows")
    theirs = {ours: columns.get(ours, ours) for ours in (*required, *optional)}
    for ours in theirs:
        if theirs[ours] not in names and (ours in required or ours in columns):
            raise _missing_column(path, ours, theirs[ours], names)
    at = {ours: names.index(name) for ours, name in theirs.items() if name in names}
    rows = tuple({ours: _field(fields, i) for ours, i in at.items()} for _, fields in lines.rows)
    return SourceTable(path.name, rows, tuple(n for n, _ in lines.rows), frozenset(at), lines.separator)


def parse_number(text: str, *, comma_is_decimal: bool) -> float | None:
    """A finite number, or None; with `comma_is_decimal`, 71,5 is 71.5."""
    try:
        number = float(text.replace(",", ".") if comma_is_decimal else text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


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


def _fields(path: Path, text: str, separator: str, fix: str) -> list[tuple[int, list[str]]]:
    """Each row that holds anything, with its number."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                lines.append((reader.line_num, [field.strip() for field in fields]))
    except csv.Error as error:
        # The row where the reader gave up: a quote that was opened in it, or before it, has no end.
        where = f"{path.name} row {lines[-1][0] + 1 if lines else 1}"
        raise CohortError("E_TABLE", where=where, found=str(error), fix=fix or "close or remove the quote") from None
    return lines


def _text_of(path: Path, fix: str) -> str:
    with reading(str(path)):
        if not path.is_file():
            raise CohortError("E_FILE", where=str(path), found="nothing", fix=fix)
        data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        fix = fix or "save the table as CSV UTF-8"
        raise CohortError("E_TABLE", where=f"{path.name} row {row}", found="not UTF-8", fix=fix) from None


def _field(fields: Sequence[str], i: int) -> str:
    return fields[i] if i < len(fields) else ""


def _missing_column(path: Path, ours: str, theirs: str, names: Sequence[str]) -> CohortError:
    label = repr(theirs) if ours == theirs else f"{theirs!r} (for {ours})"
    found = "columns " + ", ".join(names[:12])
    return CohortError("E_COLUMN", where=f"{path.name}, column {label}", found=found, fix=nearest(theirs, names))
