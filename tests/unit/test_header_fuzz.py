"""A damaged header is refused by name or makes no difference: never a crash, never another geometry."""

from __future__ import annotations

from pathlib import Path

import pytest

from header_fuzz import CHECKED_TWICE, SAID_ONCE, fuzz, fuzz_apart, targets


@pytest.mark.parametrize("kind", CHECKED_TWICE)
def test_a_damaged_header_is_refused_or_geometry_and_voxels_are_the_same(kind: str, tmp_path: Path):
    tally = fuzz(targets(tmp_path)[kind], 50, seed=7)
    assert tally.wrong == []
    assert tally.count == 50
    assert tally.verdicts["refused"] >= 15


@pytest.mark.parametrize("kind", SAID_ONCE)
def test_damage_that_cannot_be_told_from_the_truth_at_least_crashes_nothing(kind: str, tmp_path: Path):
    tally = fuzz(targets(tmp_path)[kind], 25, seed=7)
    assert tally.verdicts["crashed"] == 0, tally.wrong


@pytest.mark.slow
def test_two_thousand_damaged_headers_are_refused_or_make_no_difference():
    tally = fuzz_apart(CHECKED_TWICE, 2000, seed=1)
    assert tally.wrong == []
    assert tally.count == 2000


@pytest.mark.slow
def test_twelve_hundred_damaged_files_of_other_kinds_kill_no_process():
    tally = fuzz_apart(SAID_ONCE, 1200, seed=1)
    assert (tally.verdicts["crashed"], tally.verdicts["died"]) == (0, 0), tally.wrong
