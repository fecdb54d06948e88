"""CorrField on real chest CT: a planted motion of a whole chest, and a patient's two scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fourdvq.preprocessing.profile import RegistrationSpec
from fourdvq.preprocessing.registration import Registration, register
from registration_cases import PairCase, planted, real_pair, rimmed


def aligned(case: PairCase, spec: RegistrationSpec) -> Registration:
    return register(case.fixed, case.fixed_mask, case.moving, case.moving_mask, spec)


@pytest.mark.slow
def test_a_planted_motion_of_eight_millimetres_is_found_on_a_coarse_grid(real_data: Path):
    case = planted(real_data, 3, largest_mm=8.0)
    found = aligned(case, RegistrationSpec(preset="fast", spacing_mm=2.5))
    errors = case.errors(found.transform)
    assert case.errors(found.start).mean() > 1.5 * errors.mean()
    assert errors.mean() < 0.9
    assert np.percentile(errors, 95) < 1.6
    assert found.facts.fold_percent < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("thickness_mm", "least"), [(6.0, 0.75), (12.0, 0.95)])
def test_new_dense_tissue_under_the_pleura_stays_in_the_lung(real_data: Path, thickness_mm: float, least: float):
    """By HU alone the inner edge of the rim is taken for the pleura: then 0.65 and 0.6 of it are left."""
    ill = rimmed(real_data, 3, thickness_mm=thickness_mm)
    found = aligned(ill.case, RegistrationSpec(preset="fast", spacing_mm=2.5))
    assert least < ill.kept(found.transform) < 1.1
    assert ill.case.errors(found.transform).mean() < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("same_scan", [True, False])
def test_the_real_follow_up_is_aligned_without_folds_and_the_way_back_undoes_it(real_data: Path, same_scan: bool):
    found = aligned(real_pair(real_data, same_scan=same_scan), RegistrationSpec())
    assert found.after.dice >= 0.975
    assert found.after.ncc > 0.85 > found.before.ncc
    assert found.facts.fold_percent < 0.1
    assert found.consistency.p95_mm < 4.0
    assert found.mind_after < 0.6 * found.mind_before
    assert found.keypoints.count > 1000
