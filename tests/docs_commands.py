"""The reference of both commands as Markdown: every verb with its options, exit codes and an example.

Options and help come from the Typer applications, so they cannot fall behind; examples and exit codes stand here, and
`tests/unit/test_docs.py` parses every example with the command itself.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import typer.main

START = "<!-- made by: python tests/docs_pages.py -->"
END = "<!-- end of what is made -->"

_HEAD = """\
## Every verb: options, exit codes, an example

Any verb may end with 0 (done), 1 (a bug, a broken machine or a missing right), 2 (usage or settings; also a folder of
another kind), 75 (SIGTERM, a full disk or a share that is gone: the same command goes on) and 130 (Ctrl-C). What else
a verb may end with stands under it.
"""


@dataclass(frozen=True)
class Note:
    """What the application itself does not say: an example, and exit codes of its own with their reason."""

    example: str
    exits: str = ""


_NO_MODEL = "1 no released model, or its files are damaged; 3 no approved scan"

_UNDECIDABLE = "3 no such patient or scan, one without a result, or another content than was named"

CLIENT: dict[str, Note] = {
    "init": Note("init leuven.invitation.json --workdir leuven", "5 the invitation is damaged or of another version"),
    "check": Note("check --data --network", "that of the first FAIL (1 to 5); warnings alone are 0"),
    "scan": Note("scan", "3 a finding blocks a patient or scan"),
    "fetch-weights": Note(
        "fetch-weights --from unet_r231-d5d2fc3d.pth",
        "1 other bytes than the profile's; 4 the server does not answer; 75 the connection broke: again goes on",
    ),
    "preprocess": Note(
        "preprocess --shard 3/8 --workers 4",
        "3 scans were refused, failed or are damaged; 75 another run has the folder or shard",
    ),
    "dry-run": Note("dry-run experiment=tiny --until ode", "3 no approved scan; 75 the site's rules refused a round"),
    "approve": Note("approve --latest --show", "5 this account may not write policy.yaml, or another profile"),
    "join": Note(
        "join --background",
        "0 the experiment has ended, or `leave`; 4 nobody answers; 5 the coordinator or the policy says no; "
        "75 SIGTERM, or an earlier connection still counts",
    ),
    "leave": Note("leave", "75 the client still finishes its step"),
    "watch": Note("watch --every 5"),
    "status": Note("status --quiet", "1 with `--quiet`: no client is at work"),
    "pull": Note("pull --import releases/fast-1", "1 no bundle, or its files are damaged"),
    "evaluate": Note("evaluate --split validation", _NO_MODEL),
    "report": Note("report", _NO_MODEL),
    "submit": Note("submit --by 'A. Person'", "5 the file holds an id, a path or a date; 130 answered with no"),
    "generate": Note(
        "generate --patient 007 --times 0.5:3:0.5",
        "1 no released model; 3 no such patient, fewer than two approved scans, or impossible times",
    ),
    "phantom": Note(
        "phantom --out cohort --patients 20 --seed 1 --format dicom", "3 the folder holds a finished cohort"
    ),
    "biomarkers": Note("biomarkers --top 20", _NO_MODEL),
    "show-config": Note("show-config"),
    "explain": Note("explain E_GAP", "2 no such code; the nearest one is named"),
    "version": Note("version --json"),
    "qc list": Note("qc list --undecided", "3 nothing is prepared"),
    "qc approve": Note("qc approve --passed --by 'A. Person'", _UNDECIDABLE),
    "qc reject": Note("qc reject 007/1 --reason 'breathing'", _UNDECIDABLE),
    "qc redo": Note("qc redo 007/1 --reason 'new mask'", f"{_UNDECIDABLE}; 75 another process works in this folder"),
    "qc open": Note("qc open", "3 nothing is prepared"),
    "policy show": Note("policy show", "5 the policy cannot be read"),
    "policy check": Note("policy check", "5 the policy cannot be read, or does not fit this site"),
    "audit show": Note("audit show --last 0 --run fast-1"),
    "audit verify": Note("audit verify", "1 the chain is broken; the first bad line is named"),
    "audit what-left": Note("audit what-left"),
    "survival runs": Note("survival runs"),
    "survival allow-rerun": Note("survival allow-rerun --reason 'the first run was stopped' --by 'A. Person'"),
}

_RUNS = "4 the SuperLink does not answer; 75 too few sites, a stop, or another process: `resume` goes on"

SERVER: dict[str, Note] = {
    "init": Note("init ipf-europe --address fl.example.org:8443 --workdir federation"),
    "renew-cert": Note("renew-cert"),
    "invite": Note("invite oslo --role external", "5 the site is approved already"),
    "approve": Note(
        "approve leuven.request.json", "5 the fingerprint differs, or the request is not of an invited site"
    ),
    "revoke": Note("revoke leuven"),
    "sites": Note("sites"),
    "serve": Note("serve", "1 a port is taken, or another process holds the door; 5 another version of Flower"),
    "demo": Note("demo --quick --out demo", "75 a round got too few replies: the same command goes on"),
    "ablate": Note(
        "ablate --table 1 --quick --out ablation", "75 a round got too few replies: the same command goes on"
    ),
    "experiments": Note("experiments"),
    "plan": Note("plan experiment=fast federation.rounds=40 -o plan.json"),
    "show-config": Note("show-config experiment=paper_code"),
    "run": Note("run experiment=fast federation.rounds=40 --name fast-1", _RUNS),
    "resume": Note("resume fast-1", _RUNS),
    "status": Note("status"),
    "watch": Note("watch fast-1"),
    "logs": Note("logs --last 0"),
    "pause": Note("pause --off"),
    "stop": Note("stop"),
    "validate": Note("validate fast-1 --round 12 --site external", _RUNS),
    "compare": Note("compare fast-1 fast-2 --group external"),
    "report": Note("report fast-1 -o report.html"),
    "export": Note("export fast-1 -o fast-1-export"),
    "biomarkers": Note("biomarkers fast-1 --top 20"),
    "survival": Note("survival --table leuven.csv --table southampton.csv -o survival/"),
    "release": Note("release fast-1"),
    "ui": Note("ui --port 5001", "1 another program has the port, or MLflow ended"),
    "check": Note("check", "that of the first FAIL; warnings alone are 0"),
    "explain": Note("explain E_QUORUM", "2 no such code; the nearest one is named"),
    "version": Note("version"),
}
NOTES = {"fourdvq-client": CLIENT, "fourdvq-server": SERVER}


def applications() -> dict[str, click.Command]:
    """Both commands by program name."""
    from fourdvq_client.cli import app as client
    from fourdvq_server.cli import app as server

    found: dict[str, Any] = {"fourdvq-client": client, "fourdvq-server": server}
    return {program: typer.main.get_command(app) for program, app in found.items()}


def verbs(command: click.Command, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every verb with its full name, such as `qc list`, in the order of registration."""
    for name, child in getattr(command, "commands", {}).items():
        full = f"{before}{name}"
        if hasattr(child, "commands"):
            yield from verbs(child, f"{full} ")
        else:
            yield full, child


