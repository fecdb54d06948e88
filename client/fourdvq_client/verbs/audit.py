"""audit: what this site accepted, released and refused."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import GLOBAL_HELP, Result
from fourdvq.errors import EXIT_FAILED, EXIT_OK
from fourdvq_client.verbs._site import here

app = typer.Typer(help="What this site accepted, released and refused.", no_args_is_help=True, epilog=GLOBAL_HELP)

Run = Annotated[str | None, typer.Option(help="Only this run.")]


@app.command("show", epilog=GLOBAL_HELP)
def show(
    run: Run = None, last: Annotated[int, typer.Option(help="Only so many lines; 0 for all.", min=0)] = 50
) -> Result:
    """The log's lines."""
    from fourdvq_client.audit import read_entries

    workspace, _ = here()
    entries = read_entries(workspace.audit_file, run=run)[-last or None :]
    columns = ("seq", "utc", "action", "kind", "decision", "rule", "round", "bytes", "patients")
    table = console.table(columns, [[e[c] for c in columns] for e in entries])
    return Result({"entries": entries}, (table,))


@app.command("verify", epilog=GLOBAL_HELP)
def verify(
    head: Annotated[str, typer.Option(help="A head that the coordinator remembers; it must be in the log.")] = "",
) -> Result:
    """Check the chain of hashes; exit 1 and the first bad line if it is broken."""
    from fourdvq_client import audit
    from fourdvq_client.runtime import site_fingerprint

    workspace, _ = here()
    found = audit.verify(workspace.audit_file, site_fingerprint(workspace), head=head or None)
    facts = {"lines": found.lines, "head": found.head, "first_bad": found.first_bad, "reason": found.reason}
    if found.first_bad is None:
        return Result(facts, (f"{found.lines} lines, unbroken; head {found.head}",), EXIT_OK)
    return Result(facts, (f"broken at line {found.first_bad}: {found.reason}",), EXIT_FAILED)


@app.command("what-left", epilog=GLOBAL_HELP)
def what_left(run: Run = None) -> Result:
    """A summary of what left this site, by kind of message."""
    from fourdvq_client.audit import read_entries

    workspace, _ = here()
    sums: dict[tuple[str, str], list[int]] = {}
    for entry in read_entries(workspace.audit_file, run=run):
        if entry["action"] == "release":
            what = "refusal" if str(entry["decision"]).startswith("refusal") else str(entry["decision"])
            row = sums.setdefault((str(entry["kind"]), what), [0, 0])
            row[0] += 1
            row[1] += int(entry["bytes"])
    rows = [{"kind": k, "data": d, "messages": n, "bytes": size} for (k, d), (n, size) in sorted(sums.items())]
    total = sum(r["bytes"] for r in rows if isinstance(r["bytes"], int))
    table = console.table(("kind", "data", "messages", "bytes"), [list(r.values()) for r in rows])
    return Result({"rows": rows, "bytes": total}, (table, f"{total} bytes in all"))
