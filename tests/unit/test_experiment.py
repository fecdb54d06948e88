"""Experiments out of groups: typed once, hashed, and refused with the place where something is wrong."""

from __future__ import annotations

import json

import pytest

from fourdvq.errors import ConfigError
from fourdvq.plan import Plan, plan_from
from fourdvq_server.experiment import compose, flatten, presets

PRESETS = [name for name, _ in presets()]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_plan_of_its_name_with_a_profile_of_its_grid(name):
    experiment = compose([f"experiment={name}"])
    assert experiment.plan.name == name
    assert experiment.profile.grid.size == experiment.plan.model.size
    assert experiment.plan.profile_sha256 == experiment.profile.sha256
    assert experiment.plan.window_hu == experiment.profile.window_hu


def test_every_preset_says_what_it_is():
    assert all(text for _, text in presets())


def test_the_plain_default_is_the_fast_preset():
    assert compose().plan == compose(["experiment=fast"]).plan


def test_an_override_changes_the_hash_and_tracking_does_not():
    base = compose(["experiment=tiny"]).plan.hash
    assert compose(["experiment=tiny", "federation.rounds=3"]).plan.hash != base
    assert compose(["experiment=tiny", "tracking=none"]).plan.hash == base


def test_the_plan_survives_its_own_json():
    plan = compose(["experiment=demo", "seed=5"]).plan
    assert plan_from(json.loads(plan.to_json())) == plan


def test_numbers_that_nobody_overrides_are_those_of_the_plan_classes():
    assert compose(["experiment=fast"]).plan.vqgan == Plan(name="", profile_sha256="").vqgan


@pytest.mark.parametrize(
    ("overrides", "code", "where"),
    [
        (["experiment=tiny", "+federation.cookies=1"], "E_KEY", "plan.federation.cookies"),
        (["experiment=tiny", "federation.rounds=many"], "E_TYPE", "plan.federation.rounds"),
        (["experiment=tiny", "federation.rounds=no"], "E_TYPE", "plan.federation.rounds"),
        (["experiment=tiny", "model.size=[16,32]"], "E_TYPE", "plan.model.size"),
        (["experiment=tiny", "model.size=[16,32,64]"], "E_VALUE", "model.size"),
        (["experiment=tinny"], "E_VALUE", "experiment=tinny"),
        (["experiment=tiny", "federation.roundz=1"], "E_VALUE", "experiment=tiny federation.roundz=1"),
        (["experiment=tiny", "model.norm=layer"], "E_TYPE", "plan.model.norm"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_place(overrides, code, where):
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert (error.value.code, error.value.where) == (code, where)


def test_a_name_of_digits_keeps_its_zeros():
    assert compose(["experiment=tiny", "name=007"]).plan.name == "007"


def test_a_typo_in_a_group_lists_the_choices():
    with pytest.raises(ConfigError, match="tiny"):
        compose(["experiment=tinny"])


def test_flatten_names_every_leaf_once():
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": "1", "a.c": "[1, 2]", "d": "None"}
