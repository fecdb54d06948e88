"""What a run came to, as plain facts, as one self-contained HTML page, and as a folder for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourdvq.config import to_plain
from fourdvq.data.files import csv_bytes, file_sha256, write_atomic
from fourdvq.errors import ConfigError
from fourdvq_server.biomarker_files import report_figures
from fourdvq_server.stages.table import STAGES
from fourdvq_server.store import RunStore, write_json

_METRIC_COLUMNS = ("stage", "round", "site", "metric", "value")
_SCORE_COLUMNS = ("group", "row", "metric", "n", "mean", "low", "high")


def facts_of(store: RunStore) -> dict[str, Any]:
    """Plan, sites, stages, scores and traffic of a run that may be unfinished."""
    results = {stage.name: store.stage(stage.name).result for stage in STAGES}
    validated = results.get("validate") or {}
    return {
        "run": store.name,
        "plan": {"name": store.plan.name, "sha256": store.plan.hash},
        "profile_sha256": store.plan.profile_sha256,
        "overrides": store.facts.get("overrides", []),
        "version": store.facts.get("version", ""),
        "state": store.status.get("state", "not started"),
        "stages": {name: result is not None for name, result in results.items()},
        "sites": (results.get("hello") or {}).get("sites", {}),
        "refused": store.status.get("refused", {}),
        "frozen": results.get("freeze") or {},
        "groups": validated.get("groups", {}),
        "tables": validated.get("tables", {}),
        "failed": validated.get("failed", {}),
        "biomarkers": results.get("survival") or {},
        "biomarker_figures": report_figures(store.stage("survival").folder),
        "release": results.get("release") or {},
        "bytes_down": store.status.get("bytes_down", {}),
        "bytes_up": store.status.get("bytes_up", {}),
        "rounds": _rounds(store),
    }


def write_html(store: RunStore, out: Path) -> Path:
    """The federation's report as one page without scripts or outside links."""
    from jinja2 import Environment

    # autoescape: site names and codes are checked on the wire, and a page must not depend on that.
    template = Environment(autoescape=True).from_string(_PAGE)
    write_atomic(out, template.render(**facts_of(store)).encode())
    return out


def export_folder(store: RunStore, out: Path) -> list[Path]:
    """plan.json, profile.json, metrics.csv, scores.csv, report.html and SHA256SUMS; no weights, no patient data.

    Raises ConfigError E_EXISTS if the folder holds something already.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError("E_EXISTS", where=str(out), found="a folder that is not empty")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "plan.json", store.plan.to_json().encode())
    write_json(out / "profile.json", store.profile)
    write_json(out / "run.json", {**store.facts, "run": store.name, "plan_sha256": store.plan.hash})
    write_atomic(out / "metrics.csv", csv_bytes(_METRIC_COLUMNS, _metric_rows(store)))
    write_atomic(out / "scores.csv", csv_bytes(_SCORE_COLUMNS, _score_rows(store)))
    write_html(store, out / "report.html")
    files = sorted(path for path in out.iterdir() if path.is_file())
    write_atomic(out / "SHA256SUMS", "".join(f"{file_sha256(p)}  {p.name}\n" for p in files).encode())
    return [*files, out / "SHA256SUMS"]


def compare_rows(first: RunStore, second: RunStore, group: str) -> list[dict[str, Any]]:
    """Scores that both runs have, side by side. Raises ConfigError E_RUN for a run without scores."""
    tables = []
    for store in (first, second):
        result = store.stage("validate").result
        if result is None:
            raise ConfigError("E_RUN", where=store.name, found="no scores yet", wanted="a run with stage validate done")
        tables.append({(r["row"], r["metric"]): r for r in result["groups"].get(group, ())})
    return [
        {"row": row, "metric": metric, "first": tables[0][row, metric], "second": tables[1][row, metric]}
        for row, metric in tables[0]
        if (row, metric) in tables[1]
    ]


def different_settings(first: RunStore, second: RunStore) -> list[tuple[str, str, str]]:
    """Key, value of the first and of the second run, for every setting in which the plans differ."""
    from fourdvq_server.experiment import flatten

    ours, theirs = (flatten(to_plain(store.plan)) for store in (first, second))
    keys = sorted(set(ours) | set(theirs))
    return [(k, ours.get(k, "-"), theirs.get(k, "-")) for k in keys if ours.get(k) != theirs.get(k)]


def _rounds(store: RunStore) -> list[dict[str, Any]]:
    """The federation's own figures of each round."""
    return [
        {"stage": line["stage"], "round": line["round"], **line["values"]}
        for line in store.metrics.lines()
        if not line["site"] and line["stage"] in ("vqgan", "ode")
    ]


