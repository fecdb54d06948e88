"""T maps baseline points to follow-up points: known shifts, affine maps and fields are found, and folds are seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from fourdvq.data.volume import Volume, to_image
from fourdvq.errors import RegistrationError
from fourdvq.preprocessing.grid import Grid, empty_image, full_box, grid_of_size, grid_of_spacing, lung_box, resample
from fourdvq.preprocessing.profile import RegistrationSpec
from fourdvq.preprocessing.registration import BACKENDS, compose, field_facts, jacobian_determinant, register
from fourdvq.preprocessing.registration.align import affine, centroid_shift, dice, ncc, overlap, working_pair
from synthetic_lungs import chest

SPEC = RegistrationSpec(
    backend="demons",
    spacing_mm=5.0,
    margin_mm=15.0,
    clamp_hu=(-1000.0, 300.0),
    affine_iterations=40,
    affine_sample_share=1.0,
    shrink=(2, 1),
    iterations=(25, 12),
)
SIZE = (60, 76, 76)  # voxels of 5 mm


@pytest.fixture(scope="module")
def still() -> tuple[Volume, np.ndarray]:
    scan, mask = chest(SIZE)
    return scan, mask.hu > 0


def points_in(mask: np.ndarray, scan: Volume, n: int = 200) -> np.ndarray:
    """(n, 3) LPS positions of random voxels inside a mask."""
    at = np.argwhere(mask)
    chosen = at[np.random.default_rng(0).choice(len(at), n, replace=False)]
    return np.array(scan.origin) + chosen[:, ::-1] * np.array(scan.spacing[::-1])


def error_mm(transform: sitk.Transform, points: np.ndarray, truth: np.ndarray) -> float:
    found = np.array([transform.TransformPoint(p.tolist()) for p in points])
    return float(np.linalg.norm(found - truth, axis=1).mean())


@pytest.mark.parametrize("backend", ["none", "affine", "demons"])
def test_a_pure_shift_is_found_in_the_right_direction(still, backend):
    fixed, mask = still
    shift_zyx = (15.0, -10.0, 20.0)
    moving, moving_mask = chest(SIZE, shift_mm=shift_zyx)
    found = register(fixed, mask, moving, moving_mask.hu > 0, RegistrationSpec(**{**vars(SPEC), "backend": backend}))
    points = points_in(mask, fixed)
    assert error_mm(found.transform, points, points + np.array(shift_zyx[::-1])) < 1.0
    assert found.unaligned.dice < 0.85 < found.after.dice
    assert found.facts.fold_percent == 0


def test_a_smaller_and_shifted_lung_is_found_by_the_affine_step(still):
    """The test chest shrinks about the middle of the grid: x -> 0.9 x + shift."""
    fixed, mask = still
    moving, moving_mask = chest(SIZE, scale=0.9, shift_mm=(6.0, 0.0, 0.0))
    found = register(fixed, mask, moving, moving_mask.hu > 0, RegistrationSpec(**{**vars(SPEC), "backend": "affine"}))
    points = points_in(mask, fixed)
    centre = np.array(fixed.origin) + (np.array(SIZE[::-1]) - 1) / 2 * np.array(fixed.spacing[::-1])
    truth = centre + 0.9 * (points - centre) + np.array([0.0, 0.0, 6.0])
    assert found.affine_kept
    assert error_mm(found.transform, points, truth) < 1.5
    np.testing.assert_allclose(np.array(found.matrix).reshape(3, 4)[:, :3], 0.9 * np.eye(3), atol=0.03)
    assert error_mm(found.start, points, truth) > 4.0


def test_an_affine_step_that_makes_it_worse_is_taken_back(still):
    """A lung full of fluid in the second scan: the step draws the other lung over it, though all lies where it lay."""
    scan, mask = still
    right = mask & (np.arange(SIZE[2]) < SIZE[2] // 2)
    filled = Volume(np.where(right, 40 + (scan.hu + 850) // 4, scan.hu).astype(np.int16), scan.spacing, scan.origin)
    spec = replace(SPEC, backend="affine")
    found = register(scan, mask, filled, mask, spec)
    pair = working_pair(scan, mask, filled, mask, spec)
    tried = overlap(pair, affine(pair, centroid_shift(pair), spec))
    assert tried.dice < found.before.dice - 0.1
    assert tried.ncc < found.before.ncc - 0.02
    assert not found.affine_kept
    assert found.after == found.before
    np.testing.assert_allclose(np.array(found.matrix).reshape(3, 4), np.eye(3, 4), atol=1e-9)


def test_demons_find_a_known_smooth_deformation(still):
    fixed, mask = still
    x = np.linspace(-np.pi, np.pi, SIZE[2])
    u = np.zeros((*SIZE, 3))
    u[..., 2] = 6.0 * np.cos(x / 2)[None, None, :] * np.cos(np.linspace(-np.pi / 2, np.pi / 2, SIZE[0]))[:, None, None]
    field = sitk.GetImageFromArray(u, isVector=True)
    field.CopyInformation(to_image(fixed))
    # moving(y) with y = x + u(x): sample the fixed scan at the inverse of the field.
    inverse = sitk.InvertDisplacementField(field, maximumNumberOfIterations=40)
    warp = sitk.DisplacementFieldTransform(inverse)
    moving = sitk.Resample(
        sitk.Cast(to_image(fixed), sitk.sitkFloat32), to_image(fixed), warp, sitk.sitkLinear, -1000.0
    )
    moved_mask = sitk.Resample(
        to_image(Volume(mask, fixed.spacing, fixed.origin)), to_image(fixed), warp, sitk.sitkNearestNeighbor
    )
    follow_up = Volume(sitk.GetArrayFromImage(moving).astype(np.int16), fixed.spacing, fixed.origin)
    found = register(fixed, mask, follow_up, sitk.GetArrayFromImage(moved_mask) > 0, SPEC)
    points = points_in(mask, fixed)
    truth = np.array([sitk.DisplacementFieldTransform(sitk.Image(field)).TransformPoint(p.tolist()) for p in points])
    start = error_mm(sitk.Transform(), points, truth)
    assert start > 2.5
    assert error_mm(found.transform, points, truth) < 0.5 * start
    assert found.after.ncc > found.before.ncc


def test_registration_is_the_same_each_time(still):
    fixed, mask = still
    moving, moving_mask = chest(SIZE, scale=0.95)
    runs = [register(fixed, mask, moving, moving_mask.hu > 0, SPEC) for _ in range(2)]
    assert runs[0].matrix == runs[1].matrix
    assert runs[0].after == runs[1].after
    np.testing.assert_array_equal(sitk.GetArrayFromImage(runs[0].field), sitk.GetArrayFromImage(runs[1].field))


def test_a_composed_transform_is_the_affine_after_the_field():
    field = sitk.Compose(*[sitk.Image([8, 8, 8], sitk.sitkFloat64) + value for value in (1.0, 2.0, 3.0)])
    linear = sitk.AffineTransform(3)
    linear.Scale(2.0)
    assert compose(linear, field).TransformPoint((3.0, 3.0, 3.0)) == pytest.approx((8.0, 10.0, 12.0))


def test_folding_is_seen_in_the_jacobian():
    size = (10, 12, 14)
    z, y, x = np.meshgrid(*[np.arange(n, dtype=float) for n in size], indexing="ij")
    for factor, determinant in ((0.1, 1.1), (-2.0, -1.0)):
        u = np.stack([factor * 2.0 * x, 0 * y, 0 * z], axis=-1)  # spacing 2 mm along x
        field = sitk.GetImageFromArray(u, isVector=True)
        field.SetSpacing((2.0, 3.0, 4.0))
        np.testing.assert_allclose(jacobian_determinant(field), determinant, atol=1e-9)
        facts = field_facts(field, np.ones(size, dtype=bool))
        assert facts.fold_percent == (100.0 if determinant < 0 else 0.0)
        assert facts.sd_log_j == pytest.approx(0.0, abs=1e-9)


def test_lungs_that_cannot_be_brought_together_are_refused(still):
    fixed, mask = still
    odd = np.zeros_like(mask)
    odd[0, 0, 0] = odd[-1, -1, -1] = True
    with pytest.raises(RegistrationError, match="E_REG"):
        register(fixed, mask, fixed, odd, SPEC)


def test_overlap_measures_have_their_textbook_values():
    a, b = np.zeros((2, 2, 2), bool), np.zeros((2, 2, 2), bool)
    a[0] = True
    b[:, 0] = True
    assert dice(a, b) == 0.5
    x = np.random.default_rng(0).normal(size=(4, 5, 6))
    everywhere = np.ones(x.shape, bool)
    assert ncc(x, -3 * x + 2, everywhere) == pytest.approx(-1.0)
    assert ncc(x, x**2, everywhere) == pytest.approx(np.corrcoef(x.ravel(), (x**2).ravel())[0, 1])
    assert ncc(x, np.ones_like(x), everywhere) == 0.0


def test_grids_cover_their_box_and_resampling_onto_the_own_grid_changes_nothing(still):
    scan, mask = still
    same = grid_of_size(scan, full_box(scan), SIZE)
    np.testing.assert_allclose(resample(sitk.Cast(to_image(scan), sitk.sitkFloat32), same), scan.hu, atol=1e-3)
    box = lung_box(mask, scan.spacing, 10.0)
    grid = grid_of_size(scan, box, (16, 24, 32))
    assert tuple(n * s for n, s in zip(grid.size, grid.spacing, strict=True)) == pytest.approx(
        tuple(h - low for h, low in zip(box.high, box.low, strict=True))
    )
    iso = grid_of_spacing(scan, box, 7.0)
    assert iso.spacing == (7.0, 7.0, 7.0)
    inside = resample(to_image(Volume(mask, scan.spacing, scan.origin)), iso, nearest=True, outside=0) > 0
    assert inside.sum() * 0.343 == pytest.approx(mask.sum() * scan.voxel_ml, rel=0.02)
    assert isinstance(empty_image(Grid((2, 3, 4), (1, 1, 1), (0, 0, 0), scan.direction)), sitk.Image)


def test_the_table_of_backends_names_what_a_profile_may_ask_for():
    assert set(BACKENDS) == {"corrfield", "demons", "affine", "none"}
