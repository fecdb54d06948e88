"""Laws of the keyed folds: what changes an assignment, and what must not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdvq.errors import SurvivalError
from fourdvq.survival.folds import assign_folds, folds_digest, permutation, training_rows
from survival_data import KEY

QUICK = settings(max_examples=30, deadline=None, derandomize=True)


def people(n: int, seed: int):
    rng = np.random.default_rng(seed)
    return [f"{rng.integers(1 << 60):015x}" for _ in range(n)], rng.random(n) < 0.5


def folds_of(ids, event, **options):
    fold = assign_folds(ids, event, **{"folds": 5, "key": KEY, "site": "leuven", **options})
    return dict(zip(ids, fold.tolist(), strict=True))


@QUICK
@given(n=st.integers(1, 80), seed=st.integers(0, 999), mode=st.sampled_from(["site_event", "hash"]))
def test_row_order_does_not_move_a_patient(n, seed, mode):
    ids, event = people(n, seed)
    order = np.random.default_rng(seed).permutation(n)
    assert folds_of(ids, event, mode=mode) == folds_of([ids[i] for i in order], event[order], mode=mode)


@QUICK
@given(n=st.integers(1, 120), seed=st.integers(0, 999), folds=st.integers(2, 8))
def test_folds_are_balanced_in_patients_and_in_deaths(n, seed, folds):
    ids, event = people(n, seed)
    fold = assign_folds(ids, event, folds=folds, key=KEY, site="leuven")
    for group in (np.ones(n, dtype=bool), event, ~event):
        counts = np.bincount(fold[group], minlength=folds)
        assert counts.max() - counts.min() <= 1


def test_hash_mode_does_not_depend_on_the_site_and_the_default_does():
    ids, event = people(60, 1)
    assert folds_of(ids, event, mode="hash") == folds_of(ids, event, mode="hash", site="southampton")
    others = [folds_of(ids, event, site=f"site{k}") for k in range(10)]
    assert any(other != others[0] for other in others)


def test_another_key_gives_other_folds_and_another_digest():
    ids, event = people(60, 1)
    mine, other = (assign_folds(ids, event, folds=5, key=key, site="leuven") for key in (KEY, b"x" * 32))
    assert (mine != other).any()
    assert folds_digest(ids, mine, key=KEY) != folds_digest(ids, other, key=KEY)
    order = np.argsort(ids)
    assert folds_digest(ids, mine, key=KEY) == folds_digest([ids[i] for i in order], mine[order], key=KEY)


def test_every_patient_is_left_out_of_training_exactly_once():
    train = training_rows(assign_folds(*people(33, 2), folds=5, key=KEY, site="s"), 5)
    assert ((~train).sum(axis=0) == 1).all()


def test_permutations_are_the_sites_own_and_repeatable():
    one = permutation(50, 3, key=KEY, site="leuven")
    assert sorted(one) == list(range(50))
    assert (one == permutation(50, 3, key=KEY, site="leuven")).all()
    assert (one != permutation(50, 4, key=KEY, site="leuven")).any()
    assert (one != permutation(50, 3, key=KEY, site="southampton")).any()


@pytest.mark.parametrize(
    "broken", [{"folds": 1}, {"key": b""}, {"mode": "random"}], ids=["one fold", "no key", "unknown mode"]
)
def test_unusable_options_are_named(broken):
    with pytest.raises(SurvivalError):
        folds_of(*people(5, 0), **broken)


def test_a_repeated_pseudonym_is_refused():
    with pytest.raises(SurvivalError, match="ids"):
        assign_folds(["a", "a"], np.array([True, False]), folds=2, key=KEY, site="s")
