"""What both commands do at the terminal, through a small application of our own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

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


PATIENT = "LEU-004217"


@app.command()
def meets(number: int, path: str = "") -> console.Result:
    raise OSError(number, os.strerror(number), path or None)


@pytest.mark.parametrize(
    ("number", "code", "exit_code"),
    [
        *[(number, "DISK_FULL", 75) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)],
        *[(n, "E_STORAGE", 75) for n in (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT)],
        *[(number, "E_RIGHTS", 1) for number in (errno.EACCES, errno.EPERM)],
        (errno.EBADF, "E_INTERNAL", 1),
    ],
)
def test_what_the_system_refuses_has_its_code_and_no_path_of_the_hospital(capsys, tmp_path, number, code, exit_code):
    path = tmp_path / "scans" / PATIENT / "CT1.nii.gz"
    found, out, _ = call(capsys, "meets", str(number), "--path", str(path), "--json", "--workdir", str(tmp_path))
    error = json.loads(out)
    assert (found, error["code"]) == (exit_code, code)
    assert PATIENT not in out
    assert os.strerror(number) in error["found"]
    assert error["fix"]


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("prep/manifest.csv", "prep/manifest.csv"),
        ("prep/.tmp-17-manifest.csv", "prep"),
        (f"prep/export/{PATIENT}/CT1.nii.gz", "prep/export"),
        (f"{PATIENT}/CT1.nii.gz", "a file outside the working folder"),
        ("../elsewhere", "a file outside the working folder"),
        ("", "the working folder"),
    ],
)
def test_a_place_in_the_working_folder_is_told_by_our_name_for_it(capsys, tmp_path, path, where):
    there = str((tmp_path / path).resolve()) if path else ""
    _, out, _ = call(capsys, "meets", str(errno.EACCES), "--path", there, "--json", "--workdir", str(tmp_path))
    assert json.loads(out)["where"] == where


@pytest.mark.parametrize("words", [("--json",), ("--json", "--workdir"), ("--workdir", "--json")])
def test_with_json_a_call_without_a_verb_or_a_folder_is_one_object_too(capsys, words):
    code, out, _ = call(capsys, *words)
    assert (code, json.loads(out)["code"]) == (2, "E_USAGE")


SMALL_PROGRAM = (
    "import sys, typer; from fourdvq import console; app = typer.Typer()\n"
    "@app.command()\n"
    "def short() -> console.Result:\n"
    "    return console.Result({}, ('line',))\n"
    "sys.exit(console.run(app, sys.argv[1:], 'prog'))\n"
)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", [(), ("--json",), ("--unknown",), ("--unknown", "--json")])
@pytest.mark.parametrize("both", [False, True])
def test_an_answer_that_cannot_be_written_ends_with_a_code_and_without_a_traceback(words, both):
    with Path("/dev/full").open("w") as full:
        said = full if both else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", SMALL_PROGRAM, *words], stdout=full, stderr=said, timeout=60)
    # What goes wrong with the options is told on standard error, which is not full here.
    written_elsewhere = words == ("--unknown",) and not both
    assert done.returncode == (2 if written_elsewhere else 75)
    assert both or b"Traceback" not in done.stderr
    assert both or written_elsewhere or b"DISK_FULL" in done.stderr


def test_a_closed_standard_output_is_no_error():
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, SMALL_PROGRAM], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
