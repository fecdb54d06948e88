"""scan, preprocess: from the hospital's tables and scans to prepared arrays."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq.errors import EXIT_OK, EXIT_SOME_REFUSED, ConfigError, explain
from fourdvq_client.verbs._site import here

if TYPE_CHECKING:
    from fourdvq_client.intake import ShownFinding
    from fourdvq_client.preparation import PreparationSummary
    from fourdvq_client.shards import Shard
    from fourdvq_client.workspace import Workspace

_SHOWN = 40


def scan() -> Result:
    """Find scans, read headers, choose series, compare with the clinical table; writes findings.csv, candidates.csv.

    Prints no name, date or path of a patient: those are in findings.csv alone.
    """
    from fourdvq_client.intake import candidates_file, shown_findings
    from fourdvq_client.preparation import blocking, read_cohort

    workspace, config = here()
    with _Progress("files") as looked_at:
        cohort = read_cohort(workspace, config, looked_at.done)
    blocked = blocking(cohort.findings)
    tables = {config.clinical.name: "clinical table"}
    if config.scans_csv is not None:
        tables[config.scans_csv.name] = "scan table"
    findings = shown_findings(workspace, cohort.findings, tables)
    by_code = dict(sorted(Counter(f.code for f in findings).items()))
    facts = {
        "patients": len(cohort.patients),
        "usable": len(cohort.usable),
        "scans": len(cohort.scans),
        "series": len(cohort.candidates),
        "skipped": dict(sorted(cohort.skipped.items())),
        "blocking": blocked,
        "by_code": by_code,
        "findings": [vars(f) for f in findings],
        "file": str(workspace.findings),
        "candidates": str(candidates_file(workspace)),
    }
    return Result(facts, _scan_lines(facts, findings), EXIT_SOME_REFUSED if blocked else EXIT_OK)


def _scan_lines(facts: Mapping[str, Any], findings: Sequence[ShownFinding]) -> tuple[str, ...]:
    lines = [f"{facts['scans']} scans of {facts['patients']} patients, {facts['usable']} usable"]
    if facts["skipped"]:
        left_out = ", ".join(f"{n} {reason}" for reason, n in facts["skipped"].items())
        lines.append(f"files that are no slices of a CT series: {left_out}")
    if facts["by_code"]:
        rows = [(n, code, explain(code).title, explain(code).fix) for code, n in facts["by_code"].items()]
        lines.append(console.table(("times", "code", "what it is", "what to do"), rows))
        lines.append(
            console.table(("code", "patient", "where"), [(f.code, f.patient, f.where) for f in findings[:_SHOWN]])
        )
        if len(findings) > _SHOWN:
            lines.append(f"... and {len(findings) - _SHOWN} more")
        lines.append(f"ids, places and values: {facts['file']}")
    if facts["series"]:
        lines.append(f"{facts['series']} series looked at, and why each was used or not: {facts['candidates']}")
    lines.append("next   fourdvq-client preprocess")
    return tuple(lines)


def preprocess(
    workers: Annotated[int, typer.Option(help="Processes side by side; 0 takes the number of site.yaml.", min=0)] = 0,
    shard: Annotated[str, typer.Option(help="I/N: only part I of N of the patients, for job arrays.")] = "",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try refused and failed scans again.")] = False,
    force: Annotated[str, typer.Option(help="Make everything again from a step: segment, register, resample.")] = "",
    verify: Annotated[bool, typer.Option("--verify", help="Make nothing: read and hash every prepared file.")] = False,
    auto_approve: Annotated[
        bool, typer.Option("--auto-approve-pass", help="Approve undecided scans of grade PASS without a look.")
    ] = False,
    scan_minutes: Annotated[float, typer.Option(help="A scan that takes longer becomes a failed row.", min=0.0)] = 180,
) -> Result:
    """Mask, align and resample every usable patient's scans; what is already there and unchanged is kept."""
    from fourdvq.preprocessing.pipeline import FORCED_STEPS
    from fourdvq_client.preparation import Request, prepare_site
    from fourdvq_client.shards import parse_shard, preparing

    workspace, config = here()
    part = parse_shard(shard)
    if force and force not in FORCED_STEPS:
        raise ConfigError("E_USAGE", where="--force", found=force, wanted=", ".join(FORCED_STEPS))
    if verify:
        _require_alone({"--force": bool(force), "--retry-failed": retry_failed, "--auto-approve-pass": auto_approve})
    with preparing(workspace, part), _Progress("patients") as waiting:
        if verify:
            return _verified(workspace, part, waiting)
        request = Request(part, retry_failed, force, auto_approve, 60.0 * scan_minutes, isolated=True)
        summary = prepare_site(
            workspace, config, workers=workers, request=request, progress=waiting.done, on_step=waiting.step
        )
    return Result(summary.as_dict(), _summary_lines(summary, workspace), _exit_of(summary.some_refused))


