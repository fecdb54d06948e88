"""A second run of a survival analysis needs a person's yes, which is shown, given with a reason, logged and used up."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from client_calls import call
from cox_sites import TOKENIZER, survival_plan
from fourdvq.errors import Refused
from fourdvq.survival.disclosure import RunRegister
from fourdvq.survival.messages import HelloRequest
from fourdvq.wire.messages import COX_TASKS
from fourdvq_client.cox_desk import CoxDesk
from fourdvq_client.cox_register import CoxRegister
from fourdvq_client.policy import load_policy
from fourdvq_client.workspace import open_workspace
from site_cases import envelope_of, hospital, new_site
from survival_data import cohort

PLAN = survival_plan()


@pytest.fixture
def root(tmp_path):
    """A site with a policy, a key and a log, and nothing prepared."""
    return new_site(tmp_path / "site", hospital(tmp_path / "data", ("LEU-1",), scans=1))


def begin(root, run, purpose="selection"):
    """What the coordinator's `cox_hello` comes to at this site."""
    workspace, config = open_workspace(root)
    workspace.secret.parent.mkdir(exist_ok=True)
    workspace.secret.write_bytes(b"s" * 32)
    desk = CoxDesk(workspace, config.site, lambda *_: cohort(80, codes=4))
    hello = HelloRequest(folds=0, purpose=purpose, run=run, codebook_sha256=TOKENIZER)
    task = COX_TASKS["query.cox_hello"](1, TOKENIZER, hello)
    policy = load_policy(workspace.policy_yaml).rules
    return desk.answer(task, envelope_of(task, run=run, plan=PLAN.hash), PLAN, policy)


def log_lines(root):
    return [json.loads(text) for text in open_workspace(root)[0].audit_file.read_text().splitlines()]


def test_a_second_run_is_refused_until_a_person_allows_it_and_then_once(root):
    for purpose in ("selection", "km"):
        begin(root, "r1", purpose)
    with pytest.raises(Refused) as refused:
        begin(root, "r2")
    assert (refused.value.where, refused.value.code) == ("one_run", "E_COX_RULE")
    assert "survival allow-rerun" in refused.value.fix
    code, shown, _ = call(root, "survival", "allow-rerun", "--reason", "the first run was stopped", "--by", "A. Person")
    assert code == 0
    assert [(row["purpose"], row["run"]) for row in shown["begun"]] == [("selection", "r1"), ("km", "r1")]
    assert {row["plan"] for row in shown["begun"]} == {PLAN.hash}
    assert shown["allowed"] == 1
    line = log_lines(root)[-1]
    assert (line["action"], line["kind"]) == ("approve", "survival")
    assert "A. Person" in line["decision"]
    assert line["rule"] == "the first run was stopped"
    # One yes is for one run with all its purposes.
    for purpose in ("selection", "km"):
        begin(root, "r2", purpose)
    with pytest.raises(Refused):
        begin(root, "r3")
    assert call(root, "survival", "runs")[1]["allowed"] == 0
    assert call(root, "audit", "verify")[0] == 0


def test_without_a_reason_or_without_a_begun_analysis_nothing_is_allowed(root):
    assert call(root, "survival", "allow-rerun", "--reason", "why not")[0] == 2
    begin(root, "r1")
    before = len(log_lines(root)) if open_workspace(root)[0].audit_file.is_file() else 0
    assert call(root, "survival", "allow-rerun")[0] == 2
    assert CoxRegister(open_workspace(root)[0].state).read().approvals == 0
    after = len(log_lines(root)) if open_workspace(root)[0].audit_file.is_file() else 0
    assert after == before


def test_a_yes_given_while_the_client_works_is_not_lost_and_neither_is_what_began(root):
    begin(root, "r1")
    register = CoxRegister(open_workspace(root)[0].state, clock=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    held = register.read()
    assert call(root, "survival", "allow-rerun", "--reason", "new plan")[0] == 0
    held.claim("another cohort", "k", "selection", "r2", attempts=3)
    register.keep(held, plan="p" * 64)
    assert register.read().approvals == 1
    assert [row.run for row in register.begun()] == ["r1", "r2"]
    assert register.begun()[1].utc == "2026-01-02T00:00:00+00:00"


def test_a_yes_for_one_fold_key_is_none_for_another():
    register = RunRegister(approvals=1)
    for run in ("r1", "r2"):
        register.claim("cohort", "key", "selection", run, attempts=3)
    with pytest.raises(Refused):
        register.claim("cohort", "another key", "selection", "r2", attempts=3)
