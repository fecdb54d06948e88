"""What both commands share at the terminal: global options, one way to print results, errors and progress.

A verb is a function that returns a `Result`; with `--json` the result (or the error) is printed as exactly one JSON
object, last on standard output, and everything else goes to standard error. Global options are accepted before and
after the verb. Imports of typer and rich stay inside the functions: `--help` must answer in well under a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from fourdvq.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, ConfigError, FourdvqError, explain
from fourdvq.os_errors import from_os, place_of, reason
from fourdvq.stopping import EXIT_OF, answered, stop_error

GLOBAL_HELP = "Everywhere: --json (one JSON object last on stdout), -q/--quiet, -v/--verbose, --workdir DIR, --no-color"


@dataclass(frozen=True)
class Options:
    """The global options of one call."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    workdir: Path = Path()
    color: bool = True


@dataclass(frozen=True)
class Result:
    """What a verb achieved: `data` for `--json`, `lines` for people, and the exit code."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    exit_code: int = EXIT_OK


@dataclass
class _Session:
    options: Options = field(default_factory=Options)
    stopped_by: signal.Signals = signal.SIGINT


_session = _Session()


def options() -> Options:
    """The global options of the running command."""
    return _session.options


def note(text: str) -> None:
    """A line for the person who waits; to standard error, silent under --quiet."""
    if not options().quiet:
        print(text, file=sys.stderr, flush=True)


def split_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Take the global options out of `argv`, wherever they stand before a bare `--`; return them and the rest."""
    taken: dict[str, Any] = {}
    rest: list[str] = []
    flags = {"--json": "json", "-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose"}
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word in flags:
            taken[flags[word]] = True
        elif word == "--no-color":
            taken["color"] = False
        elif word == "--workdir" or word.startswith("--workdir="):
            value = word.partition("=")[2] or next(words, "")
            if not value or value.startswith("-"):
                raise FourdvqError("E_USAGE", where="--workdir", found=value or "nothing", wanted="a folder")
            taken["workdir"] = Path(value)
        else:
            rest.append(word)
    return Options(**taken), rest


@contextlib.contextmanager
def loading(program: str, signals: Iterable[int] = ()) -> Iterator[None]:
    """While a command is still being imported, Ctrl-C and SIGTERM end it on the spot: nothing has been begun.

    `signals` are all that stay blocked from here on: one that came before it could be answered is answered now.
    """

    def end(number: int, _: object) -> None:
        _session.options = Options(json="--json" in sys.argv)
        os._exit(_fail(stop_error(number, program), EXIT_OF[signal.Signals(number)]))

    with answered(signal.SIGINT, end), answered(signal.SIGTERM, end):
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        yield


def run(app: Any, argv: Sequence[str], program: str) -> int:
    """Run a Typer application and return the exit code; never a traceback unless asked for with --verbose."""
    _session.stopped_by = signal.SIGINT
    try:
        with answered(signal.SIGTERM, _stop):
            code = _outcome(app, argv, program)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:  # before the verb, or after it
        return _stopped(program)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong, and there is nobody left to tell.
        _drop_output()
        return EXIT_OK
    except OSError as error:
        # Whatever a verb raises has become an outcome: this is what came of printing it.
        _drop_output()
        ours = from_os(error, "standard output") or FourdvqError("E_STORAGE", where="standard output")
        with contextlib.suppress(OSError):
            print(format_error(ours), file=sys.stderr, flush=True)
        return ours.exit_code
    return code


def _stop(number: int, _: object) -> NoReturn:
    """A batch system ends a job with SIGTERM: all that ends in order after Ctrl-C ends in order after it."""
    _session.stopped_by = signal.Signals(number)
    raise KeyboardInterrupt


