"""Grades and codes follow the documented rules, number by number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from fourdvq.data.volume import Volume
from fourdvq.preprocessing.grades import expiratory, grade_of, pair_codes, pair_grade, refusal_words, scan_codes
from fourdvq.preprocessing.profile import LimitsSpec
from fourdvq.preprocessing.quality import scan_facts
from fourdvq.preprocessing.registration import Consistency, FieldFacts, Overlap, Registration
from synthetic_lungs import chest


@pytest.fixture(scope="module")
def facts():
    scan, mask = chest((40, 64, 64))
    return scan_facts(scan, mask.hu > 0, thickness_mm=1.0)


def registration(
    dice: float,
    ncc: float,
    fold: float = 0.0,
    before: float = 0.5,
    inverse: float | None = None,
    kept: bool = True,
    surface: float | None = 2.0,
    gave_up: str = "",
) -> Registration:
    still = sitk.Transform()
    return Registration(
        transform=still,
        start=still,
        matrix=(0.0,) * 12,
        affine_kept=kept,
        field=None,
        unaligned=Overlap(0.5, 0.1),
        before=Overlap(0.9 if dice < 0.97 else 0.988, before),
        after=Overlap(dice, ncc),
        spacing_mm=1.75,
        surface_p95_mm=surface,
        facts=FieldFacts(1.0, 2.0, fold, 0.1),
        mind_before=0.2,
        mind_after=0.1,
        consistency=None if inverse is None else Consistency(inverse / 2, inverse),
        keypoints=None,
        gave_up=gave_up,
    )


@pytest.mark.parametrize(
    ("found", "grade"),
    [
        (registration(0.96, 0.9), "PASS"),
        (registration(0.95, 0.51), "PASS"),
        (registration(0.949, 0.9), "REVIEW"),
        (registration(0.96, 0.9, fold=0.2), "REVIEW"),
        (registration(0.96, 0.5), "REVIEW"),
        (registration(0.899, 0.9), "FAIL"),
        (registration(0.96, 0.9, fold=1.1), "FAIL"),
        (registration(0.96, 0.4), "FAIL"),
        (registration(0.99, 0.985, before=0.99), "PASS"),
        (registration(0.96, 0.9, inverse=3.99), "PASS"),
        (registration(0.96, 0.9, inverse=4.0), "REVIEW"),
        (registration(0.89, 0.9, inverse=1.0), "FAIL"),
        (registration(0.98, 0.9, surface=3.49), "REVIEW"),  # the overlap fell
        (registration(0.986, 0.9, surface=3.49), "PASS"),
        (registration(0.986, 0.9, surface=3.5), "REVIEW"),
        (registration(0.986, 0.9, surface=None), "REVIEW"),
        (registration(0.99, 0.985, before=0.99, gave_up="12 keypoints in the lung"), "FAIL"),
    ],
)
def test_a_pair_is_graded_by_overlap_folding_and_gain(found, grade):
    assert pair_grade(found, LimitsSpec()) == grade


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"lung_ml": 300.0}, "E_NOLUNG"),
        ({"lung_ml": 9000.0}, "V_VOLUME"),
        ({"touches_edge": True}, "E_FOV"),
        ({"two_lungs": False}, "E_ONELUNG"),
        ({"left_right": 0.4}, "V_ONELUNG"),
        ({"left_right": 1.7}, "V_ONELUNG"),
        ({"thickness_mm": 2.6}, "E_THICK"),
        ({"lung_median_hu": -500.0}, "V_MASK"),
        ({"outside_air_hu": -1060.0}, "E_HU"),
        ({"noise_hu": 120.0}, "V_NOISE"),
        ({"hole_percent": 3.1}, "V_MASK"),
        ({"leak_percent": 1.1}, "V_MASK"),
        ({"components": 3}, "V_MASK"),
    ],
)
def test_each_fact_out_of_range_has_its_code(facts, change, code):
    method = "threshold" if code == "E_NOLUNG" else "provided"
    assert scan_codes(facts, LimitsSpec(), method="provided") == []
    assert scan_codes(replace(facts, **change), LimitsSpec(), method=method)[0] == code


@pytest.mark.parametrize(
    ("code", "change", "words"),
    [
        ("E_NOLUNG", {"lung_ml": 300.4}, "300 ml of lung, at least 1000 ml expected"),
        ("E_FOV", {"cut_at": ("top", "back")}, "the lung is cut at: top, back"),
        ("E_ONELUNG", {"right_ml": 2000.0, "left_ml": 0.0}, "right 2000 ml, left 0 ml"),
        ("E_THICK", {"thickness_mm": 4.0}, "4 mm, at most 2.5 mm expected"),
        ("E_HU", {"outside_air_hu": -920.0}, "air around the patient is -920 HU, -1000 expected"),
    ],
)
def test_a_refusal_tells_the_number_that_did_it(facts, code, change, words):
    assert refusal_words(code, vars(replace(facts, **change)), LimitsSpec()) == words
    assert refusal_words(code, {}, LimitsSpec()) == ""
    assert refusal_words("V_VOLUME", vars(facts), LimitsSpec()) == ""


def test_a_pair_tells_of_a_left_out_affine_step_and_of_a_lung_that_changed_much():
    found = registration(0.96, 0.9, kept=False)
    assert pair_codes(found, "PASS", asks_affine=True, volume_change_percent=-34.0) == ["W_AFFINE"]
    assert pair_codes(found, "PASS", asks_affine=False, volume_change_percent=-34.0) == []
    assert pair_codes(found, "FAIL", asks_affine=False, volume_change_percent=36.0) == ["V_REG", "W_VOLUME"]
    assert grade_of(["W_VOLUME"]) == "PASS"


def test_holes_and_leaks_are_measured_as_shares_of_the_lung():
    scan, mask = chest((40, 64, 64))
    lung = mask.hu > 0
    holed = lung.copy()
    z, y, x = (int(c) for c in np.argwhere(lung[:, :, :30]).mean(axis=0))
    holed[z - 2 : z + 3, y - 2 : y + 3, x - 2 : x + 3] = False
    missing = 100.0 * (lung & ~holed).sum() / holed.sum()
    assert scan_facts(scan, lung, thickness_mm=1.0).hole_percent == 0.0
    assert scan_facts(scan, holed, thickness_mm=1.0).hole_percent == pytest.approx(missing)
    leaking = lung.copy()
    leaking[15:25, 2:8, 2:20] = True  # air in front of the body
    facts = scan_facts(scan, leaking, thickness_mm=1.0)
    assert facts.leak_percent == pytest.approx(100.0 * (leaking & ~lung).sum() / leaking.sum(), rel=0.15)
    assert scan_facts(scan, lung, thickness_mm=1.0).leak_percent == 0.0


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_a_body_that_reaches_the_edge_of_the_field_has_not_leaked(margin):
    scan, mask = chest((40, 64, 64))
    body = np.flatnonzero((scan.hu > 0).any(axis=(0, 1)))
    part = np.s_[:, :, body[0] + margin : body[-1] + 1 - margin]
    seen = replace(scan, hu=np.ascontiguousarray(scan.hu[part]))
    facts = scan_facts(seen, np.ascontiguousarray(mask.hu[part] > 0), thickness_mm=1.0)
    assert facts.leak_percent == 0.0
    assert scan_codes(facts, LimitsSpec(), method="provided") == []


def test_a_third_part_of_a_mask_is_counted_from_20_ml_on():
    scan, mask = chest((75, 96, 96))
    lung = mask.hu > 0
    assert scan_facts(scan, lung, thickness_mm=1.0).components == 2
    for edge, parts in ((6, 2), (7, 3)):  # voxels of 4 mm: 14 and 22 ml
        third = lung.copy()
        third[1 : 1 + edge, 44 : 44 + edge, 44 : 44 + edge] = True
        assert scan_facts(scan, third, thickness_mm=1.0).components == parts


def test_the_threshold_method_always_asks_for_a_look(facts):
    assert scan_codes(facts, LimitsSpec(), method="threshold") == ["V_MASK"]
    assert grade_of(["V_MASK"]) == "REVIEW"
    assert grade_of(["W_THICK"]) == "PASS"
    assert grade_of(["V_MASK"], "FAIL") == "FAIL"


def test_the_measured_facts_are_those_of_the_anatomy(facts):
    scan, mask = chest((40, 64, 64))
    assert facts.lung_ml == pytest.approx(mask.hu.sum() * scan.voxel_ml)
    assert facts.left_ml + facts.right_ml == pytest.approx(facts.lung_ml)
    assert facts.two_lungs
    assert not facts.touches_edge
    assert facts.lung_median_hu == pytest.approx(np.median(scan.hu[mask.hu > 0]))
    assert facts.outside_air_hu == pytest.approx(-1000, abs=3)
    assert facts.noise_hu == pytest.approx(15, abs=1.5)
    assert facts.coverage_mm == pytest.approx(300)


@pytest.mark.parametrize("noise", [10.0, 25.0, 60.0, 100.0, 150.0, 200.0])
def test_noise_is_measured_as_what_was_added_however_much_it_is(noise):
    scan, mask = chest((40, 64, 64), noise=noise)
    assert scan_facts(scan, mask.hu > 0, thickness_mm=1.0).noise_hu == pytest.approx(noise, rel=0.1)


@pytest.mark.parametrize(("noise", "codes"), [(80.0, []), (150.0, ["V_NOISE"])])
def test_a_chest_full_of_noise_goes_to_review(noise, codes):
    scan, mask = chest((40, 64, 64), noise=noise)
    assert scan_codes(scan_facts(scan, mask.hu > 0, thickness_mm=1.0), LimitsSpec(), method="provided") == codes


def test_air_is_judged_only_where_even_air_is_in_view():
    scan, mask = chest((40, 64, 64))
    lung, middle = mask.hu > 0, np.s_[:, 20:44, 16:48]  # nothing but body and lung
    wrong = scan_facts(replace(scan, hu=scan.hu + 60), lung, thickness_mm=1.0)
    assert wrong.outside_air_hu == pytest.approx(-940, abs=3)
    cropped = Volume(np.ascontiguousarray(scan.hu[middle]), scan.spacing)
    assert scan_facts(cropped, np.ascontiguousarray(lung[middle]), thickness_mm=1.0).outside_air_hu is None


def test_only_a_scan_far_below_all_others_is_called_expiratory():
    assert expiratory({0: 4000.0, 1: 3500.0, 2: 3300.0}) == set()
    assert expiratory({0: 4000.0, 1: 3300.0, 2: 4100.0}) == {1}
    assert expiratory({0: 4000.0}) == set()
