"""What is said about a registration: its features, its field, and whether the way back undoes the way there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage, spatial

from fourdvq.errors import RegistrationError
from fourdvq.preprocessing.profile import RegistrationSpec
from fourdvq.preprocessing.registration import jacobian_determinant, register
from fourdvq.preprocessing.registration.facts import consistency, surface_p95_mm
from fourdvq.preprocessing.registration.mind import gaussian_taps, mind_distance, mind_ssc
from synthetic_lungs import chest

SIZE = (20, 24, 28)


def noise(seed: int = 0) -> np.ndarray:
    values = ndimage.gaussian_filter(np.random.default_rng(seed).normal(0, 300, SIZE), 1.0)
    return values.astype(np.float32)


def constant_field(u_xyz: tuple[float, float, float], direction: np.ndarray | None = None) -> sitk.Image:
    field = sitk.GetImageFromArray(np.broadcast_to(np.array(u_xyz), (*SIZE, 3)).copy(), isVector=True)
    field.SetSpacing((2.0, 2.5, 3.0))
    if direction is not None:
        field.SetDirection(direction.ravel().tolist())
    return field


def test_the_distance_of_two_outlines_is_that_of_their_surfaces_and_not_of_their_volumes():
    a = np.zeros((20, 20, 20), dtype=bool)
    a[4:16, 4:16, 4:16] = True
    b = np.zeros_like(a)
    b[4:16, 4:16, 7:16] = True
    assert surface_p95_mm(a, a, (2.0, 1.0, 1.0)) == 0.0
    assert surface_p95_mm(a, b, (2.0, 1.0, 1.0)) == surface_p95_mm(b, a, (2.0, 1.0, 1.0)) == 3.0
    assert surface_p95_mm(a, np.zeros_like(a), (1.0, 1.0, 1.0)) is None


def test_features_in_the_middle_follow_the_published_formula():
    """Each channel written out for itself: difference of two neighbours, squared, averaged, minimum taken off."""
    image = noise()
    offsets = [np.array(o) for o in [(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)]]
    pairs = [(a, b) for a, b in itertools.combinations(offsets, 2) if ((a - b) ** 2).sum() == 2]
    taps = gaussian_taps(1.0)
    distances = []
    for a, b in pairs:
        difference = (np.roll(image, -a, (0, 1, 2)) - np.roll(image, -b, (0, 1, 2))).astype(np.float64) ** 2
        for axis in range(3):
            difference = ndimage.correlate1d(difference, taps, axis)
        distances.append(difference)
    distance = np.stack(distances) - np.min(distances, axis=0)
    variance = distance.mean(axis=0)
    found = mind_ssc(torch.from_numpy(image)).numpy()
    middle = (slice(5, -5),) * 3
    # The scale of V is the mean over the whole image, whose rim is padded: it comes out of the found features.
    expected = -distance / variance
    clear = np.abs(expected[(0, *middle)]) < 8
    for channel in range(12):
        np.testing.assert_allclose(
            np.log(found[(channel, *middle)])[clear], expected[(channel, *middle)][clear], rtol=2e-3, atol=2e-4
        )


def test_features_do_not_depend_on_brightness_or_contrast():
    image = noise()
    a, b = (mind_ssc(torch.from_numpy(i)) for i in (image, 3 * image - 500))
    assert torch.allclose(a, b, atol=1e-4)
    assert mind_distance(image, 3 * image - 500, np.ones(SIZE, bool)) < 1e-8
    assert 0.01 < mind_distance(image, noise(1), np.ones(SIZE, bool)) < 1.0


def test_an_image_without_contrast_is_refused():
    with pytest.raises(RegistrationError, match="E_REG"):
        mind_ssc(torch.full(SIZE, -1000.0))


def test_two_opposite_shifts_are_consistent_and_two_equal_ones_are_not():
    mask = np.zeros(SIZE, bool)
    mask[6:-6, 6:-6, 6:-6] = True
    turned = spatial.transform.Rotation.from_euler("xyz", [0.2, -0.3, 0.4]).as_matrix()
    for direction in (None, turned):
        there = constant_field((1.0, -2.0, 3.0), direction)
        back, same = constant_field((-1.0, 2.0, -3.0), direction), constant_field((1.0, -2.0, 3.0), direction)
        assert consistency(there, back, mask).p95_mm == pytest.approx(0.0, abs=1e-9)
        assert consistency(there, same, mask).mean_mm == pytest.approx(2 * np.sqrt(14.0))


def test_the_jacobian_of_a_stretch_is_the_same_on_an_oblique_grid():
    """u = 0.1 times the distance along the grid's own x axis stretches by 1.1 however the grid lies in space."""
    turned = spatial.transform.Rotation.from_euler("xyz", [0.3, 0.2, -0.5]).as_matrix()
    along = np.arange(SIZE[2]) * 2.0 * 0.1
    u = along[None, None, :, None] * turned[:, 0] * np.ones((*SIZE, 1))
    field = sitk.GetImageFromArray(u, isVector=True)
    field.SetSpacing((2.0, 2.5, 3.0))
    field.SetDirection(turned.ravel().tolist())
    np.testing.assert_allclose(jacobian_determinant(field), 1.1, atol=1e-9)


@pytest.mark.parametrize("backend", ["demons", "corrfield"])
def test_a_registration_says_how_well_it_is_undone_and_how_alike_the_scans_became(backend):
    fixed, mask = chest((48, 60, 60))
    moving, moving_mask = chest((48, 60, 60), scale=0.95, shift_mm=(6.0, 0.0, 4.0))
    spec = RegistrationSpec(
        backend=backend,
        preset="fast",
        spacing_mm=6.0,
        affine_iterations=30,
        affine_sample_share=1.0,
        shrink=(2, 1),
        iterations=(20, 8),
    )
    found = register(fixed, mask.hu > 0, moving, moving_mask.hu > 0, spec)
    assert found.mind_after < found.mind_before
    assert found.consistency.mean_mm <= found.consistency.p95_mm < 4.0
    assert found.keypoints is None if backend == "demons" else found.keypoints.count >= 100


def test_a_registration_without_a_field_has_nothing_to_undo():
    fixed, mask = chest((48, 60, 60))
    still = register(fixed, mask.hu > 0, fixed, mask.hu > 0, RegistrationSpec(backend="none", spacing_mm=6.0))
    assert still.consistency is None
    assert still.keypoints is None
    assert still.mind_after == still.mind_before < 1e-6
