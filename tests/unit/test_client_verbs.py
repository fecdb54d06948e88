"""The verbs on real folders: preparation, decisions, models, reports, and what people get wrong."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client_calls import call
from fourdvq.data.files import file_sha256
from fourdvq.tensors import payload_sha256
from fourdvq_client import embedded
from fourdvq_client.preparation import pseudonym_of, real_ids
from fourdvq_client.released import SUMS
from fourdvq_client.runtime import store_plan
from fourdvq_client.workspace import open_workspace, read_profile
from site_cases import PATIENTS, give_model, hospital, new_site, prepared_site, tiny_plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def root(tmp_path):
    return prepared_site(tmp_path / "site")


# --- tables and preparation --------------------------------------------------------------------------------------


def test_preparation_writes_real_ids_to_private_files_only(root):
    workspace, _ = open_workspace(root)
    assert sorted(real_ids(workspace).values()) == sorted(PATIENTS)
    for path in (workspace.secret, workspace.patients, workspace.findings):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in (p for p in root.rglob("*") if p.is_file() and p != workspace.patients and p != workspace.findings):
        assert not [i for i in PATIENTS if i.encode() in path.read_bytes()], path
    prepared = {p.name for p in workspace.prep.iterdir() if p.is_dir()}
    assert prepared == set(real_ids(workspace))


def test_a_second_preparation_finds_nothing_to_do_and_moves_nobody(root):
    before = (root / "prep" / "splits.csv").read_bytes()
    code, found, _ = call(root, "preprocess", "--workers", "1")
    assert (code, found["reused"], found["scans"]) == (0, 18, 18)
    assert (root / "prep" / "splits.csv").read_bytes() == before


def test_a_patient_is_found_by_pseudonym_or_hospital_id_and_a_slip_is_suggested_by_pseudonym(root):
    workspace, _ = open_workspace(root)
    name = pseudonym_of(workspace, PATIENTS[0])
    assert pseudonym_of(workspace, name) == name
    code, error, _ = call(root, "qc", "approve", "LEU-00421O")
    assert (code, error["code"]) == (3, "E_PATIENT")
    assert any(f"did you mean {pseudonym}?" in error["fix"] for pseudonym in real_ids(workspace))
    assert not any(patient in json.dumps(error) for patient in PATIENTS)


def test_a_patient_who_leaves_the_tables_leaves_training_and_may_come_back(tmp_path):
    root = prepared_site(tmp_path / "site")
    data = hospital(tmp_path / "data")
    text = (root / "site.yaml").read_text()
    old = next(line for line in text.splitlines() if line.startswith("scans:")).split('"')[1]
    (root / "site.yaml").write_text(text.replace(old, str(data)))
    full = (data / "clinical.csv").read_text()
    (data / "clinical.csv").write_text("\n".join(full.splitlines()[:-1]) + "\n")
    call(root, "preprocess", "--workers", "1")
    assert embedded.prepared_summary(root)["patients"] == 5
    (data / "clinical.csv").write_text(full)
    code, found, _ = call(root, "preprocess", "--workers", "1")
    assert (code, found["patients"], found["reused"]) == (0, 6, 18)
    assert embedded.prepared_summary(root)["patients"] == 6


@pytest.fixture
def fresh(tmp_path):
    """A hospital with two patients that was not prepared yet: (site folder, data folder)."""
    data = hospital(tmp_path / "data", patients=PATIENTS[:2], scans=2)
    return new_site(tmp_path / "site", data), data


def change_row(path, row, column, value):
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    rows[row][column] = value
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_scan_is_clean_for_clean_tables(fresh):
    code, found, _ = call(fresh[0], "scan")
    assert (code, found["usable"], found["scans"], found["blocking"]) == (0, 2, 4, 0)


@pytest.mark.parametrize(
    ("table", "row", "column", "value", "code"),
    [
        ("clinical.csv", 0, "time_days", "-5", "E_TIME"),
        ("clinical.csv", 0, "age", "seventeen", "E_AGE"),
        ("clinical.csv", 0, "event", "unknown word", "E_WORD"),
        ("clinical.csv", 0, "patient_id", "LEU-00421X", "E_ID"),
        ("scans.csv", 0, "patient_id", "LEU-00421X", "E_ID"),
        ("scans.csv", 0, "path", "scans/nowhere.nii.gz", "E_FILE"),
    ],
)
def test_a_wrong_row_is_a_finding_with_place_and_remedy_and_exit_3(fresh, table, row, column, value, code):
    root, data = fresh
    change_row(data / table, row, column, value)
    exit_code, found, _ = call(root, "scan")
    assert exit_code == 3
    mine = [f for f in found["findings"] if f["code"] == code]
    assert mine
    assert all(f["where"] and f["fix"] for f in mine)
    assert (root / "findings.csv").read_text().count(code) == len(mine)


def test_a_missing_or_empty_scan_folder_and_a_missing_table_are_named(fresh):
    root, data = fresh
    shutil.move(data / "scans", data / "elsewhere")
    code, found, _ = call(root, "preprocess")
    assert (code, found["code"]) == (3, "E_FEW")  # every row points to nothing
    (data / "clinical.csv").unlink()
    code, found, _ = call(root, "preprocess")
    assert (code, found["code"]) == (3, "E_FILE")
    text = (root / "site.yaml").read_text().replace(str(data), "/nowhere")
    (root / "site.yaml").write_text(text)
    code, found, _ = call(root, "scan")
    assert (code, found["code"]) == (3, "E_FOLDER")


def test_a_truncated_scan_and_one_without_lung_are_refused_and_the_others_go_on(fresh):
    root, data = fresh
    import numpy as np

    from fourdvq.data.volume import Volume, read_volume, write_nifti

    first = data / "scans" / PATIENTS[0] / "1.nii.gz"
    first.write_bytes(first.read_bytes()[:2000])
    mask = data / "scans" / PATIENTS[1] / "1_lung.nii.gz"
    volume = read_volume(data / "scans" / PATIENTS[1] / "1.nii.gz")
    empty = Volume(np.zeros(volume.hu.shape, np.uint8), volume.spacing, volume.origin, volume.direction)
    write_nifti(empty, mask)
    code, found, _ = call(root, "preprocess", "--workers", "1")
    assert code == 3
    assert found["by_status"] == {"ok": 2, "refused": 2} or found["by_status"].get("refused") == 2
    assert len(found["by_code"]) >= 2
    assert not [i for i in PATIENTS if i in json.dumps(found["by_code"])]


def test_another_client_in_the_folder_is_waited_for_with_exit_75(root):
    from fourdvq_client.workspace import locked

    with locked(open_workspace(root)[0]):
        code, error, _ = call(root, "preprocess")
    assert (code, error["code"]) == (75, "E_BUSY")
    assert "process" in error["found"]


# --- decisions ---------------------------------------------------------------------------------------------------


def test_decisions_are_recorded_with_a_name_and_training_reads_approved_scans_only(root):
    name = pseudonym_of(open_workspace(root)[0], PATIENTS[0])
    code, found, _ = call(root, "qc", "reject", f"{name}/2", "--reason", "motion", "--by", "Dr Ann")
    assert (code, found["rejected"]) == (0, 1)
    assert embedded.prepared_summary(root)["scans"] == 17
    assert "Dr Ann" in (root / "prep" / "review.csv").read_text()
    call(root, "qc", "approve", f"{name}/2", "--by", "Dr Ann")
    assert embedded.prepared_summary(root)["scans"] == 18
    code, found, _ = call(root, "qc", "list")
    assert (len(found["scans"]), found["undecided"]) == (18, 0)
    code, error, _ = call(root, "qc", "approve")
    assert (code, error["code"]) == (2, "E_USAGE")


def decisions(root):
    return {f"{s['pseudonym']}/{s['index']}": s["decision"] for s in call(root, "qc", "list")[1]["scans"]}


@pytest.mark.parametrize("many", ["--all", "--passed", PATIENTS[0]])
def test_approving_many_at_once_takes_no_rejection_back_and_says_so(root, many):
    name = pseudonym_of(open_workspace(root)[0], PATIENTS[0])
    call(root, "qc", "reject", f"{name}/2", "--reason", "motion", "--by", "Dr Ann")
    code, found, _ = call(root, "qc", "approve", many, "--by", "Dr Ann")
    assert (code, found["approved"], found["left_rejected"]) == (0, 0, 1)  # all others were approved before
    assert decisions(root)[f"{name}/2"] == "reject"
    code, found, _ = call(root, "qc", "approve", f"{name}/2", f"{name}/2", "--by", "Dr Ann")
    assert (code, found["approved"], found["left_rejected"]) == (0, 1, 0)
    assert decisions(root)[f"{name}/2"] == "approve"


@pytest.mark.parametrize("words", [(PATIENTS[0], "--all"), (f"{PATIENTS[0]}/0", "--passed"), ("--all", "--passed"), ()])
def test_scans_are_chosen_in_one_way_or_not_at_all(root, words):
    before = (root / "prep" / "review.csv").read_bytes()
    code, error, _ = call(root, "qc", "approve", *words)
    assert (code, error["code"]) == (2, "E_USAGE")
    assert (root / "prep" / "review.csv").read_bytes() == before


def test_grades_and_codes_are_found_in_any_case_and_unknown_ones_are_no_empty_list(root):
    every = call(root, "qc", "list")[1]["scans"]
    for option, column in (("--grade", "grade"), ("--code", "code")):
        known = next((s[column] for s in every if s[column]), "V_REG")
        found = [call(root, "qc", "list", option, word)[1]["scans"] for word in (known, known.lower())]
        assert found == [[s for s in every if s[column] == known]] * 2
        code, error, _ = call(root, "qc", "list", option, known + "x")
        assert (code, error["code"], error["fix"]) == (2, "E_USAGE", f"did you mean {known}?")


def test_the_contact_sheet_is_one_file_without_links_to_anywhere(root):
    assert call(root, "qc", "open")[0] == 0
    page = (root / "prep" / "contact_sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 18
    assert "://" not in page
    assert not [i for i in PATIENTS if i in page]


def test_a_volume_that_hardly_changed_is_shown_as_no_change_and_not_as_minus_zero(root):
    name = pseudonym_of(open_workspace(root)[0], PATIENTS[0])
    path = root / "prep" / name / "1" / "qc.json"
    numbers = json.loads(path.read_text())
    numbers["pair"]["volume_change_percent"] = -0.3
    path.write_text(json.dumps(numbers))
    sheet = root / "prep" / "contact_sheet.html"
    sheet.unlink()
    call(root, "qc", "open")
    row = next(line for line in sheet.read_text().splitlines() if f'data-name="{name}/1"' in line)
    assert "<td>0</td>" in row
    assert "<td>-0</td>" not in row


# --- plans -------------------------------------------------------------------------------------------------------


def test_approve_shows_what_changes_and_writes_name_plan_and_cohort(root):
    workspace, _ = open_workspace(root)
    store_plan(workspace, tiny_plan(), read_profile(workspace))
    code, found, _ = call(root, "approve", "--latest", "--show")
    assert (code, found["approved"], found["compared_with"]) == (0, False, "")
    code, found, _ = call(root, "approve", "--latest", "--by", "Dr Ann")
    assert (code, found["approved"]) == (0, True)
    later = tiny_plan(rounds=9)
    store_plan(workspace, later, read_profile(workspace))
    code, found, _ = call(root, "approve", later.hash[:8], "--show")
    assert [(d["key"], d["before"], d["after"]) for d in found["differences"]] == [("federation.rounds", 3, 9)]
    assert "Dr Ann" in (root / "policy.yaml").read_text()


def test_a_plan_of_another_profile_cannot_be_approved(root):
    workspace, _ = open_workspace(root)
    other = replace(tiny_plan(), profile_sha256="9" * 64)
    store_plan(workspace, other, read_profile(workspace))
    code, error, _ = call(root, "approve", "--latest")
    assert (code, error["code"]) == (5, "PROFILE_MISMATCH")
    code, error, _ = call(root, "approve")
    assert (code, error["code"]) == (2, "E_USAGE")


# --- models, scores, trajectories --------------------------------------------------------------------------------


def test_without_a_model_the_verbs_that_need_one_say_how_to_get_it(root):
    for words in (["evaluate"], ["report"], ["biomarkers"], ["generate", "--times", "1"]):
        code, error, _ = call(root, *words)
        assert (code, error["code"]) == (1, "E_RELEASE")
        assert "pull" in error["fix"]


def test_generated_scans_are_labelled_synthetic_and_lie_on_the_patients_grid(root):
    from fourdvq.data.volume import read_volume

    give_model(root)
    code, found, _ = call(root, "generate", "--patient", PATIENTS[1], "--times", "0.5:2:0.75")
    assert code == 0
    assert found["times"] == [0.5, 1.25, 2.0]
    assert "SYNTHETIC" in found["label"]
    volume = read_volume(Path(found["volumes"][0]))
    assert volume.hu.shape == (16, 32, 32)
    assert PATIENTS[1] not in json.dumps(found)


@pytest.mark.parametrize(
    ("words", "code", "exit_code"),
    [
        (["--interval", "1"], "E_USAGE", 2),
        (["--times", "1", "--years", "2"], "E_USAGE", 2),
        ([], "E_USAGE", 2),
        (["--times", "soon"], "E_TIMES", 3),
        (["--times", "-1"], "E_TIMES", 3),
        (["--interval", "0", "--years", "3"], "E_TIMES", 3),
        (["--times", "1", "--given", "1"], "E_GIVEN", 3),
        (["--times", "1", "--patient", "nobody"], "E_PATIENT", 3),
        (["--times", "1", "--model", "r9"], "E_RELEASE", 1),
    ],
)
def test_times_and_patients_that_cannot_be_used_are_named(root, words, code, exit_code):
    give_model(root)
    found_code, error, _ = call(root, "generate", *words)
    assert (found_code, error["code"]) == (exit_code, code)
    assert error["fix"]


def test_a_model_with_values_that_are_not_numbers_is_never_generated_from(root):
    give_model(root)
    folder = root / "models" / "r1"
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "weights.safetensors")
    weights["vqgan.pre_quantise.bias"][0] = torch.nan
    save_file(weights, folder / "weights.safetensors")
    code, error, _ = call(root, "generate", "--times", "1")
    assert (code, error["code"]) == (1, "E_RELEASE")  # its hash is not the listed one
    card = json.loads((folder / "card.json").read_text()) | {"weights_sha256": payload_sha256(weights)}
    (folder / "card.json").write_text(json.dumps(card))
    sums = "".join(f"{file_sha256(folder / n)}  {n}\n" for n in ("card.json", "plan.json", "weights.safetensors"))
    (folder / SUMS).write_text(sums)
    code, error, _ = call(root, "generate", "--times", "1")
    assert (code, error["code"]) == (1, "E_WEIGHTS")


def test_pull_takes_a_sound_bundle_and_no_other(root, tmp_path):
    give_model(root)
    shutil.copytree(root / "models" / "r1", tmp_path / "bundle")
    shutil.rmtree(root / "models")
    code, found, _ = call(root, "pull", "--import", str(tmp_path / "bundle"))
    assert (code, found["version"]) == (0, "r1")
    data = bytearray((tmp_path / "bundle" / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bundle" / "weights.safetensors").write_bytes(bytes(data))
    code, error, _ = call(root, "pull", "--import", str(tmp_path / "bundle"))
    assert (code, error["code"]) == (1, "E_RELEASE")
    code, error, _ = call(root, "pull", "--import", str(tmp_path / "nowhere"))
    assert (code, error["code"]) == (1, "E_RELEASE")
    assert (root / "models" / "r1" / "card.json").is_file()  # the sound one stays


def test_scores_report_and_submission_go_from_the_site_to_the_outbox_as_a_person_decides(root):
    give_model(root)
    code, found, _ = call(root, "evaluate")
    assert code == 0
    assert {s["row"] for s in found["sums"]} >= {"reconstruction", "model", "persistence"}
    code, found, _ = call(root, "report")
    share = json.loads(Path(found["files"]["share_json"]).read_text())
    assert share["edition"] == "share"
    code, found, _ = call(root, "submit", "--yes", "--by", "Dr Ann")
    assert code == 0
    assert json.loads((root / "state" / "outbox" / "report.json").read_text()) == share
    code, found, _ = call(root, "audit", "show")
    assert found["entries"][-1]["decision"] == "submitted by Dr Ann"
    leak = root / "leak.json"
    leak.write_text(json.dumps({**share, "note": f"see {PATIENTS[0]}"}))
    code, error, _ = call(root, "submit", str(leak), "--yes")
    assert (code, error["code"], error["found"]) == (5, "E_IDENTIFIER", "a patient")
    code, error, _ = call(root, "submit", found_local(root), "--yes")
    assert (code, error["code"]) == (2, "E_TYPE")


def found_local(root):
    return str(next(root.glob("reports/*/report.json")))


def test_biomarkers_are_shares_that_stay_here(root):
    give_model(root)
    code, found, _ = call(root, "biomarkers", "--top", "3")
    assert (code, found["patients"], found["codes"], len(found["top"])) == (0, 6, 8, 3)
    with (root / "reports" / "biomarkers.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        assert sum(float(row[f"code_{k}"]) for k in range(8)) == pytest.approx(1.0, abs=1e-6)
    assert stat.S_IMODE((root / "reports" / "biomarkers.csv").stat().st_mode) == 0o600


# --- policy, log, doctor, status ---------------------------------------------------------------------------------


def test_verbs_around_policy_and_log_answer_on_a_fresh_site(root):
    for words in (["policy", "show"], ["policy", "check"], ["audit", "verify"], ["audit", "what-left"], ["status"]):
        code, found, _ = call(root, *words)
        assert (code, found["ok"]) == (0, True), words
    code, found, _ = call(root, "show-config")
    assert found["settings"]["site"] == "leuven"
    code, found, _ = call(root, "watch", "--once")
    assert found["running"] is False


def test_a_policy_of_another_site_keeps_this_one_closed(root):
    (root / "policy.yaml").write_text((root / "policy.yaml").read_text().replace("site: leuven", "site: gent"))
    code, found, _ = call(root, "policy", "check")
    assert code == 5
    assert any(f["level"] == "FAIL" for f in found["findings"])
    from fourdvq.errors import Refused
    from fourdvq_client.runtime import open_site

    with pytest.raises(Refused, match="E_POLICY"):
        open_site(root)


def test_a_broken_log_exits_1_and_names_the_line(root):
    from fourdvq_client.audit import AuditLog, Entry
    from fourdvq_client.runtime import site_fingerprint

    workspace, _ = open_workspace(root)
    log = AuditLog(workspace.audit_file, site_fingerprint(workspace))
    for k in range(3):
        log.append(Entry("release", round=k))
    assert call(root, "audit", "verify", "--head", log.head)[0] == 0
    lines = workspace.audit_file.read_text().splitlines(keepends=True)
    workspace.audit_file.write_text(lines[0] + lines[2])
    code, found, _ = call(root, "audit", "verify")
    assert (code, found["first_bad"]) == (1, 1)


def test_the_doctor_passes_a_sound_site_and_names_each_problem(root):
    code, found, _ = call(root, "check", "--data")
    failed = [c for c in found["checks"] if c["status"] == "FAIL"]
    assert (code, failed) == (0, [])
    names = {c["name"] for c in found["checks"]}
    assert {"python", "torch", "policy.yaml", "site key", "audit log", "disk", "telemetry", "tables"} <= names
    (root / "keys").chmod(0o755)
    (root / "policy.yaml").chmod(0o666)
    (root / "site.yaml").write_text((root / "site.yaml").read_text() + "gpu: yes\n")
    code, found, _ = call(root, "check")
    problems = {c["name"]: c for c in found["checks"] if c["status"] == "FAIL"}
    assert set(problems) == {"site.yaml", "keys", "policy.yaml: rights"}
    assert all(c["fix"] for c in problems.values())
    assert code == 2  # that of the first


def test_the_doctor_goes_on_after_a_check_that_breaks_down(root):
    (root / "policy.yaml").write_text("schema: one")
    (root / "keys" / "site.key").unlink()
    code, found, _ = call(root, "check")
    failed = {c["code"] for c in found["checks"] if c["status"] == "FAIL"}
    assert code == 5
    assert {"E_POLICY", "E_KEY_FILE"} <= failed
    assert any(c["name"] == "profile" and c["status"] == "PASS" for c in found["checks"])


# --- embedded sites ----------------------------------------------------------------------------------------------


def test_pooled_sites_keep_their_splits_and_decisions(tmp_path):
    first = prepared_site(tmp_path / "a")
    second = new_site(
        tmp_path / "b", hospital(tmp_path / "data", patients=("SOU-1", "SOU-2"), scans=2), site="southampton"
    )
    embedded.preprocess(second, workers=2, decision="demo")
    embedded.merge_prepared(tmp_path / "pool", [first, second], "pooled")
    parts = [embedded.prepared_summary(root) for root in (first, second)]
    pooled = embedded.prepared_summary(tmp_path / "pool")
    assert pooled["scans"] == sum(p["scans"] for p in parts)
    for split in pooled["splits"]:
        assert pooled["splits"][split] == sum(p["splits"].get(split, 0) for p in parts)


def test_an_external_sites_patients_are_all_test_patients(tmp_path):
    data = hospital(tmp_path / "data", patients=("EXT-1", "EXT-2"), scans=2)
    root = new_site(tmp_path / "site", data, site="external", role="external")
    embedded.preprocess(root, workers=1, decision="demo")
    assert embedded.prepared_summary(root)["splits"] == {"test": 2}


def test_the_log_file_holds_pseudonyms_and_no_paths(root):
    from fourdvq_client.site_log import start_log

    workspace, _ = open_workspace(root)
    log = start_log(workspace)
    try:
        raise FileNotFoundError(2, "No such file", f"/data/ct/{PATIENTS[0]}/1.nii.gz")
    except FileNotFoundError:
        log.exception("reading %s failed", PATIENTS[0])
    text = (root / "logs" / "client.jsonl").read_text()
    line = json.loads(text.splitlines()[-1])
    assert PATIENTS[0] not in text
    assert "/data/ct" not in text
    assert pseudonym_of(workspace, PATIENTS[0]) in line["text"]


def test_a_gzip_bomb_of_a_table_is_read_as_what_it_is(fresh):
    root, data = fresh
    (data / "clinical.csv").write_bytes(gzip.compress(b"patient_id,age\n" * 1000))
    code, error, _ = call(root, "scan")
    assert (code, error["code"]) == (3, "E_TABLE")
