"""R231 here against the package lungmask (`pip install fourdvq[lungmask]`), with the same random weights: equal voxels.

What needs no package, recorded numbers of it, is in tests/unit/test_segmentation_r231.py and always runs.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdvq.data.volume import Volume, to_image
from fourdvq.preprocessing.segmentation.r231 import BATCH, R231
from fourdvq.preprocessing.segmentation.r231_slices import clean_labels, network_input, to_slice
from r231_cases import blobs, slice_of_ellipses, weights_file
from synthetic_lungs import chest

with warnings.catch_warnings():  # the package silences all warnings of a process when it is imported
    lungmask = pytest.importorskip("lungmask", reason="the extra fourdvq[lungmask] is not installed")


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory) -> tuple[Path, str]:
    """Full-size weights with statistics that make all three classes appear."""
    from lungmask.resunet import UNet

    torch.manual_seed(0)
    network = UNet(n_classes=3, padding=True, depth=5, up_mode="upsample", batch_norm=True)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    return path, weights_file(path, network.state_dict())


def test_slices_reach_the_network_as_in_the_package():
    from lungmask.utils import preprocess, reshape_mask

    scan, _ = chest((6, 90, 110))
    for axial in [*scan.hu, slice_of_ellipses(), slice_of_ellipses(512, 512)]:
        theirs, boxes = preprocess(axial[None], resolution=[256, 256])
        ours, crop = network_input(axial)
        np.testing.assert_array_equal(ours, ((np.minimum(theirs[0], 600) + 1024) / 1624).astype(np.float32))
        assert tuple(boxes[0]) == (crop.top, crop.left, crop.bottom, crop.right)
        labels = (np.arange(256 * 256).reshape(256, 256) // 700 % 3).astype(np.uint8)
        np.testing.assert_array_equal(to_slice(labels, crop, axial.shape), reshape_mask(labels, boxes[0], axial.shape))


@pytest.mark.parametrize("seed", range(12))
def test_labels_are_cleaned_as_in_the_package(seed):
    from lungmask.utils import postprocessing

    labels = blobs((8 + seed, 20 + seed, 30 - seed), seed)
    np.testing.assert_array_equal(clean_labels(labels), postprocessing(labels.copy(), disable_tqdm=True))


def test_masks_are_equal_voxel_for_voxel(random_weights):
    scan, _ = chest((6, 64, 64))
    path, sha256 = random_weights
    theirs = lungmask.LMInferer(modelpath=str(path), force_cpu=True, batch_size=BATCH["cpu"], tqdm_disable=True)
    found = theirs.apply(to_image(scan)) > 0
    assert 0.05 < found.mean() < 0.95
    np.testing.assert_array_equal(R231(path, sha256=sha256).mask(scan), found)


@pytest.mark.slow
def test_masks_of_a_real_chest_are_equal_voxel_for_voxel(random_weights, real_data):
    from fourdvq.data.volume import read_volume

    whole = read_volume(real_data / "cip" / "ct-64.nrrd")
    scan = Volume(np.ascontiguousarray(whole.hu[::4]), (4 * whole.spacing[0], *whole.spacing[1:]), whole.origin)
    path, sha256 = random_weights
    theirs = lungmask.LMInferer(modelpath=str(path), force_cpu=True, batch_size=BATCH["cpu"], tqdm_disable=True)
    np.testing.assert_array_equal(R231(path, sha256=sha256).mask(scan), theirs.apply(to_image(scan)) > 0)
