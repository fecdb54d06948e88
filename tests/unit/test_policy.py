"""The policy: complete or closed."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
import yaml

from fourdvq.errors import ConfigError, Refused
from fourdvq.wire.messages import TASKS
from fourdvq_client.code_identity import check_code
from fourdvq_client.policy import (
    Approval,
    SitePolicy,
    add_approval,
    load_policy,
    parse_policy,
)
from fourdvq_client.policy_words import doubts, in_words
from site_cases import COHORT, INSTALLED, template

NAMES = ("leuven", "southampton", "external", "demo")
PLAN = "d1" * 32


def leaves(value, path=()):
    """Dotted paths of every key of the policy, blocks included."""
    for key, item in value.items():
        yield (*path, key)
        if isinstance(item, dict) and key != "cox":
            yield from leaves(item, (*path, key))


PLAIN = yaml.safe_load(template("leuven"))
PATHS = sorted(leaves(PLAIN))


def changed(path, change):
    """The leuven policy with the key at `path` replaced by what `change` gives for (key, value); None drops it."""
    data = yaml.safe_load(template("leuven"))
    block = data
    for step in path[:-1]:
        block = block[step]
    pair = change(path[-1], block.pop(path[-1]))
    if pair is not None:
        block[pair[0]] = pair[1]
    return yaml.safe_dump(data)


@pytest.mark.parametrize("name", NAMES)
def test_every_template_is_a_complete_policy(name):
    policy = parse_policy(template(name))
    assert policy.site == name
    assert policy.allowed_plans == ()
    assert policy.dp.mode == "off"


@pytest.mark.parametrize("name", ["leuven", "southampton", "external"])
def test_real_hospitals_start_from_the_trust_defaults(name):
    policy = parse_policy(template(name))
    cohort, egress = policy.cohort, policy.egress
    assert (cohort.min_patients_per_round, cohort.min_scans_per_round, cohort.min_patients_per_summary) == (20, 20, 10)
    assert (cohort.max_rounds, cohort.max_local_steps) == (200, 2000)
    assert (egress.max_bytes_factor, egress.wire_dtype, egress.max_rel_update) == (1.1, "bfloat16", 1.0)
    assert (egress.codebook_min_patients, egress.sig_digits, egress.min_cell) == (5, 4, 5)
    assert (policy.ingress.max_rel_change, policy.ingress.max_bytes) == (1.0, 400_000_000)
    assert policy.coordinator.tls == "required"
    assert dict(policy.cox) == {}
    assert policy.allowed_code == ()  # nothing may run until somebody says what


def test_only_the_demo_runs_whatever_is_installed_and_says_so():
    assert parse_policy(template("demo")).allowed_code == "any"
    assert "SYNTHETIC" in template("demo")
    texts = [d.text for d in doubts(parse_policy(template("demo")), "demo", INSTALLED)]
    assert sum("synthetic data only" in text for text in texts) >= 3


def test_the_external_site_is_asked_for_nothing_that_trains():
    policy = parse_policy(template("external"))
    assert policy.role == "external"
    assert not any(policy.allows(kind) for kind, task in TASKS.items() if task.trains and "cox" not in kind)


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_missing_field_keeps_the_site_closed(path):
    with pytest.raises(Refused) as caught:
        parse_policy(changed(path, lambda key, value: None))
    assert caught.value.code == "E_POLICY"
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_misspelt_field_keeps_the_site_closed_and_is_named(path):
    with pytest.raises(Refused) as caught:
        parse_policy(changed(path, lambda key, value: (key + "x", value)))
    assert caught.value.code == "E_POLICY"
    assert path[-1] in caught.value.where + caught.value.found


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_field_of_another_type_keeps_the_site_closed(path):
    def other(key, value):
        return key, (["x"] if not isinstance(value, list) else {"x": 1}) if not isinstance(value, bool) else "yes"

    with pytest.raises(Refused) as caught:
        parse_policy(changed(path, other))
    assert caught.value.code == "E_POLICY"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('mode: "off"', "mode: off"),  # read as a boolean
        ("role: train", "role: trainer"),
        ("wire_dtype: bfloat16", "wire_dtype: float64"),
        ("kinds: [site_card", "kinds: [pictures, site_card"),
        ("min_patients_per_round: 20", "min_patients_per_round: 0"),
        ("min_patients_per_round: 20", "min_patients_per_round: 19.5"),
        ("sig_digits: 4", "sig_digits: 40"),
        ("require_finite: true", "require_finite: false"),
        ("on_violation: refuse", "on_violation: warn"),
        ("schema: 1", "schema: 2"),
        ("cox: {}", "cox: {min_patient: 20}"),
        ("cox: {}", "cox: {min_patients: many}"),
        ("allowed_plans: []", "allowed_plans: [{plan: abc, cohort: abc, by: me, 'on': today}]"),
        ("site: leuven", "site: ${oc.env:HOME}"),
        ("site: leuven", "site: [leuven"),
    ],
)
def test_values_that_would_open_the_door_wider_or_mean_something_else_are_refused(old, new):
    text = template("leuven")
    assert old in text
    with pytest.raises(Refused, match="E_POLICY"):
        parse_policy(text.replace(old, new, 1))


def test_an_unquoted_off_is_explained():
    with pytest.raises(Refused) as caught:
        parse_policy(template("leuven").replace('mode: "off"', "mode: off"))
    assert "quote" in caught.value.fix


def test_a_policy_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(Refused, match="E_POLICY"):
        load_policy(tmp_path / "policy.yaml")
    (tmp_path / "policy.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="E_POLICY"):
        load_policy(tmp_path / "policy.yaml")


def test_cox_fields_reach_the_survival_rules_by_name():
    from fourdvq.config import build
    from fourdvq.survival.disclosure import Policy

    demo = parse_policy(template("demo")).cox
    assert build(Policy, demo).min_patients == demo["min_patients"] < Policy().min_patients
    assert build(Policy, parse_policy(template("leuven")).cox) == Policy()


def test_installed_code_must_be_listed_to_the_last_digit():
    one = '{{package: {}, version: "1.0.0", sha256: "{}"}}'

    def policy(first, second):
        listed = f"allowed_code: [{one.format('fourdvq', first)}, {one.format('fourdvq_client', second)}]"
        return parse_policy(re.sub(r"^allowed_code: \[\].*$", listed, template("leuven"), flags=re.M))

    check_code(policy("1" * 64, "2" * 64), INSTALLED)
    for first, second in (("1" * 63 + "0", "2" * 64), ("1" * 64, "0" * 64)):
        with pytest.raises(Refused, match="CODE_MISMATCH"):
            check_code(policy(first, second), INSTALLED)
    with pytest.raises(Refused, match="CODE_MISMATCH"):
        check_code(parse_policy(template("leuven")), INSTALLED)


@pytest.mark.parametrize(
    "listed",
    [
        "allowed_plans: []   # people add here",
        f'allowed_plans: [{{plan: "{"e" * 64}", cohort: "{COHORT}", by: A, "on": "2026-01-01"}}]',
        f'allowed_plans:\n  # first\n  - {{plan: "{"e" * 64}", cohort: "{COHORT}", by: A, "on": "2026"}}\n  # end',
        f'allowed_plans:\n- plan: "{"e" * 64}"\n  cohort: "{COHORT}"\n  by: A\n  "on": "2026-01-01"',
    ],
)
def test_an_approval_is_added_and_every_comment_stays(tmp_path, listed):
    path = tmp_path / "policy.yaml"
    text = re.sub(r"^allowed_plans: \[\].*$", listed, template("leuven"), flags=re.M)
    path.write_text(text)
    path.chmod(0o640)
    before = parse_policy(text)
    add_approval(path, PLAN, COHORT, "Dr Ann O'Hara", "2026-11-24")
    after = load_policy(path).rules
    assert after.allowed_plans == (*before.allowed_plans, Approval(PLAN, COHORT, "Dr Ann O'Hara", "2026-11-24"))
    assert dataclasses.replace(after, allowed_plans=()) == dataclasses.replace(before, allowed_plans=())
    comments = re.findall(r"#.*$", text, flags=re.M)
    assert [c for c in comments if c in path.read_text()] == comments
    assert path.stat().st_mode & 0o777 == 0o640
    assert after.approval(PLAN) == after.allowed_plans[-1]


@pytest.mark.parametrize("name", ['x", plan: "', "a\nb", "${x}", " ", "back\\slash"])
def test_a_name_cannot_smuggle_yaml_into_the_policy(tmp_path, name):
    path = tmp_path / "policy.yaml"
    path.write_text(template("leuven"))
    with pytest.raises(ConfigError, match="E_VALUE"):
        add_approval(path, PLAN, COHORT, name, "2026-11-24")
    assert path.read_text() == template("leuven")


def test_who_may_not_write_the_policy_gets_the_entry_to_hand_on(tmp_path, monkeypatch):
    path = tmp_path / "policy.yaml"
    path.write_text(template("leuven"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # a test may run as root, whom no mode stops
    with pytest.raises(Refused) as caught:
        add_approval(path, PLAN, COHORT, "Ann", "2026-11-24")
    assert caught.value.code == "E_READ_ONLY"
    assert PLAN in caught.value.fix
    assert caught.value.exit_code == 5


def test_the_policy_in_words_names_every_floor():
    words = " ".join(in_words(parse_policy(template("leuven"))))
    for part in (
        "20 patients",
        "10 patients",
        "bfloat16",
        "fewer than 5 patients",
        "no differential privacy guarantee",
    ):
        assert part in words


def test_doubts_name_a_pattern_that_matches_nothing_and_another_site():
    text = template("leuven").replace("train.vqgan", "train.vqan")
    found = doubts(parse_policy(text), "southampton", INSTALLED)
    assert any("train.vqan" in d.text for d in found)
    assert sum(d.level == "FAIL" for d in found) == 2  # the site, and code that nobody listed


def test_no_message_field_can_reach_the_policy():
    fields = {f.name for f in dataclasses.fields(SitePolicy)} - {"site", "role", "schema"}
    for kind, task in TASKS.items():
        assert not fields & {f.name for f in dataclasses.fields(task)}, kind
