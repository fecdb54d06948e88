"""The coordinator's command: each verb answers people in lines and programs in one JSON object."""

from __future__ import annotations

import csv
import hashlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator_runs import NO_SURVIVAL, experiment, grid_of, run, stages_until, three_sites
from fourdvq import console
from fourdvq_server.app import RunOptions, allow_to_run, new_run, run_experiment
from fourdvq_server.bundle import read_bundle
from fourdvq_server.cli import VERBS, app
from fourdvq_server.project import Project
from fourdvq_server.revalidate import Question, put_question

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "server-cli.md"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A coordinator folder with two finished runs of unlike seeds."""
    project = Project(tmp_path_factory.mktemp("coordinator"))
    for name, overrides in (("a", ()), ("b", ("seed=5",))):
        new_run(project, experiment("federation.rounds=1", "federation.ode_rounds=1", *overrides), name=name)
        with grid_of(three_sites()) as grid:
            run_experiment(grid, project, name, RunOptions(approval_wait_s=1.0, stages=NO_SURVIVAL))
    return project


@pytest.fixture
def call(project, capsys):
    """Run a verb with --json in the project; returns its exit code and object."""

    def invoke(*argv: str) -> tuple[int, dict]:
        code = console.run(app, [*argv, "--json", "--workdir", str(project.root)], "fourdvq-server")
        out = capsys.readouterr().out
        return code, json.loads(out.splitlines()[-1])

    return invoke


def test_help_answers_without_torch_in_less_than_a_second_of_cpu():
    program = "import sys\nfrom fourdvq_server.cli import app\nfrom fourdvq.console import run\n"
    program += "code = run(app, ['--help'], 'fourdvq-server')\n"
    program += "print('HEAVY', [m for m in ('torch', 'mlflow', 'flwr', 'hydra') if m in sys.modules])\nsys.exit(code)\n"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "HEAVY []" in done.stdout
    assert after.ru_utime - before.ru_utime < 1.0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_a_place_in_the_reference(verb, capsys):
    assert (VERBS[verb].__doc__ or "").strip()
    assert console.run(app, [verb, "--help"], "fourdvq-server") == 0
    assert capsys.readouterr().out
    assert f"`{verb}" in DOCS.read_text(encoding="utf-8")


def test_phoning_home_is_off_before_anything_is_imported():
    program = "import fourdvq_server.cli, os\nprint(os.environ['FLWR_TELEMETRY_ENABLED'], "
    program += "os.environ['FLWR_DISABLE_UPDATE_CHECK'], os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "true"]


def test_experiments_lists_the_presets(call):
    code, data = call("experiments")
    assert code == 0
    assert {"paper", "fast", "tiny", "demo"} <= {e["name"] for e in data["experiments"]}


def test_plan_writes_what_is_hashed(call, tmp_path):
    code, data = call("plan", "experiment=tiny", "seed=4", "-o", str(tmp_path / "plan.json"))
    assert code == 0
    assert hashlib.sha256((tmp_path / "plan.json").read_bytes()).hexdigest() == data["sha256"]
    assert data["plan"]["seed"] == 4


def test_show_config_says_where_a_value_comes_from(call):
    _, data = call("show-config", "experiment=tiny", "seed=4")
    origin = {s["key"]: s["from"] for s in data["settings"]}
    assert origin["seed"] == "command line"
    assert origin["model.base_width"] == "preset"
    assert origin["vqgan.l1_weight"] == "default"


def test_a_wrong_key_exits_with_2_and_says_where(call):
    code, data = call("plan", "experiment=tiny", "+federation.cookies=1")
    assert code == 2
    assert (data["ok"], data["code"], data["where"]) == (False, "E_KEY", "plan.federation.cookies")


def test_status_without_a_name_is_the_newest_run(call):
    code, data = call("status")
    assert code == 0
    assert (data["run"], data["state"]) == ("b", "done")
    assert data["sites"]["external"]["role"] == "external"


def test_an_unknown_run_names_the_ones_there_are(call):
    code, data = call("status", "c")
    assert code == 2
    assert (data["code"], data["wanted"]) == ("E_RUN", "a, b")


def test_logs_and_watch_tell_what_happened(call):
    _, logs = call("logs", "a", "--last", "0")
    assert any("frozen: round 1" in e["text"] for e in logs["events"])
    code, data = call("watch", "a")
    assert (code, data["state"]) == (0, "done")


def test_pause_stop_and_off_are_written_where_the_run_looks(call, project):
    assert call("pause", "a")[1]["pause"]
    assert call("stop", "a")[1] == {"ok": True, "run": "a", "pause": True, "stop": True}
    assert not call("pause", "a", "--off")[1]["pause"]
    assert allow_to_run(project, "a").control.stop is False


def test_compare_shows_settings_that_differ_and_scores_side_by_side(call):
    _, data = call("compare", "a", "b")
    assert data["settings"] == [["seed", "0", "5"]]
    assert {r["row"] for r in data["scores"]} >= {"model", "persistence", "ceiling"}


def test_report_is_one_page_without_outside_links(call):
    _, data = call("report", "a")
    page = Path(data["path"]).read_text(encoding="utf-8")
    assert "southampton" in page
    assert "copy of the last scan" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page


def test_export_is_checked_by_its_own_sums_and_its_scores_can_be_read_back(call, tmp_path):
    out = tmp_path / "out"
    code, _ = call("export", "a", "-o", str(out))
    assert code == 0
    for line in (out / "SHA256SUMS").read_text().splitlines():
        sha256, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == sha256
    with (out / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = [r for r in rows if (r["group"], r["row"], r["metric"]) == ("external", "model", "extrapolation/mse/lung")]
    assert len(found) == 1
    assert float(found[0]["low"]) < float(found[0]["mean"]) < float(found[0]["high"])
    assert call("export", "a", "-o", str(out))[1]["code"] == "E_EXISTS"


def test_release_writes_the_same_weights_that_the_sites_received(call, project):
    code, data = call("release", "a")
    assert code == 0
    weights, card = read_bundle(Path(data["folder"]))
    sent = json.loads((project.runs / "a" / "stages" / "release" / "result.json").read_text())["facts"]
    assert card["weights_sha256"] == sent["weights_sha256"]
    assert sorted(sent["received_by"]) == ["external", "leuven", "southampton"]
    assert {name.split(".")[0] for name in weights} == {"vqgan", "codebook", "ode"}


def test_a_release_with_a_changed_byte_is_refused(call):
    _, data = call("release", "b")
    path = Path(data["folder"]) / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(Exception, match="E_RELEASE"):
        read_bundle(Path(data["folder"]))


def test_another_round_than_the_frozen_one_cannot_be_released(call):
    code, data = call("release", "a", "--round", "7")
    assert (code, data["code"]) == (2, "E_UNSUPPORTED")


def test_a_question_for_one_site_is_asked_instead_of_the_run(project):
    store = allow_to_run(project, "a")
    put_question(store, Question(round=1, sites=("external",)))
    sites = three_sites()
    with grid_of(sites) as grid:
        result = run_experiment(grid, project, "a", RunOptions(approval_wait_s=1.0))
    assert set(result["sites"]) == {"external"}
    assert sites["external"].asked.count("evaluate.reconstruction") == 1
    assert "evaluate.reconstruction" not in sites["leuven"].asked
    assert (store.folder / "validations" / "0001.json").is_file()


def test_the_page_of_mlflow_is_served_to_this_machine_only(call, project):
    assert call("ui", "--print-only")[1]["code"] == "E_FILE"
    project.mlflow_db.touch()
    _, data = call("ui", "--print-only", "--port", "5050")
    project.mlflow_db.unlink()
    assert "--host 127.0.0.1 --port 5050" in data["command"]
    assert "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in data["command"]


def test_check_reports_each_question_and_fails_outside_a_project(call):
    code, data = call("check")
    states = {c["name"]: c["state"] for c in data["checks"]}
    assert states["packages"] == "PASS"
    assert states["folder"] == "FAIL"
    assert code == 2


def test_version_and_explain(call):
    _, data = call("version")
    assert len(data["packages"]["fourdvq"]) == 64
    _, data = call("explain", "E_QUORUM")
    assert data["fix"]
    assert call("explain", "E_QUORUN")[1]["fix"] == "did you mean E_QUORUM?"


def test_a_folder_that_is_no_project_is_refused(tmp_path, capsys):
    code = console.run(app, ["status", "--json", "--workdir", str(tmp_path)], "fourdvq-server")
    assert code == 2
    assert json.loads(capsys.readouterr().out)["code"] == "E_NOT_A_PROJECT"


def test_a_run_can_end_after_any_stage(tmp_path):
    summary, _ = run(tmp_path, three_sites(), until="codebook_init")
    assert list(summary["stages"]) == [s.name for s in stages_until("codebook_init")]
