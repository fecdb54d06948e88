"""What both commands do at the terminal, through a small application of our own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer

from fourdvq import console
from fourdvq.errors import ConfigError

app = typer.Typer()


@app.command()
def done(name: str = "") -> console.Result:
    return console.Result({"name": name, "workdir": str(console.options().workdir)}, ("finished",))


@app.command()
def refused() -> console.Result:
    raise ConfigError("E_KEY", where="plan.lr", found="'lrr'")


@app.command()
def broken() -> console.Result:
    raise RuntimeError("a secret place")


@app.command()
def stopped() -> console.Result:
    raise KeyboardInterrupt


def call(capsys, *argv: str) -> tuple[int, str, str]:
    code = console.run(app, list(argv), "prog")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("verb", "code", "exit_code"),
    [("refused", "E_KEY", 2), ("stopped", "E_INTERRUPTED", 130), ("broken", "E_INTERNAL", 1)],
)
def test_an_error_of_any_kind_is_a_code_with_its_next_step_and_never_a_traceback(capsys, verb, code, exit_code):
    found, out, err = call(capsys, verb)
    assert found == exit_code
    assert out == ""
    assert code in err
    assert "fix" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("verb", "code"), [("refused", "E_KEY"), ("stopped", "E_INTERRUPTED"), ("broken", "E_INTERNAL")]
)
def test_with_json_an_error_is_one_object_on_standard_output(capsys, verb, code):
    _, out, _ = call(capsys, verb, "--json")
    assert json.loads(out)["code"] == code


def test_verbose_shows_the_traceback(capsys):
    assert "Traceback" in call(capsys, "-v", "broken")[2]


def test_global_options_are_taken_before_and_after_the_verb(capsys):
    before = call(capsys, "--json", "--workdir", "x", "done", "--name", "a")
    after = call(capsys, "done", "--name", "a", "--workdir=x", "--json")
    assert before == after
    assert json.loads(before[1]) == {"ok": True, "name": "a", "workdir": "x"}


def test_what_stands_behind_a_bare_double_dash_is_left_alone():
    options, rest = console.split_options(["done", "--", "--json"])
    assert not options.json
    assert rest == ["done", "--", "--json"]


def test_a_misspelt_verb_is_a_usage_error_that_names_the_nearest(capsys):
    found, _, err = call(capsys, "dome")
    assert found == 2
    assert "done" in err


def test_progress_without_a_terminal_is_a_few_lines_on_standard_error(capsys):
    with console.progress("scans", 100) as advance:
        for _ in range(100):
            advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 5 <= len(captured.err.splitlines()) <= 12
    assert captured.err.splitlines()[-1].startswith("scans: 100/100")


def test_a_reader_that_goes_away_ends_a_long_answer_without_a_word():
    program = (
        "import sys, typer; from fourdvq import console; app = typer.Typer()\n"
        "@app.command()\n"
        "def long() -> console.Result:\n"
        "    return console.Result({}, tuple('line' for _ in range(200_000)))\n"
        "sys.exit(console.run(app, [], 'prog'))\n"
    )
    talker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert talker.stdout is not None
    assert talker.stdout.readline() == b"line\n"
    talker.stdout.close()
    _, said = talker.communicate(timeout=60)
    assert (talker.returncode, said) == (0, b"")
