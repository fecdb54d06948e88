"""Ctrl-C and SIGTERM at any moment of a command: its exit code, one word of ours, nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 75)]

# The command tells when it has begun to load, and waits there for what comes.
SLOW_TO_LOAD = """
import sys, time
from fourdvq import console
with console.loading("prog"):
    print("loading", file=sys.stderr, flush=True)
    time.sleep(30)
"""
AT_WORK = """
import sys, time, typer
from fourdvq import console
app = typer.Typer()
@app.command()
def work() -> console.Result:
    print("at work", file=sys.stderr, flush=True)
    time.sleep(30)
    return console.Result()
sys.exit(console.run(app, sys.argv[1:], "prog"))
"""


def listening(command: list[str]) -> subprocess.Popen[bytes]:
    """A command in a session of its own; a shell in the background ignores Ctrl-C and would hand that on."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("program", [SLOW_TO_LOAD, AT_WORK])
@pytest.mark.parametrize(("number", "exit_code"), ENDS)
def test_a_command_that_is_stopped_while_it_loads_or_works_ends_with_its_code_and_one_object(
    program, number, exit_code
):
    process = listening([sys.executable, "-c", program, "--json"])
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == exit_code
    error = json.loads(out)
    assert (error["code"], error["found"]) == ("E_INTERRUPTED", number.name)
    assert b"Traceback" not in err


@pytest.mark.parametrize(("number", "exit_code"), ENDS)
@pytest.mark.parametrize("program", ["fourdvq-client", "fourdvq-server"])
def test_both_commands_load_that_way(program, number, exit_code):
    slow = (  # an import that waits stands for a slow disk
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.endswith('.verbs'):\n"
        "            print('loading', file=sys.stderr, flush=True); time.sleep(30)\n"
        "sys.meta_path.insert(0, Slow())\n"
        f"import {program.replace('-', '_')}.cli\n"
    )
    process = listening([sys.executable, "-c", slow])
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert b"E_INTERRUPTED" in err
    assert b"Traceback" not in err


def members(group: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no list of processes here")
@pytest.mark.parametrize(("number", "exit_code"), ENDS)
@pytest.mark.parametrize("wait_s", [0.0, 1.5])
def test_a_phantom_that_is_stopped_leaves_no_worker_and_no_traceback(tmp_path, number, exit_code, wait_s):
    words = ["phantom", "--out", str(tmp_path / "made"), "--patients", "40", "--size", "48,96,96", "--workers", "2"]
    process = listening([str(BIN / "fourdvq-client"), *words])
    deadline = time.monotonic() + 60
    while len(members(process.pid)) < 4 and time.monotonic() < deadline:  # itself, two workers, and their tracker
        time.sleep(0.01)
    time.sleep(wait_s)
    os.killpg(process.pid, number)  # as a terminal and a batch system do it
    _, err = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert b"E_INTERRUPTED" in err
    assert b"Traceback" not in err
    while members(process.pid) and time.monotonic() < deadline:  # the tracker ends a moment after the last of them
        time.sleep(0.01)
    assert members(process.pid) == []
    assert not (tmp_path / "made" / "clinical.csv").exists()