def _drop_output() -> None:
    """Send what is still to be printed nowhere, or the interpreter would complain of it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _outcome(app: Any, argv: Sequence[str], program: str) -> int:
    import click
    import typer

    _session.options = Options(json="--json" in argv)  # for what is wrong with the options themselves
    try:
        _session.options, rest = split_options(argv)
    except FourdvqError as error:
        return _fail(error, EXIT_USAGE)
    if rest == ["--version"]:
        rest = ["version"]
    try:
        outcome = typer.main.get_command(app).main(rest, prog_name=program, standalone_mode=False)
    except FourdvqError as error:
        return _fail(error, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        asked = error.ctx.command_path if error.ctx is not None else program
        return _without_verb(error.format_message(), asked)
    except click.ClickException as error:
        found = error.format_message()
        return _fail(FourdvqError("E_USAGE", where=program, found=found, fix=f"{program} --help"), EXIT_USAGE)
    except (KeyboardInterrupt, click.Abort):
        outcome = EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:
        ours = _refused_by_system(error, program)
        return _fail(ours, ours.exit_code)
    except Exception as error:
        return _fail(FourdvqError("E_INTERNAL", where=program, found=f"{type(error).__name__}: {error}"), EXIT_FAILED)
    # Typer turns Ctrl-C into a silent exit code of its own; a person still wants to know what to do next.
    if outcome == EXIT_INTERRUPTED:
        return _stopped(program)
    return _finish(outcome)


def _stopped(program: str) -> int:
    return _fail(stop_error(_session.stopped_by, program), EXIT_OF[_session.stopped_by])


def _without_verb(usage: str, asked: str) -> int:
    if options().json:
        error = FourdvqError("E_USAGE", where=asked, found="no verb", wanted="a verb", fix=f"{asked} --help")
        return _fail(error, EXIT_USAGE)
    print(usage)
    return EXIT_USAGE


def _refused_by_system(error: OSError, program: str) -> FourdvqError:
    """A full disk, a share that went away or a missing right is no bug; the path itself may name a patient."""
    where = place_of(error, options().workdir)
    found = f"{type(error).__name__}: {reason(error)}, at {where}"
    return from_os(error, where) or FourdvqError("E_INTERNAL", where=program, found=found)


def format_error(error: FourdvqError) -> str:
    """The error as a person reads it: title, place, found against wanted, why, and the next step."""
    rows = [f"{error.code}  {error.title}"]
    labelled = (
        ("where", error.where),
        ("found", error.found),
        ("wanted", error.wanted),
        ("why", error.why),
        ("fix", error.fix),
    )
    rows += [f"  {label:<7} {text}" for label, text in labelled if text]
    return "\n".join(rows)


def format_explanation(code: str) -> str:
    """The long text of a code, for `explain`. Raises ConfigError E_USAGE with the nearest code if it is unknown."""
    import difflib

    from fourdvq.error_codes import CODES

    if code not in CODES:
        close = difflib.get_close_matches(code.upper(), list(CODES), n=1)
        raise ConfigError(
            "E_USAGE", where="explain", found=code, wanted="a code", fix=f"did you mean {close[0]}?" if close else ""
        )
    text = explain(code)
    outside = f"the coordinator sees   {text.wire}" if code not in ("INTERNAL",) else ""
    return "\n".join(
        filter(
            None,
            [
                f"{code}  {text.title}",
                f"why      {text.why}",
                f"wanted   {text.wanted}",
                f"fix      {text.fix}",
                outside,
            ],
        )
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain aligned table: readable in a terminal, a log and a ticket."""
    cells = [[str(c) for c in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


@contextlib.contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Yield `advance(done=1, text="")`: a bar on a terminal, else a line per tenth of the work or ten seconds."""
    if options().quiet:
        yield _silent
    elif sys.stderr.isatty():
        with _bar(title, total) as advance:
            yield advance
    else:
        yield _line_reporter(title, total)


@contextlib.contextmanager
def _bar(title: str, total: int | None) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True, no_color=not options().color)) as bar:
        task = bar.add_task(title, total=total, text="")

        def advance(done: int = 1, text: str = "") -> None:
            bar.update(task, advance=done)
            if text:
                bar.update(task, text=text)

        yield advance


def _silent(done: int = 1, text: str = "") -> None:
    del done, text


def _line_reporter(title: str, total: int | None) -> Callable[..., None]:
    state = {"done": 0, "shown": 0, "at": time.monotonic()}
    step = max(1, (total or 0) // 10)

    def advance(done: int = 1, text: str = "") -> None:
        state["done"] += done
        due = state["done"] - state["shown"] >= step if total else False
        if due or state["done"] == total or time.monotonic() - state["at"] > 10:
            state["shown"], state["at"] = state["done"], time.monotonic()
            of = f"/{total}" if total else ""
            note(f"{title}: {state['done']}{of} {text}".rstrip())

    return advance


def _finish(outcome: Any) -> int:
    if not isinstance(outcome, Result):
        return int(outcome) if isinstance(outcome, int) else EXIT_OK
    if options().json:
        print(
            json.dumps({"ok": outcome.exit_code == EXIT_OK, **outcome.data}, default=str, allow_nan=False), flush=True
        )
    else:
        for line in outcome.lines:
            print(line, flush=True)
    return outcome.exit_code


def _fail(error: FourdvqError, exit_code: int) -> int:
    if options().verbose:
        traceback.print_exc()
    if options().json:
        print(json.dumps(error.as_dict(), allow_nan=False), flush=True)
    else:
        print(format_error(error), file=sys.stderr, flush=True)
    return exit_code
