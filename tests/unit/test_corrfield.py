"""CorrField as a whole: known motions come back, an identity stays one, and what cannot be aligned is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage, spatial

from fourdvq.errors import ConfigError, RegistrationError
from fourdvq.preprocessing.grid import Grid
from fourdvq.preprocessing.plugged_in import backend_version
from fourdvq.preprocessing.profile import RegistrationSpec, load_profile
from fourdvq.preprocessing.records import output_key, recipe_key
from fourdvq.preprocessing.registration import AlignedPair, FoundField, backend_named, backend_names
from fourdvq.preprocessing.registration.corrfield import corrfield_field
from fourdvq.preprocessing.registration.demons import demons_field

SIZE = (52, 56, 60)
FAST = RegistrationSpec(backend="corrfield", preset="fast", spacing_mm=2.0, clamp_hu=(-1000.0, 500.0))
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def lung(shape: tuple[int, int, int] = SIZE, *, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """HU float32 of an ellipsoid of lung full of vessel-like blobs in soft tissue, and its mask."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.normal(size=shape), 1.3)
    blobs += ndimage.gaussian_filter(rng.normal(size=shape), 2.5) * 3
    axes = np.meshgrid(*[np.linspace(-1.25, 1.25, n) for n in shape], indexing="ij")
    mask = np.square(axes).sum(axis=0) < 1
    hu = np.where(mask, -850 + 250 * np.clip(blobs / blobs.std(), 0, 3), 40.0)
    hu = ndimage.gaussian_filter(hu, 0.6) + np.random.default_rng(seed + 1).normal(0, noise, shape)
    return hu.astype(np.float32), mask


def pair(fixed, mask, moving, moving_mask=None, *, spacing: float = 2.0, direction=IDENTITY) -> AlignedPair:
    grid = Grid(fixed.shape, (spacing,) * 3, (-40.0, 10.0, 300.0), direction)
    moving_mask = mask if moving_mask is None else moving_mask
    shares = mask.astype(np.float32), moving_mask.astype(np.float32)
    return AlignedPair(grid, fixed, shares[0], moving.astype(np.float32), shares[1])


def vectors(found: FoundField) -> np.ndarray:
    """u in mm, components x, y, z: (D, H, W, 3)."""
    return sitk.GetArrayFromImage(found.u)


@pytest.fixture(scope="module")
def still() -> tuple[np.ndarray, np.ndarray]:
    return lung()


@pytest.fixture(scope="module")
def bent(still) -> tuple[AlignedPair, np.ndarray]:
    """moving(y) = fixed(y + b(y)) with a smooth b; the truth u (D, H, W, 3) in mm solves u(x) = -b(x + u(x))."""
    fixed, mask = still
    z, y, x = np.meshgrid(*[np.linspace(0, np.pi, n) for n in SIZE], indexing="ij")
    b = np.stack([3.5 * np.sin(y) * np.sin(x), -2.5 * np.sin(z) * np.cos(x), 3.0 * np.cos(y) * np.sin(z)])
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=float) for n in SIZE], indexing="ij"))
    moving = ndimage.map_coordinates(fixed, grid + b, order=3, mode="nearest")
    moving += np.random.default_rng(5).normal(0, 15, SIZE)
    moving_mask = ndimage.map_coordinates(mask.astype(float), grid + b, order=1) > 0.5
    u = np.zeros_like(b)
    for _ in range(30):
        u = -np.stack([ndimage.map_coordinates(c, grid + u, order=1, mode="nearest") for c in b])
    return pair(fixed, mask, moving, moving_mask), np.moveaxis(u[::-1], 0, -1) * 2.0


def test_an_image_onto_itself_does_not_move(still):
    fixed, mask = still
    for preset in ("fast", "default"):
        found = corrfield_field(pair(fixed, mask, fixed), RegistrationSpec(**{**vars(FAST), "preset": preset}))
        assert np.linalg.norm(vectors(found)[mask], axis=-1).mean() < 0.02


def test_the_noise_of_a_second_scan_moves_little(still):
    fixed, mask = still
    again = fixed + np.random.default_rng(3).normal(0, 20, SIZE)
    length = np.linalg.norm(vectors(corrfield_field(pair(fixed, mask, again), FAST))[mask], axis=-1)
    assert length.mean() < 0.2
    assert np.percentile(length, 95) < 0.6


def test_a_shift_of_ten_voxels_is_recovered(still):
    fixed, mask = still
    shifted, moved_mask = np.roll(fixed, (0, 10, 0), (0, 1, 2)), np.roll(mask, (0, 10, 0), (0, 1, 2))
    shifted[:, :10] = 40.0
    moved_mask[:, :10] = False
    found = vectors(corrfield_field(pair(fixed, mask, shifted, moved_mask), FAST))
    error = np.linalg.norm(found - np.array([0.0, 20.0, 0.0]), axis=-1)[mask]
    assert error.mean() < 0.5
    assert np.percentile(error, 95) < 1.5


