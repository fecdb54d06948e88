"""The command line of a site: fast help, one JSON object, the right exit code and a remedy for each wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fourdvq import console
from fourdvq.error_codes import CODES
from fourdvq_client.cli import GROUPS, VERBS, app

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    *VERBS,
    *(f"{group} {command.name}" for group, part in GROUPS.items() for command in part.registered_commands),
]


def run(*words, cwd, capsys=None):
    """Exit code, standard output and standard error of one call, in this process."""
    code = console.run(app, [*words, "--workdir", str(cwd)], "fourdvq-client")
    out = capsys.readouterr()
    return code, out.out, out.err


def last_object(out):
    found = json.loads(out.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_help_needs_no_torch_and_comes_within_a_second():
    program = (
        "import sys, time; t = time.process_time()\n"
        "from fourdvq_client.cli import app\nfrom fourdvq import console\n"
        "code = console.run(app, ['--help'], 'fourdvq-client')\n"
        "heavy = {'torch', 'flwr', 'monai', 'SimpleITK', 'pandas', 'omegaconf', 'scipy'} & set(sys.modules)\n"
        "print(code, sorted(heavy), time.process_time() - t, file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - started)
        code, heavy = done.stderr.split(" ", 1)
        assert code == "0"
        assert heavy.startswith("[]"), heavy
    assert float(done.stderr.split()[-1]) < 1.0  # CPU seconds: a loaded machine must not fail this
    assert min(seconds) < 5.0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_names_the_global_options(command, capsys):
    assert console.run(app, [*command.split(), "--help"], "fourdvq-client") == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert len(text.splitlines()) > 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_reference_page(command):
    page = (ROOT / "docs" / "reference" / "client-cli.md").read_text(encoding="utf-8")
    assert f"`{command}" in page


@pytest.mark.parametrize("words", [["version"], ["explain", "E_GAP"], ["--version"]])
def test_commands_without_a_site_print_one_json_object_last(words, tmp_path, capsys):
    code, out, _ = run(*words, "--json", cwd=tmp_path, capsys=capsys)
    assert code == 0
    assert last_object(out)["ok"] is True


NEED_A_SITE = [c for c in COMMANDS if c not in ("init", "version", "explain", "phantom", "pull", "check", "approve")]


@pytest.mark.parametrize("command", NEED_A_SITE)
def test_outside_a_site_folder_every_command_says_so_and_exits_2(command, tmp_path, capsys):
    code, out, _ = run(*command.split(), "--json", cwd=tmp_path, capsys=capsys)
    error = last_object(out)
    assert (code, error["code"]) == (2, "E_NOT_A_SITE") or (command == "generate" and error["code"] == "E_USAGE")
    assert error["fix"]
    assert code == 2


def test_the_doctor_outside_a_site_folder_says_so_in_its_table(tmp_path, capsys):
    code, out, _ = run("check", "--json", cwd=tmp_path, capsys=capsys)
    assert code == 2
    assert last_object(out)["checks"][0]["code"] == "E_NOT_A_SITE"


@pytest.mark.parametrize("words", [["scann"], ["scan", "--fast"], ["qc", "aprove"], ["explain"], ["explain", "E_GAPP"]])
def test_a_wrong_word_exits_2_with_what_was_meant(words, tmp_path, capsys):
    code, _, err = run(*words, cwd=tmp_path, capsys=capsys)
    assert code in (1, 2)
    assert err.startswith("E_USAGE")
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [[], ["qc"]])
def test_a_command_without_a_verb_is_a_usage_error_to_a_program_and_help_to_a_person(words, tmp_path, capsys):
    code, out, _ = run(*words, "--json", cwd=tmp_path, capsys=capsys)
    error = last_object(out)
    assert (code, error["code"], error["fix"]) == (2, "E_USAGE", " ".join(["fourdvq-client", *words, "--help"]))
    code, out, err = run(*words, cwd=tmp_path, capsys=capsys)
    assert (code, err) == (2, "")
    assert "Usage: fourdvq-client" in out


@pytest.mark.parametrize("code", sorted(CODES))
def test_explain_has_every_part_of_every_code(code, capsys, tmp_path):
    status, out, _ = run("explain", code, cwd=tmp_path, capsys=capsys)
    assert status == 0
    for label in ("why", "wanted", "fix"):
        line = next(text for text in out.splitlines() if text.startswith(label))
        assert len(line.split(maxsplit=1)[1]) > 3


def test_telemetry_of_other_packages_is_off_before_they_are_imported():
    names = "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"
    program = f"import fourdvq_client.cli, os; print(*(os.environ[n] for n in {names!r}))"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR", "MLFLOW"))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.split() == ["0", "1"]


def test_a_phantom_has_the_size_and_number_asked_for_and_bad_sizes_exit_2(tmp_path, capsys):
    words = [
        "phantom",
        "--out",
        str(tmp_path / "p"),
        "--patients",
        "1",
        "--size",
        "16,24,24",
        "--scans",
        "2,2",
        "--json",
    ]
    code, out, _ = run(*words, cwd=tmp_path, capsys=capsys)
    assert (code, last_object(out)["scans"]) == (0, 2)
    assert len(list((tmp_path / "p" / "scans").rglob("*_lung.nii.gz"))) == 2
    code, out, _ = run("phantom", "--out", str(tmp_path / "q"), "--size", "big", "--json", cwd=tmp_path, capsys=capsys)
    assert (code, last_object(out)["code"]) == (2, "E_USAGE")


def test_init_makes_a_site_once(tmp_path, capsys):
    words = ["init", "--site", "leuven", "--template", "demo", "--json"]
    code, out, _ = run(*words, cwd=tmp_path / "s", capsys=capsys)
    assert code == 0
    assert last_object(out)["fingerprint"].startswith("SHA256:")
    code, out, _ = run(*words, cwd=tmp_path / "s", capsys=capsys)
    assert (code, last_object(out)["code"]) == (2, "E_EXISTS")


def test_init_from_a_damaged_invitation_is_refused_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "bad.json").write_text('{"federation": "ipf"}')
    code, out, _ = run("init", str(tmp_path / "bad.json"), "--json", cwd=tmp_path / "s", capsys=capsys)
    assert (code, last_object(out)["code"]) == (5, "E_INVITE")
    assert not (tmp_path / "s" / "site.yaml").exists()


def test_the_page_of_what_leaves_is_the_message_schema():
    from fourdvq_client.what_leaves import page

    path = ROOT / "docs" / "explanation" / "what-leaves-the-hospital.md"
    assert path.read_text(encoding="utf-8") == page()
