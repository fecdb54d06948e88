"""A patient is in one split, whatever the order of the files, and stays there."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fourdvq.data.splits import SplitPatient, assign_splits
from fourdvq.errors import CohortError
from fourdvq.plan import SplitSpec

KEY = b"k" * 32
PATIENTS = [SplitPatient(f"{i:012x}", 2 + i % 3, i % 2 == 0) for i in range(60)]


def test_shares_are_met_to_one_patient_overall_and_nearly_in_every_stratum():
    splits = assign_splits(PATIENTS, key=KEY, shares=SplitSpec())
    assert Counter(splits.values()) == {"train": 42, "validation": 6, "test": 12}
    for many in (True, False):
        stratum = [splits[p.pseudonym] for p in PATIENTS if (p.n_scans >= 3) == many]
        assert Counter(stratum)["test"] == pytest.approx(0.2 * len(stratum), abs=2)


def test_the_order_of_the_files_does_not_matter():
    shuffled = list(PATIENTS)
    random.Random(3).shuffle(shuffled)
    assert assign_splits(shuffled, key=KEY, shares=SplitSpec()) == assign_splits(PATIENTS, key=KEY, shares=SplitSpec())


def test_another_key_gives_another_assignment():
    assert assign_splits(PATIENTS, key=b"x" * 32, shares=SplitSpec()) != assign_splits(
        PATIENTS, key=KEY, shares=SplitSpec()
    )


def test_nobody_moves_when_patients_are_added_or_change_stratum():
    before = assign_splits(PATIENTS[:30], key=KEY, shares=SplitSpec())
    changed = [SplitPatient(p.pseudonym, 9, True) for p in PATIENTS]
    after = assign_splits(changed, key=KEY, shares=SplitSpec(), existing=before)
    assert {p: after[p] for p in before} == before
    assert Counter(after.values()) == {"train": 42, "validation": 6, "test": 12}


@pytest.mark.parametrize(
    ("shares", "expected"), [((0.0, 0.0, 1.0), {"test": 60}), ((0.8, 0.0, 0.2), {"train": 48, "test": 12})]
)
def test_a_share_of_nothing_stays_empty(shares, expected):
    assert Counter(assign_splits(PATIENTS, key=KEY, shares=SplitSpec(*shares)).values()) == expected


def test_the_first_patient_of_a_small_site_trains():
    assert list(assign_splits(PATIENTS[:1], key=KEY, shares=SplitSpec()).values()) == ["train"]


def test_unknown_splits_and_doubled_patients_are_refused():
    with pytest.raises(CohortError, match="E_TABLE"):
        assign_splits(PATIENTS, key=KEY, shares=SplitSpec(), existing={"a": "holdout"})
    with pytest.raises(CohortError, match="E_DUPLICATE"):
        assign_splits([PATIENTS[0], PATIENTS[0]], key=KEY, shares=SplitSpec())