def test_a_known_smooth_field_is_found_and_its_keypoints_agree_with_it(bent):
    scans, truth = bent
    inside = ndimage.binary_erosion(scans.fixed_mask, iterations=2)
    found = corrfield_field(scans, FAST)
    error = np.linalg.norm(vectors(found) - truth, axis=-1)[inside]
    assert np.linalg.norm(truth[inside], axis=-1).mean() > 4.0
    assert error.mean() < 0.9
    assert np.percentile(error, 95) < 1.6
    assert found.keypoints.count >= 100
    assert found.keypoints.residual_p95_mm < 2.0


def test_the_same_pair_gives_the_same_bytes_on_any_number_of_threads(bent):
    scans, _ = bent
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(vectors(corrfield_field(scans, FAST)).tobytes())
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert results[0] == results[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_the_same_field(bent):
    scans, _ = bent
    difference = vectors(corrfield_field(scans, FAST, "cuda")) - vectors(corrfield_field(scans, FAST))
    assert np.linalg.norm(difference, axis=-1)[scans.fixed_mask].max() < 0.05


def test_the_field_follows_the_spacing_and_the_direction_of_the_grid(bent):
    """The same voxels with another voxel size and turned axes: the same field in voxels along the axes."""
    scans, _ = bent
    turned = spatial.transform.Rotation.from_euler("xyz", [0.1, -0.2, 0.7]).as_matrix()
    grid = Grid(SIZE, (1.0,) * 3, (7.0, 8.0, 9.0), tuple(turned.ravel()))
    other = AlignedPair(grid, scans.fixed, scans.fixed_share, scans.moving, scans.moving_share)
    small = corrfield_field(other, RegistrationSpec(**{**vars(FAST), "spacing_mm": 1.0}))
    # The ridge of the spline is a length squared, so stiffness is not quite the same.
    difference = vectors(corrfield_field(scans, FAST)) / 2.0 - vectors(small) @ turned
    assert np.linalg.norm(difference, axis=-1)[scans.fixed_mask].mean() < 0.1


def test_lung_that_became_ill_moves_less_than_half_of_what_demons_move_it(still):
    """A dense patch appears and nothing moves: what a map finds there, it takes away from the disease."""
    fixed, mask = still
    z, y, x = np.meshgrid(*[np.arange(n, dtype=float) for n in SIZE], indexing="ij")
    patch = (z - 26) ** 2 + (y - 34) ** 2 + (x - 38) ** 2 < 9**2
    rng = np.random.default_rng(8)
    texture = ndimage.gaussian_filter(rng.normal(size=SIZE), 0.8)
    ill = np.where(patch, np.maximum(fixed, -450 + 200 * texture / texture.std()), fixed)
    ill = ndimage.gaussian_filter(ill, 0.5) + rng.normal(0, 15, SIZE)
    ours, demons = (find(pair(fixed, mask, ill), FAST, "cpu") for find in (corrfield_field, demons_field))
    moved, by_demons = (np.linalg.norm(vectors(found)[patch], axis=-1).mean() for found in (ours, demons))
    assert moved < 1.0
    assert moved < 0.5 * by_demons


def test_a_constant_scan_and_a_lung_without_structure_are_refused(still):
    fixed, mask = still
    constant = np.full(SIZE, -1000.0, dtype=np.float32)
    few = np.zeros_like(mask)
    few[20:26, 20:26, 20:26] = True
    for scans in (pair(constant, mask, fixed), pair(fixed, mask, constant), pair(fixed, few, fixed)):
        with pytest.raises(RegistrationError, match="E_REG"):
            corrfield_field(scans, FAST)


def test_a_backend_of_another_package_is_found_by_its_name(tmp_path, monkeypatch):
    """A package with an entry point, as an installation leaves it: a module and its dist-info."""
    (tmp_path / "nudging_backend.py").write_text(
        "import numpy as np, SimpleITK as sitk\n"
        "from fourdvq.preprocessing.registration import Backend, FoundField\n"
        "def nudge(pair, spec, device):\n"
        "    u = sitk.GetImageFromArray(np.full((*pair.grid.size, 3), 1.5), isVector=True)\n"
        "    return FoundField(u)\n"
        "backend = Backend(affine=False, field=nudge)\n"
        "number = 3\n"
    )
    info = tmp_path / "nudging_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nudging-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fourdvq.registration]\nnudge = nudging_backend:backend\nodd = nudging_backend:number\ngone = nowhere:x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"nudge", "corrfield", "demons", "affine", "none"} <= set(backend_names())
    backend = backend_named("nudge")
    fixed, mask = lung((8, 8, 8))
    assert (vectors(backend.field(pair(fixed, mask, fixed), FAST, "cpu")) == 1.5).all()
    plain = load_profile(Path(__file__).parents[2] / "configs" / "preprocessing" / "tiny.yaml")
    nudged = replace(plain, registration=replace(plain.registration, backend="nudge"))
    backend_version.cache_clear()
    before = output_key("a", nudged, "b"), recipe_key("a", nudged)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nudging-backend\nVersion: 1.1\n")
    backend_version.cache_clear()
    assert not {*before} & {output_key("a", nudged, "b"), recipe_key("a", nudged)}
    for name in ("odd", "gone", "never-heard-of"):
        with pytest.raises(ConfigError, match="E_UNSUPPORTED"):
            backend_named(name)
