"""The door in: what a task must be before anything at the site is opened."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fourdvq.config import canonical_json
from fourdvq.errors import FourdvqError, Refused
from fourdvq.preprocessing.profile import profile_from
from fourdvq.wire.flower import pack
from fourdvq.wire.messages import (
    PROTOCOL,
    CodebookInitTask,
    HelloTask,
    OdeTask,
    PlanTask,
    Refusal,
    ReleaseTask,
    VqganTask,
)
from fourdvq_client.egress import Outcome
from fourdvq_client.guard import error_code
from fourdvq_client.ingress import ode_form, vqgan_form
from site_cases import (
    INSTALLED,
    SMALL,
    Door,
    envelope_of,
    policy_text,
    small_weights,
    tiny_profile,
    vqgan_task,
    vqgan_update,
)


def code_of(door, task, kind="", **changes):
    """The wire code of the refusal, or an empty text if the task is accepted."""
    try:
        door.guard.accept(kind or task.kind, pack(envelope_of(task, **changes), task))
    except FourdvqError as error:
        return error_code(error)
    return ""


def altered(change):
    weights = {n: t.clone() for n, t in small_weights().items()}
    change(weights, next(iter(weights)))
    return weights


def test_a_task_within_the_plan_is_accepted_and_has_its_line(tmp_path):
    door = Door(tmp_path)
    task = vqgan_task()
    envelope, received = door.guard.accept(task.kind, pack(envelope_of(task), task))
    assert isinstance(received, VqganTask)
    assert envelope.round == 1
    assert [(line["action"], line["kind"], line["policy"]) for line in door.lines] == [
        ("accept", "train.vqgan", "f" * 64)
    ]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"protocol": PROTOCOL + 1}, "PROTOCOL_MISMATCH"),
        ({"plan": "0" * 64}, "PLAN_NOT_APPROVED"),
        ({"plan": ""}, "PLAN_NOT_APPROVED"),
        ({"profile": "0" * 64}, "PROFILE_MISMATCH"),
        ({"parent": "0" * 64}, "PARENT_MISMATCH"),
        ({"parent": ""}, "PARENT_MISMATCH"),
    ],
)
def test_an_envelope_that_does_not_fit_is_refused(tmp_path, changes, code):
    door = Door(tmp_path)
    assert code_of(door, vqgan_task(), **changes) == code
    assert door.lines[-1]["action"] == "refuse"
    assert door.lines[-1]["decision"] == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"steps": 5}, "PLAN_MISMATCH"),
        ({"steps": 0}, "FIELD_OUT_OF_BOUNDS"),
        ({"steps": 2001}, "FIELD_OUT_OF_BOUNDS"),
        ({"global_step": -1}, "PLAN_MISMATCH"),
        ({"global_step": 9}, "PLAN_MISMATCH"),  # the last round of 3 x 4 steps begins at 8
        ({"discriminator": True}, "PLAN_MISMATCH"),
        ({"global_step": 4, "discriminator": False}, "PLAN_MISMATCH"),
        ({"codes": np.zeros((9, 2), np.float32)}, "MODEL_REJECTED"),
        ({"codes": np.zeros((8, 2), np.float64)}, "MODEL_REJECTED"),
        ({"codes": np.full((8, 2), np.nan, np.float32)}, "MODEL_REJECTED"),
        ({"code_counts": np.full(8, -1.0)}, "MODEL_REJECTED"),
        ({"code_sums": np.full((8, 2), np.inf)}, "MODEL_REJECTED"),
        ({"weights": altered(lambda w, n: w.pop(n))}, "MODEL_REJECTED"),
        ({"weights": altered(lambda w, n: w.update(extra=torch.zeros(1)))}, "MODEL_REJECTED"),
        ({"weights": altered(lambda w, n: w.update({n: w[n][:1]}))}, "MODEL_REJECTED"),
        ({"weights": altered(lambda w, n: w.update({n: w[n].double()}))}, "MODEL_REJECTED"),
        ({"weights": altered(lambda w, n: w[n].view(-1)[:1].fill_(torch.nan))}, "MODEL_REJECTED"),
        ({"weights": altered(lambda w, n: w[n].view(-1)[:1].fill_(torch.inf))}, "MODEL_REJECTED"),
    ],
)
def test_every_field_that_the_plan_determines_is_held_against_it(tmp_path, changes, code):
    door = Door(tmp_path)
    assert code_of(door, vqgan_task(**changes)) == code
    assert code_of(door, vqgan_task()) == ""  # and a refusal does not spoil the honest task after it


@pytest.mark.parametrize("changes", [{"n_codes": 9}, {"code_dim": 3}])
def test_codebook_initialisation_must_ask_for_the_plans_codebook(tmp_path, changes):
    fields = {"seed": 0, "n_codes": 8, "code_dim": 2, "weights": small_weights()}
    assert code_of(Door(tmp_path / "a"), CodebookInitTask(**{**fields, **changes})) == "PLAN_MISMATCH"
    assert code_of(Door(tmp_path / "b"), CodebookInitTask(**fields)) == ""


def test_a_model_that_jumps_away_from_the_last_one_is_refused(tmp_path):
    door = Door(tmp_path)
    near = {n: 1.5 * t for n, t in small_weights().items()}
    far = {n: 4.0 * t for n, t in small_weights().items()}
    assert code_of(door, vqgan_task(), round=1) == ""
    assert code_of(door, vqgan_task(weights=far), round=2) == "MODEL_REJECTED"
    assert code_of(door, vqgan_task(weights=near), round=2) == ""


def test_what_a_model_is_held_against_survives_a_restart(tmp_path):
    assert code_of(Door(tmp_path), vqgan_task(), round=1) == ""
    far = {n: 4.0 * t for n, t in small_weights().items()}
    assert code_of(Door(tmp_path), vqgan_task(weights=far), round=2) == "MODEL_REJECTED"


def test_a_cohort_that_changed_since_the_approval_stops_the_run(tmp_path):
    door = Door(tmp_path)
    door.facts.prepared = ("d0" * 32, door.facts.prepared[1])
    assert code_of(door, vqgan_task()) == "COHORT_CHANGED"


def test_scans_prepared_under_another_profile_are_refused(tmp_path):
    door = Door(tmp_path)
    door.facts.prepared = (door.facts.prepared[0], "cd" * 32)
    assert code_of(door, vqgan_task()) == "PROFILE_MISMATCH"


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"role": "external"}, "ROLE_REFUSED"),
        ({"max_rounds": "1"}, "FIELD_OUT_OF_BOUNDS"),
        ({"max_local_steps": "3"}, "FIELD_OUT_OF_BOUNDS"),
        ({"allowed_code": "[]"}, "CODE_MISMATCH"),
    ],
)
def test_the_sites_own_rules_come_before_the_plan(tmp_path, policy, code):
    door = Door(tmp_path, policy_text(**policy))
    first = code_of(door, vqgan_task(), round=1)
    assert code in (first, code_of(door, vqgan_task(), round=2))


def test_a_message_above_the_size_limit_is_not_opened(tmp_path):
    text = policy_text().replace("max_bytes: 400000000", "max_bytes: 1000")
    assert code_of(Door(tmp_path, text), vqgan_task()) == "FIELD_OUT_OF_BOUNDS"


def test_a_task_that_the_policy_does_not_list_is_refused(tmp_path):
    door = Door(tmp_path, policy_text().replace("train.vqgan, ", ""))
    assert code_of(door, vqgan_task()) == "TASK_REFUSED"


@pytest.mark.parametrize("kind", ["train.everything", "query.shell", "Train.Vqgan", "LEU-004217"])
def test_an_unknown_message_type_is_refused_and_its_text_is_not_logged(tmp_path, kind):
    door = Door(tmp_path)
    assert code_of(door, vqgan_task(), kind=kind) == "TASK_REFUSED"
    assert kind not in door.audit.path.read_text().replace('"rule":"' + kind, "")
    assert door.lines[-1]["kind"] == "unknown"


def test_a_changed_package_is_refused_at_the_next_task(tmp_path):
    entry = ", ".join(f'{{package: {c.package}, version: "{c.version}", sha256: "{c.sha256}"}}' for c in INSTALLED)
    door = Door(tmp_path, policy_text(allowed_code=f"[{entry}]"))
    assert code_of(door, vqgan_task(), round=1) == ""
    door.facts.code = (INSTALLED[0], dataclasses.replace(INSTALLED[1], sha256="3" * 64))
    assert code_of(door, vqgan_task(), round=2) == "CODE_MISMATCH"


def test_a_policy_that_breaks_while_we_wait_closes_the_door(tmp_path):
    door = Door(tmp_path)
    door.facts.text = "schema: 1\n"
    assert code_of(door, vqgan_task()) == "EGRESS_REFUSED"
    assert code_of(door, HelloTask()) == "EGRESS_REFUSED"


# --- rounds ------------------------------------------------------------------------------------------------------


def answered(door, **changes):
    task = vqgan_task()
    envelope, task = door.guard.accept(task.kind, pack(envelope_of(task, **changes), task))
    outcome = Outcome(vqgan_update(), 8, 8, np.full(8, 8))
    door.guard.release(outcome, envelope, task.kind, task)


def test_rounds_only_go_up_and_may_be_skipped(tmp_path):
    door = Door(tmp_path)
    answered(door, round=3)
    assert code_of(door, vqgan_task(), round=3) == "STALE_ROUND"
    assert code_of(door, vqgan_task(), round=2) == "STALE_ROUND"
    assert code_of(door, vqgan_task(), round=9) == ""


def test_a_round_whose_reply_never_left_may_be_asked_again_from_the_same_weights_only(tmp_path):
    door = Door(tmp_path)
    assert code_of(door, vqgan_task(), round=3) == ""
    other = {n: 1.01 * t for n, t in small_weights().items()}
    assert code_of(door, vqgan_task(weights=other), round=3) == "STALE_ROUND"
    assert code_of(door, vqgan_task(), round=3) == ""
    refused = envelope_of(vqgan_task(), round=3)
    door.guard.release(Outcome(Refusal(code="INTERNAL")), refused, "train.vqgan")
    assert code_of(door, vqgan_task(), round=3) == ""  # a refusal is no answer


def test_a_task_id_is_used_once_also_after_a_restart(tmp_path):
    assert code_of(Door(tmp_path), vqgan_task(), task_id="1" * 32, round=1) == ""
    assert code_of(Door(tmp_path), vqgan_task(), task_id="1" * 32, round=2) == "REPLAY"
    assert code_of(Door(tmp_path), HelloTask(), task_id="1" * 32) == "REPLAY"


def test_another_run_counts_its_own_rounds(tmp_path):
    door = Door(tmp_path)
    answered(door, round=7, run="run-1")
    assert code_of(door, vqgan_task(), round=1, run="run-2") == ""


def test_hello_and_plan_come_before_any_approval(tmp_path):
    door = Door(tmp_path)
    door.facts.plans = {}
    assert code_of(door, HelloTask(), plan="", profile="") == ""
    assert code_of(door, HelloTask(), plan="", profile="", round=1) == ""


def test_a_damaged_record_of_rounds_keeps_the_site_closed(tmp_path):
    answered(Door(tmp_path), round=1)
    (tmp_path / "state" / "accepted.json").write_text('{"run-1": {"round": "one"}}')
    with pytest.raises(Refused, match="E_STATE"):
        Door(tmp_path)


# --- the plan and the release ------------------------------------------------------------------------------------


def plan_task(plan, profile=None):
    return PlanTask(plan_json=plan.to_json(), profile_json=canonical_json(profile or profile_from(tiny_profile())))


def test_a_plan_must_hash_to_what_the_envelope_says(tmp_path):
    profile = profile_from(tiny_profile())
    plan = dataclasses.replace(SMALL, profile_sha256=profile.sha256)
    door = Door(tmp_path)
    assert code_of(door, plan_task(plan), plan=plan.hash) == ""
    assert code_of(door, plan_task(plan), plan=SMALL.hash) == "PLAN_MISMATCH"


def test_a_plan_must_come_with_its_profile(tmp_path):
    plan = dataclasses.replace(SMALL, profile_sha256="9" * 64)
    assert code_of(Door(tmp_path), plan_task(plan), plan=plan.hash) == "PLAN_MISMATCH"


def test_a_plan_with_a_field_that_this_version_does_not_know_is_refused(tmp_path):
    text = SMALL.to_json().replace('"seed":0', '"seed":0,"send_scans":true')
    task = PlanTask(plan_json=text, profile_json="{}")
    assert code_of(Door(tmp_path), task) == "PLAN_MISMATCH"


def test_a_release_may_hold_nothing_but_a_model(tmp_path):
    door = Door(tmp_path)
    good = {f"vqgan.{n}": t for n, t in small_weights().items()}
    assert code_of(door, ReleaseTask(card_json="{}", weights=good)) == ""
    assert code_of(door, ReleaseTask(card_json="{}", weights={**good, "code.py": torch.zeros(3)})) == "MODEL_REJECTED"
    bad = {**good, "vqgan.extra": torch.zeros(3)}
    assert code_of(door, ReleaseTask(card_json="{}", weights=bad)) == "MODEL_REJECTED"


def test_forms_are_those_of_the_plans_own_models():
    assert {n: t.shape for n, t in vqgan_form(SMALL).items()} == {n: t.shape for n, t in small_weights().items()}
    weights = {n: torch.zeros(t.shape) for n, t in ode_form(SMALL).items()}
    assert OdeTask(steps=1, tokenizer_sha256="", weights=weights).weights.keys() == weights.keys()


# --- records that are no message ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"envelope": ConfigRecord({"json": "{}"})}),
        RecordDict(
            {
                "envelope": ConfigRecord({"json": "[1"}),
                "fields": ConfigRecord({"json": "{}"}),
                "tensors": ArrayRecord(),
            }
        ),
        RecordDict(
            {
                "envelope": ConfigRecord({"json": '{"protocol": "1"}'}),
                "fields": ConfigRecord({"json": "{}"}),
                "tensors": ArrayRecord(),
            }
        ),
    ],
)
def test_records_that_are_no_message_get_a_refusal_and_a_line(tmp_path, records):
    door = Door(tmp_path)
    with pytest.raises(FourdvqError):
        door.guard.accept("query.hello", records)
    assert door.lines[-1]["action"] == "refuse"