def _metric_rows(store: RunStore) -> list[tuple[Any, ...]]:
    return [
        (line["stage"], line["round"], line["site"], name, value)
        for line in store.metrics.lines()
        for name, value in sorted(line["values"].items())
    ]


def _score_rows(store: RunStore) -> list[tuple[Any, ...]]:
    groups = (store.stage("validate").result or {}).get("groups", {})
    return [
        (group, r["row"], r["metric"], r["n"], r["mean"], r["low"], r["high"])
        for group, rows in groups.items()
        for r in rows
    ]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ run }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733 }
h1, h2 { font-weight: 600; line-height: 1.2 } h2 { margin-top: 2.2rem }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top }
thead th { border-bottom: 1px solid #9aa5b1 } pre { overflow-x: auto; background: #f5f7f9; padding: .8rem }
.note { color: #52606d } .num { text-align: right; font-variant-numeric: tabular-nums }
</style></head><body>
<h1>Run {{ run }}</h1>
<p class="note">For research. Not a medical device. Scores are sums over sites; no patient's values are here.</p>
<table>
<tr><th>state</th><td>{{ state }}</td></tr>
<tr><th>plan</th><td>{{ plan.name }}, sha256 {{ plan.sha256 }}</td></tr>
<tr><th>overrides</th><td>{{ overrides | join(" ") or "none" }}</td></tr>
<tr><th>profile</th><td>sha256 {{ profile_sha256 }}</td></tr>
<tr><th>tokenizer</th><td>{{ frozen.get("tokenizer_sha256", "not frozen yet") }}</td></tr>
<tr><th>package</th><td>fourdvq {{ version }}</td></tr>
<tr><th>stages done</th><td>{% for name, done in stages.items() if done %}{{ name }} {% endfor %}</td></tr>
</table>
<h2>Sites</h2>
<table><thead><tr><th>site</th><th>role</th><th>patients</th><th>scans</th><th>received</th><th>sent</th></tr></thead>
{% for name, site in sites.items() %}<tr><td>{{ name }}</td><td>{{ site.role }}</td><td>{{ site.patients }}</td>
<td>{{ site.scans }}</td><td class="num">{{ "%.2f MB" % (bytes_down.get(name, 0) / 1e6) }}</td>
<td class="num">{{ "%.2f MB" % (bytes_up.get(name, 0) / 1e6) }}</td></tr>
{% endfor %}{% for name, code in refused.items() %}<tr><td>{{ name }}</td><td colspan="5">not in: {{ code }}</td></tr>
{% endfor %}</table>
<p class="note">Counts are rounded by each site's policy.</p>
<h2>Scores on held-out patients</h2>
{% for group, text in tables.items() %}<h3>{{ group }}</h3><pre>{{ text }}</pre>{% else %}<p>None yet.</p>{% endfor %}
{% for site, codes in failed.items() %}<p>{{ site }}:
{% for kind, code in codes.items() %}{{ kind }} {{ code }} {% endfor %}</p>{% endfor %}
<h2>Biomarkers</h2>
{% if biomarkers %}<p>{{ biomarkers.why or "all that were asked for" }}</p>
{% for text in biomarkers.warnings %}<p class="note">{{ text }}</p>{% endfor %}
<table><thead><tr><th>code</th><th>HR per SD</th><th>95 % interval</th><th>largest p</th><th>mean C</th><th></th></tr>
</thead>{% for row in biomarkers.codes[:10] %}<tr><td>{{ row.code }}</td><td>{{ "%.2f" % row.hazard_ratio }}</td>
<td>{{ "%.2f to %.2f" % (row.low, row.high) }}</td><td>{{ "%.2g" % row.worst_p }}</td>
<td>{{ "%.3f" % row.concordance if row.concordance is not none else "-" }}</td>
<td>{{ "selected" if row.selected }}</td></tr>{% endfor %}</table>
<p class="note">Over the folds: geometric means, the largest p, the mean C within sites. Best ten by C; nothing here
is a finding without the permutation P.</p>
{% for figure in biomarker_figures %}<figure><img src="{{ figure.source }}" alt="{{ figure.title }}">
<figcaption class="note">{{ figure.title }}</figcaption></figure>{% endfor %}{% else %}<p>None yet.</p>{% endif %}
<h2>Rounds</h2>
{% for stage in ("vqgan", "ode") %}<h3>{{ stage }}</h3><table>
{% for line in rounds if line.stage == stage %}<tr><td>round {{ line.round }}</td><td>
{% for name, value in line.items() if name not in ("stage", "round") %}{{ name }} {{ "%.5g" % value }}&ensp;{% endfor %}
</td></tr>{% endfor %}</table>{% endfor %}
</body></html>
"""