def reference(program: str) -> str:
    """The made part of the program's page, markers included."""
    parts = [START, _HEAD]
    for name, command in verbs(applications()[program]):
        parts.append(_section(program, name, command, NOTES[program].get(name, Note(name))))
    return "\n".join([*parts, END])


def with_reference(page: str, program: str) -> str:
    """The page with its made part new; the rest is written by people and stays."""
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    return before + reference(program) + after


def _section(program: str, name: str, command: click.Command, note: Note) -> str:
    rows = [_row(parameter, command) for parameter in command.params]
    lines = [f"### `{name}`", "", inspect.cleandoc(command.help or ""), ""]
    if rows:
        lines += ["| argument or option | default | meaning |", "|---|---|---|", *rows, ""]
    lines += [f"Exit codes of its own: {note.exits}.", ""] if note.exits else []
    lines += ["```", f"{program} {note.example}", "```", ""]
    return "\n".join(lines)


def _row(parameter: click.Parameter, command: click.Command) -> str:
    default = "required" if parameter.required else _default(parameter.default)
    return f"| {_words(parameter)} | {default} | {_cell(help_of(parameter, command))} |"


def help_of(parameter: click.Parameter, command: click.Command) -> str:
    """The help of an option or argument, from the verb's own annotations.

    Read there because Typer 0.20 on Click 8.5 loses the help of arguments on the way.
    """
    if command.callback is None:
        return ""
    hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    texts = [getattr(extra, "help", None) for extra in typing.get_args(hints[parameter.name or ""])[1:]]
    return next((text for text in texts if text), "")


def _words(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        names = ", ".join(f"`{word}`" for word in [*parameter.opts, *parameter.secondary_opts])
        kind = "" if parameter.is_flag else f" {parameter.type.name.split()[0].upper()}"
    else:
        names, kind = f"`{(parameter.name or '').upper()}`", ""
    return names + kind + (", may be repeated" if parameter.multiple or parameter.nargs == -1 else "")


def _default(value: Any) -> str:
    empty = value is None or value is False or value in ("", ())
    return "" if empty or callable(value) else f"`{value}`"


def _cell(text: str) -> str:
    return text.strip().replace("\n", " ").replace("|", "\\|")
