from __future__ import annotations

import pytest

from fourdvq.error_codes import CODES, WIRE_CODES
from fourdvq.errors import ConfigError, DataError, FourdvqError, Refused, SurvivalError, wire_code


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_title_reason_expectation_and_remedy(code):
    explanation = CODES[code]
    assert all((explanation.title, explanation.why, explanation.wanted, explanation.fix))
    assert explanation.wire in WIRE_CODES


def test_only_the_code_of_an_error_leaves_the_site():
    error = DataError("E_CORRUPT", where="/data/LEU-004217/scan 1.dcm", found="3 bytes")
    assert wire_code(error) == "DATA_INVALID"
    assert wire_code(RuntimeError("/data/LEU-004217")) == "INTERNAL"
    assert wire_code(MemoryError()) == "OUT_OF_MEMORY"


def test_an_undeclared_code_cannot_be_raised():
    with pytest.raises(KeyError):
        FourdvqError("E_NOBODY_DECLARED_THIS")


def test_survival_input_errors_are_value_errors_too():
    assert issubclass(SurvivalError, ValueError)


@pytest.mark.parametrize(("kind", "exit_code"), [(FourdvqError, 1), (ConfigError, 2), (DataError, 3), (Refused, 5)])
def test_exit_codes_follow_the_kind_of_error(kind, exit_code):
    assert kind.exit_code == exit_code


def test_json_form_has_all_parts():
    parts = ConfigError("E_KEY", where="plan.lr", found="'lrr'").as_dict()
    assert parts["ok"] is False
    assert all(parts[key] for key in ("code", "title", "where", "found", "wanted", "why", "fix"))
