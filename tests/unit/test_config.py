from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourdvq.config import build, canonical_json, sha256_of, to_plain
from fourdvq.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    lr: float = 3e-4
    betas: tuple[float, float] = (0.5, 0.9)


@dataclass(frozen=True)
class Outer:
    name: str
    steps: int = 1
    kind: Literal["off", "on"] = "off"
    folder: Path | None = None
    inner: Inner = field(default_factory=Inner)


BAD = {
    "an unknown key is named with its path and the nearest known key": (
        {"name": "a", "inner": {"lrr": 1}},
        "E_KEY",
        "x.inner.lrr",
    ),
    "a missing key is named": ({}, "E_MISSING", "x.name"),
    "an unquoted 007 is a number and not a name": ({"name": 7}, "E_TYPE", "x.name"),
    "an unquoted off is a boolean and not a word": ({"name": "a", "kind": False}, "E_TYPE", "x.kind"),
    "text is not a number": ({"name": "a", "inner": {"lr": "3e-4"}}, "E_TYPE", "x.inner.lr"),
    "a boolean is not a number": ({"name": "a", "steps": True}, "E_TYPE", "x.steps"),
    "a pair has two values": ({"name": "a", "inner": {"betas": [1.0]}}, "E_TYPE", "x.inner.betas"),
    "a fraction is not a count": ({"name": "a", "steps": 1.5}, "E_TYPE", "x.steps"),
    "infinity is not a setting": ({"name": "a", "inner": {"lr": float("inf")}}, "E_VALUE", "x.inner.lr"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_key_and_the_rule(case):
    data, code, where = BAD[case]
    with pytest.raises(ConfigError) as caught:
        build(Outer, data, where="x")
    assert (caught.value.code, caught.value.where) == (code, where)


def test_a_typing_error_suggests_the_right_key():
    with pytest.raises(ConfigError, match="E_KEY") as caught:
        build(Outer, {"name": "a", "stepz": 3})
    assert "steps" in caught.value.fix


def test_lossless_conversions_are_made():
    built = build(Outer, {"name": "a", "folder": "/data", "inner": {"lr": 1, "betas": [0, 1]}})
    assert built == Outer("a", folder=Path("/data"), inner=Inner(lr=1.0, betas=(0.0, 1.0)))


@given(
    st.builds(
        Outer,
        name=st.text(),
        steps=st.integers(),
        kind=st.sampled_from(["off", "on"]),
        folder=st.none(),
        inner=st.builds(
            Inner,
            lr=st.floats(allow_nan=False, allow_infinity=False),
            betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        ),
    )
)
def test_plain_form_round_trips(value):
    assert build(Outer, to_plain(value)) == value


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)))
def test_identity_does_not_depend_on_the_order_of_keys(data):
    assert sha256_of(data) == sha256_of(dict(reversed(list(data.items()))))


def test_not_a_number_has_no_canonical_form():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})
