"""R231: the network and what stands around it are those of lungmask 0.2.22, which gave the recorded numbers here.

The package itself is compared in tests/reference/test_lungmask_package.py where it is installed.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdvq.errors import ConfigError, ModelError
from fourdvq.preprocessing.profile import SegmentationSpec
from fourdvq.preprocessing.segmentation import check_weights, r231, segmenter
from fourdvq.preprocessing.segmentation.r231 import R231, between_slices
from fourdvq.preprocessing.segmentation.r231_network import SliceUNet, network_from
from fourdvq.preprocessing.segmentation.r231_slices import Crop, clean_labels, network_input, to_slice
from r231_cases import blobs, formula_tensors, slice_of_ellipses, two_bands, two_lungs, weights_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("weights") / "unet_r231.pth"
    return path, weights_file(path, two_bands())


def spec(sha256: str, step_mm: float | None = None) -> SegmentationSpec:
    return SegmentationSpec(method="lungmask_r231", weights_sha256=sha256, step_mm=step_mm)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# --- the parts, against what the package gave --------------------------------------------------------------------


def test_the_network_gives_the_packages_numbers_for_weights_of_a_formula():
    axial = (slice_of_ellipses(64, 64).astype(np.float32) + 1024) / 1624
    with torch.inference_mode():
        found = network_from(formula_tensors())(torch.from_numpy(axial)[None, None])[0]
    recorded = {
        (0, 0): (-0.58683, -2.41399, -1.03718),
        (20, 31): (-0.94187, -0.86486, -1.66604),
        (40, 40): (-0.59217, -2.13031, -1.11451),
        (63, 5): (-0.74917, -5.99491, -0.64483),
    }
    for (y, x), numbers in recorded.items():
        assert found[:, y, x].tolist() == pytest.approx(numbers, abs=1e-4)
    assert found.sum().item() == pytest.approx(-17446.03, abs=0.5)


def test_the_full_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        used = sum(p.numel() for p in SliceUNet().parameters())
    # The published file holds a 1 x 1 convolution and a normalisation per level and per way up that nothing uses.
    levels = [1, 64, 128, 256, 512, 1024]
    pairs = [*itertools.pairwise(levels)]
    ways_up = [(1024, 512), (512, 256), (256, 128), (128, 64)]
    unused = sum(a * b + 3 * b for a, b in [*pairs, *ways_up, *ways_up])
    assert used + unused == 31_054_275


@pytest.mark.parametrize(
    ("size", "crop", "mean"),
    [((120, 100), (21, 9, 90, 88), 0.367056), ((256, 256), (22, 10, 90, 88), 0.372117)],
)
def test_a_slice_is_cropped_and_scaled_as_the_package_does(size, crop, mean):
    seen, found = network_input(slice_of_ellipses(*size))
    assert (found.top, found.left, found.bottom, found.right) == crop
    assert seen.dtype == np.float32
    assert seen.mean() == pytest.approx(mean, abs=1e-5)
    assert (seen[128, 60], seen[128, 128], seen[5, 5]) == pytest.approx((0.100985, 0.655172, 0.014778), abs=1e-5)
    back = to_slice((seen < 0.2).astype(np.uint8), found, size)
    assert int(back.sum()) == {(120, 100): 2703, (256, 256): 2590}[size]


def test_a_slice_without_tissue_is_taken_whole():
    seen, crop = network_input(np.full((40, 50), -1024, dtype=np.int16))
    assert crop == Crop(0, 0, 40, 50)
    assert not seen.any()


@pytest.mark.parametrize(
    ("shape", "seed", "counts", "sha256"),
    [
        ((9, 20, 22), 1, [2302, 882, 776], "e703e7ceee9e0577"),
        ((14, 24, 24), 7, [4289, 2054, 1721], "1084fcdc21f01d1c"),
    ],
)
def test_ragged_labels_are_cleaned_to_the_packages_voxels(shape, seed, counts, sha256):
    found = clean_labels(blobs(shape, seed))
    assert np.bincount(found.ravel()).tolist() == counts
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == sha256


# --- the whole way, from a file of weights to a mask -------------------------------------------------------------


def test_both_lungs_are_masked_with_the_nodule_and_the_foreign_pocket_inside(weights):
    scan, lungs = two_lungs()
    path, sha256 = weights
    find = segmenter(spec(sha256), weights=path)
    found = find(scan, None)
    assert found.shape == scan.hu.shape
    assert found.dtype == bool
    assert dice(found, lungs) > 0.98
    assert found[11:13, 52:54, 27:29].all()  # the middle of the nodule
    np.testing.assert_array_equal(find(scan, scan), found)  # a given mask changes nothing


@pytest.mark.parametrize("step_mm", [13.0, 26.0, 40.0])
def test_slices_in_between_are_interpolated_close_to_the_lungs(weights, step_mm):
    scan, lungs = two_lungs()
    path, sha256 = weights
    found = segmenter(spec(sha256, step_mm), weights=path)(scan, None)
    assert dice(found, lungs) > 0.96


def test_a_step_below_the_slice_spacing_looks_at_every_slice(weights):
    scan, _ = two_lungs()
    path, sha256 = weights
    every = segmenter(spec(sha256), weights=path)(scan, None)
    np.testing.assert_array_equal(segmenter(spec(sha256, 3.0), weights=path)(scan, None), every)


def test_interpolation_keeps_the_slices_it_was_given_and_moves_the_border_evenly():
    masks = np.zeros((3, 9, 40), dtype=bool)
    masks[0, :, :10], masks[1, :, :20] = True, True
    found = between_slices(masks, np.array([4, 9, 11]), (1.0, 1.0))
    assert found.shape == (8, 9, 40)
    for number, z in enumerate((0, 5, 7)):
        np.testing.assert_array_equal(found[z], masks[number])
    assert [int(found[z, 4].sum()) for z in range(6)] == [10, 12, 14, 16, 18, 20]


def test_the_mask_does_not_depend_on_how_many_slices_go_together(weights, monkeypatch):
    scan, _ = two_lungs((10, 48, 48))
    path, sha256 = weights
    network = R231(path, sha256=sha256)
    one = network.mask(scan)
    monkeypatch.setitem(r231.BATCH, "cpu", 7)
    np.testing.assert_array_equal(network.mask(scan), one)


def test_a_scan_without_lungs_gets_an_empty_mask_and_no_other_method(weights):
    scan, _ = two_lungs((10, 48, 48))
    path, sha256 = weights
    solid = replace(scan, hu=np.full_like(scan.hu, 40))
    assert not segmenter(spec(sha256), weights=path)(solid, None).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_mask_of_the_cpu(weights):
    scan, _ = two_lungs()
    path, sha256 = weights
    cpu, gpu = (segmenter(spec(sha256), weights=path, device=d)(scan, None) for d in ("cpu", "cuda"))
    assert dice(cpu, gpu) > 0.9999


# --- refusals, before any work -----------------------------------------------------------------------------------


def test_missing_weights_or_another_hash_stop_before_anything_is_read(weights, tmp_path):
    path, sha256 = weights
    other = tmp_path / "other.pth"
    other.write_bytes(path.read_bytes() + b"\0")
    for given in (None, tmp_path / "none.pth", other):
        for act in (segmenter, check_weights):
            with pytest.raises(ModelError, match="E_WEIGHTS") as caught:
                act(spec(sha256), weights=given)
            assert "fetch-weights" in caught.value.fix
            assert sha256 in caught.value.wanted
    check_weights(spec(sha256), path)
    check_weights(SegmentationSpec(), None)  # thresholds need none


def test_weights_of_another_network_are_refused(tmp_path):
    tensors = two_bands()
    cases = {
        "another shape": {**tensors, "last.weight": torch.zeros(6, 4, 1, 1)},
        "a part missing": {name: t for name, t in tensors.items() if name != "last.bias"},
        "a part more": {**tensors, "extra.weight": torch.zeros(1)},
        "not a number": {**tensors, "last.bias": torch.tensor([0.0, float("nan"), 0.0])},
    }
    for name, content in cases.items():
        with pytest.raises(ModelError, match="E_NONFINITE" if name == "not a number" else "E_WEIGHTS"):
            network_from(content)
    sha256 = weights_file(tmp_path / "w.pth", {"weight": torch.zeros(3)})  # the right hash does not help
    with pytest.raises(ModelError, match="E_WEIGHTS"):
        segmenter(spec(sha256), weights=tmp_path / "w.pth")


def test_what_the_published_file_holds_and_nothing_uses_is_left_aside():
    tensors = two_bands()
    parts = ("residual_input_conv.bias", "residual_batchnorm.weight", "residual_batchnorm.running_mean")
    found = network_from({**tensors, **{f"down_path.0.{part}": torch.zeros(4) for part in parts}})
    assert set(found.state_dict()) == set(tensors)


def test_a_device_that_is_not_there_is_refused(weights):
    path, sha256 = weights
    for device in ("meta", *(() if torch.cuda.is_available() else ("cuda:0",))):
        with pytest.raises(ConfigError, match="E_UNSUPPORTED"):
            segmenter(spec(sha256), weights=path, device=device)