def _summary_lines(summary: PreparationSummary, workspace: Workspace) -> tuple[str, ...]:
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.by_status.items()))
    lines = [f"{summary.scans} scans of {summary.patients} patients: {counts or 'none'} ({summary.reused} unchanged)"]
    remedies = summary.remedies()
    if remedies:
        rows = [(n, code, explain(code).title, remedies[code]) for code, n in sorted(summary.by_code.items())]
        lines.append(console.table(("scans", "code", "what it is", "what to do"), rows))
    lines += [f"  {detail}" for detail in summary.details[:_SHOWN]]
    if len(summary.details) > _SHOWN:
        lines.append(f"  ... and {len(summary.details) - _SHOWN} more; fourdvq-client qc list shows all")
    if summary.by_status.get("failed"):
        lines.append("failed scans are left as they are until fourdvq-client preprocess --retry-failed")
    if summary.blocking:
        lines.append(f"{summary.blocking} faults of the tables left patients or scans out: {workspace.findings}")
    if summary.auto_approved:
        lines.append(f"{summary.auto_approved} scans of grade PASS approved without a look, as asked")
    if summary.waiting:
        lines.append(f"{summary.waiting} scans are still to come from other shards; the last one writes the splits")
    lines.append(f"next   look at {summary.contact_sheet}, then fourdvq-client qc approve")
    return tuple(lines)


def _require_alone(given: Mapping[str, bool]) -> None:
    """Raise ConfigError E_USAGE for an option that --verify, which makes nothing, would pass over in silence."""
    for option, is_given in given.items():
        if is_given:
            fix = f"two calls: preprocess --verify, then preprocess {option}"
            raise ConfigError("E_USAGE", where=f"--verify with {option}", found="both", wanted="one of them", fix=fix)


def _verified(workspace: Workspace, shard: Shard, waiting: _Progress) -> Result:
    """Read every prepared file; what is damaged is named and left to be made again."""
    from fourdvq_client.preparation import verify_site

    found = verify_site(workspace, shard, progress=waiting.done)
    lines = [f"{found.patients} patients, {found.scans} scans read: {len(found.damaged)} damaged"]
    lines += [f"  {d.pseudonym}/{d.index}: {', '.join(d.files)}" for d in found.damaged[:_SHOWN]]
    if found.damaged:
        lines.append("next   fourdvq-client preprocess makes them again")
    damaged = [{"scan": f"{d.pseudonym}/{d.index}", "files": list(d.files)} for d in found.damaged]
    facts = {"patients": found.patients, "scans": found.scans, "damaged": damaged}
    return Result(facts, tuple(lines), _exit_of(bool(damaged)))


def _exit_of(some_refused: bool) -> int:
    return EXIT_SOME_REFUSED if some_refused else EXIT_OK


class _Progress:
    """A progress line that appears with the first call of `done`."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._stack = contextlib.ExitStack()
        self._advance: Callable[..., None] | None = None
        self._shown = self._total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def done(self, done: int, total: int) -> None:
        """So many of all are done; a smaller number, or another total, begins the next folder."""
        if self._advance is None or total != self._total or done < self._shown:
            self._stack.close()
            self._advance = self._stack.enter_context(console.progress(self._title, total))
            self._shown, self._total = 0, total
        if done == total or (done - self._shown) * 100 >= total:
            self._advance(done - self._shown, "")
            self._shown = done

    def step(self, text: str) -> None:
        """What is being done now."""
        if self._advance is not None:
            self._advance(0, text)
