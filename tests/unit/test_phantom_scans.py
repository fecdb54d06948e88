"""Phantom scans against their truth: lungs in range, disease that only grows, motion that maps mask onto mask."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, label, map_coordinates

from fourdvq.data import phantom
from fourdvq.data.phantom.fields import Grid, lay_down, tube_points, upsample
from fourdvq.data.phantom.motion import motion_of, node_points
from fourdvq.data.phantom.rendering import displacement_field, grid_of

SIZE = (48, 72, 72)
PATIENTS = phantom.draw_patients(3, 21, size=SIZE, scans_per_patient=(2, 3))


@pytest.fixture(scope="module")
def scans():
    return [(p, [phantom.scan(p, v) for v in p.visits]) for p in PATIENTS]


def test_lungs_have_the_volume_and_density_of_lungs(scans):
    for _, made in scans:
        for one in made:
            assert 1000 < one.lung.sum() * one.volume.voxel_ml < 8000
            assert -970 < np.median(one.volume.hu[one.lung]) < -550


def test_there_are_two_lungs_of_similar_size_clear_of_the_first_and_last_slice(scans):
    for _, made in scans:
        parts, count = label(made[0].lung)
        sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1]
        assert count >= 2
        assert 0.5 < sizes[1] / sizes[0] <= 1.0
        assert not made[0].lung[[0, -1]].any()


def test_air_outside_the_body_is_minus_1000_hu(scans):
    for _, made in scans:
        for one in made:
            assert abs(np.median(one.volume.hu[:, :6, :6]) + 1000) < 30


def test_a_trachea_full_of_air_runs_to_the_top_and_is_not_lung(scans):
    for _, made in scans:
        top = slice(-8, -3)
        middle = slice(SIZE[2] // 2 - 8, SIZE[2] // 2 + 8)
        airway = (made[0].volume.hu[top, :, middle] < -600) & ~made[0].lung[top, :, middle]
        inside = airway[:, SIZE[1] // 2 - 12 : SIZE[1] // 2 + 14]
        assert inside.any(axis=(1, 2)).all()


def test_mean_severity_over_the_lung_is_the_extent(scans):
    for patient, made in scans:
        for visit, one in zip(patient.visits, made, strict=True):
            assert one.severity[one.lung].mean() == pytest.approx(visit.extent, abs=0.02)
            assert not one.severity[~one.lung].any()


def test_severity_never_falls_with_time():
    patient = PATIENTS[0]
    fields = [phantom.severity(patient, years) for years in (0.0, 0.5, 1.0, 2.0, 4.0)]
    for earlier, later in itertools.pairwise(fields):
        assert np.all(later >= earlier - 1e-6)
        assert later.mean() > earlier.mean()


def test_severity_is_continuous_in_time():
    patient = PATIENTS[0]
    change = phantom.severity(patient, 1.01) - phantom.severity(patient, 1.0)
    assert change.max() < 0.05


def test_disease_starts_at_the_base_under_the_chest_wall():
    patient = PATIENTS[0]
    lung = phantom.lung_mask(patient)
    ill = phantom.severity(patient, 0.0) > 0.5
    z = np.nonzero(lung)[0]
    low, high = np.quantile(z, [0.33, 0.67])
    rows = np.arange(SIZE[0])[:, None, None]
    share = [ill[part & lung].mean() for part in (rows < low, rows > high)]
    assert share[0] > 2 * share[1]


def test_the_render_is_the_first_scan_without_noise_and_grows_denser():
    patient = PATIENTS[0]
    first = phantom.scan(patient, patient.visits[0])
    now, later = phantom.render(patient, 0.0), phantom.render(patient, 3.0)
    assert now.spacing == first.volume.spacing
    assert now.origin == first.volume.origin
    difference = (now.hu.astype(float) - first.volume.hu)[first.lung]
    assert abs(difference.mean()) < 3
    assert difference.std() < 3 * patient.visits[0].noise_hu
    assert later.hu[first.lung].mean() > now.hu[first.lung].mean() + 5


def test_between_two_times_only_the_lung_and_its_edge_change():
    patient = PATIENTS[0]
    change = phantom.render(patient, 4.0).hu != phantom.render(patient, 0.0).hu
    near = binary_dilation(phantom.lung_mask(patient), iterations=4)
    assert change[phantom.lung_mask(patient)].any()
    assert not change[~near].any()


def test_the_true_displacement_carries_the_follow_up_mask_onto_the_baseline_mask(scans):
    for patient, made in scans:
        for one in made[1:]:
            carried = _dice(made[0].lung, _pulled(one.lung, one.displacement, patient))
            assert carried > 0.95
            assert carried > _dice(made[0].lung, one.lung)


def test_the_true_displacement_carries_the_true_severity(scans):
    # Tissue keeps its place in the order of falling ill, so the warped follow-up is nowhere less ill than the baseline.
    patient, made = scans[0]
    warped = _pulled(made[-1].severity, made[-1].displacement, patient)
    inside = made[0].lung & (_pulled(made[-1].lung, made[-1].displacement, patient) > 0.99)
    assert np.mean(warped[inside] > made[0].severity[inside] - 0.1) > 0.97


def test_motion_forward_and_backward_are_inverse():
    patient = PATIENTS[1]
    motion = motion_of(patient, patient.visits[-1], grid_of(patient))
    points = node_points(grid_of(patient)) * 0.8
    np.testing.assert_allclose(motion.forward(motion.backward(points)), points, atol=0.02)


def test_motion_does_not_fold():
    for patient in PATIENTS:
        grid = grid_of(patient)
        for visit in patient.visits:
            motion = motion_of(patient, visit, grid)
            points = node_points(grid)
            step = 1e-3
            columns = [(motion.forward(points + step * e) - motion.forward(points)) / step for e in np.eye(3)]
            assert np.linalg.det(np.stack(columns, axis=2)).min() > 0.3


def test_sizes_sample_the_same_chest():
    fine = phantom.draw_patients(1, 21, size=(48, 96, 96))[0]
    coarse = phantom.draw_patients(1, 21, size=(24, 48, 48))[0]
    a, b = phantom.render(fine, 1.0).hu, phantom.render(coarse, 1.0).hu
    pooled = a.reshape(24, 2, 48, 2, 48, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(pooled.ravel(), b.ravel())[0, 1] > 0.98
    assert abs(pooled.mean() - b.mean()) < 8


def test_scanners_of_the_sites_differ_in_noise_and_scale():
    noise, level = {}, {}
    for site in ("leuven", "southampton", "external"):
        patient = phantom.draw_patients(1, 4, size=(24, 64, 64), site=site)[0]
        air = phantom.scan(patient, patient.visits[0]).volume.hu[:, :8, :8]
        noise[site], level[site] = air.std(), np.median(air)
    assert noise["southampton"] > noise["leuven"] > noise["external"]
    assert level["southampton"] > level["external"]


def test_a_tube_keeps_its_volume_at_every_voxel_size():
    path = np.array([[-40.0, -30.0, -35.0], [0.0, 10.0, 5.0], [35.0, 20.0, 45.0]])
    length = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
    for size in ((24, 24, 24), (60, 70, 80), (100, 100, 100)):
        grid = Grid(size, (-60.0, -60.0, -60.0), (120.0, 120.0, 120.0))
        filled = lay_down(grid, *tube_points(path, 1.2, 0.8)).sum() * np.prod(grid.spacing)
        assert filled == pytest.approx(np.pi * 1.2**2 * length, rel=0.02)


def test_upsampling_reproduces_a_cubic_exactly():
    at = [np.linspace(0, 1, n) for n in (5, 6, 7)]
    z, y, x = np.meshgrid(*at, indexing="ij")
    fine = [(np.arange(n) + 0.5) / n for n in (11, 12, 13)]
    zf, yf, xf = np.meshgrid(*fine, indexing="ij")
    np.testing.assert_allclose(upsample(z**3 - 2 * y**2 + x * y, (11, 12, 13)), zf**3 - 2 * yf**2 + xf * yf, atol=1e-5)


def _pulled(field, nodes, patient):
    """The follow-up's field on the baseline's grid, by the true displacement (x, y, z, in mm)."""
    moved = displacement_field(nodes, SIZE)
    spacing = grid_of(patient).spacing
    places = [g + moved[c] / s for g, c, s in zip(np.indices(SIZE), (2, 1, 0), spacing, strict=True)]
    return map_coordinates(field.astype(np.float32), places, order=1)


def _dice(a, b):
    a, b = a > 0.5, b > 0.5
    return 2 * (a & b).sum() / (a.sum() + b.sum())
