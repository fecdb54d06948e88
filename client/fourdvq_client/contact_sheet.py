"""The contact sheet: all scans of a cohort with their pictures and numbers, one HTML file that opens without a network.

It can be sorted, filtered and gone through by keyboard. It decides nothing: marks become the command that a person
runs. Only pseudonyms, days and numbers are in it.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from fourdvq import __version__
from fourdvq.data.prepared import write_changed
from fourdvq.errors import CODES
from fourdvq.preprocessing.records import SMALL_PICTURE, read_qc
from fourdvq_client.review_rows import GRADES, SEEN_DIGITS, Row, review_rows, undecided

_MARK = "fourdvq-fingerprint"
_HEAD_BYTES = 2000
_NO_NETWORK = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_WORDS = ("scan", "grade", "codes", "decision")
_COLUMNS = (
    "scan", "day", "grade", "codes", "decision", "lung ml", "change %", "Dice", "corr.", "inverse mm", "moved mm",
    "fold %",
)  # fmt: skip
_GRADES = (*GRADES, "none")


def write_sheet(prep: Path) -> Path:
    """prep/contact_sheet.html, written if anything on it changed. Raises CohortError E_FILE without a manifest."""
    rows = review_rows(prep)
    path = prep / "contact_sheet.html"
    css, script = _asset("contact_sheet.css"), _asset("contact_sheet.js")
    fingerprint = _fingerprint(prep, rows, css + script)
    if _known_fingerprint(path) != fingerprint:
        write_changed(path, _page(prep, rows, css, script, fingerprint).encode())
    return path


def _page(prep: Path, rows: Sequence[Row], css: str, script: str, fingerprint: str) -> str:
    scans = "\n".join(_scan(prep / row["folder"], row) for row in rows)
    counts = Counter(_grade(row) for row in rows)
    waiting = sum(undecided(row) for row in rows)
    summary = ", ".join(f"{counts[g]} {'without result' if g == 'none' else g}" for g in _GRADES if counts[g])
    headers = "".join(
        f'<th scope="col"{_class(c)}><button type="button">{c}</button></th>' for c in _COLUMNS
    )  # fmt: skip
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="{_MARK}" content="{fingerprint}">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{_NO_NETWORK}">
<title>Contact sheet, {len(rows)} scans</title><style>
{css}</style></head>
<body><header><h1>Contact sheet</h1>
<p>{len(rows)} scans: {summary or "none"}; {waiting} wait for a decision.
Baseline blue, follow-up yellow: aligned tissue is grey. The patient's right is on the left.</p>
<p class="keys"><span><kbd>j</kbd> <kbd>k</kbd> next and previous scan,</span>
<span><kbd>a</kbd> mark to approve,</span> <span><kbd>r</kbd> to reject,</span> <span><kbd>u</kbd> unmark,</span>
<span><kbd>/</kbd> search, <kbd>Enter</kbd> to what was found.</span> Click a column's name to sort.</p>
{_form(rows)}</header>
<main><table><thead><tr>{headers}</tr></thead>
{scans}
</table></main>
<footer><div><span>Run in the site's folder:</span><code id="command"></code>
<button type="button" id="copy">Copy</button></div></footer>
<script>
{script}</script></body></html>
"""


def _form(rows: Sequence[Row]) -> str:
    grades = "".join(
        f'<label><input type="checkbox" name="grade" value="{g}" checked> {"no result" if g == "none" else g}</label>'
        for g in _GRADES
    )
    codes = sorted({code for row in rows for code in row["code"].split()})
    decisions = sorted({_decision(row) for row in rows})
    return f"""<form><fieldset><legend>grade</legend>{grades}</fieldset>
<label>code <select name="code"><option value="">all</option>{_options(codes)}</select></label>
<label>decision <select name="decision"><option value="">all</option>{_options(decisions)}</select></label>
<label>scan <input type="search" name="text" size="14"></label>
<label><input type="checkbox" name="pictures" checked> pictures</label>
<span id="count" role="status"></span></form>"""


def _scan(folder: Path, row: Row) -> str:
    qc = read_qc(folder) if row["content_sha256"] else {}
    pair = qc.get("pair") or {}
    codes = [str(c) for c in qc.get("codes", [])] or row["code"].split()
    name, grade, decision = f"{row['pseudonym']}/{row['index']}", _grade(row), _decision(row)
    cells = (
        html.escape(name), row["days"], f'<b class="{grade}">{row["grade"] or row["status"]}</b>', _explained(codes),
        f'{decision} <b class="mark"></b>', _number(row["lung_ml"], 0), _number(pair.get("volume_change_percent"), 0),
        _number(pair.get("dice"), 3), _number(pair.get("ncc"), 2), _number(pair.get("inverse_p95_mm"), 1),
        _number(pair.get("displacement_p95_mm"), 1), _number(pair.get("fold_percent"), 2),
    )  # fmt: skip
    facts = "".join(f"<td{_class(c)}>{cell}</td>" for c, cell in zip(_COLUMNS, cells, strict=True))
    given = {
        "name": name, "grade": grade, "code": " ".join(codes), "decision": decision,
        "content": row["content_sha256"][:SEEN_DIGITS],
    }  # fmt: skip
    data = " ".join(f'data-{key}="{html.escape(value)}"' for key, value in given.items())
    return f'<tbody tabindex="0" {data}><tr class="facts">{facts}</tr>{_picture(folder / SMALL_PICTURE, row)}</tbody>'


def _picture(path: Path, row: Row) -> str:
    if not row["content_sha256"] or not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    about = f"quality pictures of scan {row['pseudonym']}/{row['index']}"
    image = f'<img alt="{html.escape(about)}" src="data:image/jpeg;base64,{data}">'
    return f'<tr class="picture"><td colspan="{len(_COLUMNS)}">{image}</td></tr>'


def _explained(codes: Iterable[str]) -> str:
    texts = ((code, CODES[code].title if code in CODES else "") for code in codes)
    return " ".join(f'<abbr title="{html.escape(title)}">{html.escape(code)}</abbr>' for code, title in texts)


def _grade(row: Row) -> str:
    return row["grade"] if row["grade"] in _GRADES else "none"


def _decision(row: Row) -> str:
    return row["decision"] or ("undecided" if row["content_sha256"] else "-")


def _number(value: object, digits: int) -> str:
    return "" if value in (None, "") else f"{float(str(value)):z.{digits}f}"


def _class(column: str) -> str:
    kinds = [kind for kind, holds in (("word", column in _WORDS), ("codes", column == "codes")) if holds]
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _options(values: Iterable[str]) -> str:
    return "".join(f"<option>{html.escape(value)}</option>" for value in values)


def _fingerprint(prep: Path, rows: Sequence[Row], assets: str) -> str:
    """What the page depends on, without reading pictures: a second run must not encode all of them again."""
    digest = hashlib.sha256(f"{__version__} {assets}".encode())
    for row in rows:
        picture = prep / row["folder"] / SMALL_PICTURE
        seen = (picture.stat().st_size, picture.stat().st_mtime_ns) if picture.is_file() else ()
        digest.update(repr((sorted(row.items()), seen)).encode())
    return digest.hexdigest()


def _known_fingerprint(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES).decode(errors="replace")
    _, _, rest = head.partition(f'name="{_MARK}" content="')
    return rest[:64]


def _asset(name: str) -> str:
    return (files("fourdvq_client") / "assets" / name).read_text(encoding="utf-8")
