"""From a profile's words to a function that masks a scan: the table of methods, and the check of their weights.

What a method needs beyond the scan (weights, a device) is given once, before any work; a missing or wrong file stops
the run there and never halfway through a cohort.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fourdvq.data.volume import Volume
from fourdvq.errors import ModelError
from fourdvq.os_errors import reading
from fourdvq.preprocessing.profile import SegmentationSpec
from fourdvq.preprocessing.segmentation.provided import provided_mask
from fourdvq.preprocessing.segmentation.threshold import threshold_mask

Segmenter = Callable[[Volume, Volume | None], np.ndarray]
_FETCH = (
    "run `fourdvq-client fetch-weights` (`--from FILE` without internet), or name the file as `weights:` in site.yaml"
)


def segmenter(spec: SegmentationSpec, *, weights: Path | None = None, device: str = "cpu") -> Segmenter:
    """The profile's method as a function (scan, given mask or None) -> mask, bool (D, H, W); ready for many scans.

    `weights` is the site's file for methods that need one, `device` where a network runs ("cpu", "cuda:N"). Raises,
    before any scan is looked at, ConfigError E_UNSUPPORTED for a device that is not there, and ModelError E_WEIGHTS if
    the weights are missing, are others than the profile's, or do not fit the network.
    """
    return SEGMENTERS[spec.method](spec, weights, device)


def check_weights(spec: SegmentationSpec, weights: Path | None) -> None:
    """Raise ModelError E_WEIGHTS unless the site holds the file whose sha256 the profile names, if it names one.

    Raises also what `from_os` says of a file that cannot be read.
    """
    from fourdvq.data.files import file_sha256

    if spec.method not in NEED_WEIGHTS:
        return
    wanted = f"a file with sha256 {spec.weights_sha256}"
    with reading(str(weights or "weights")):
        if weights is None or not weights.is_file():
            raise ModelError("E_WEIGHTS", where=str(weights or "weights"), found="no file", wanted=wanted, fix=_FETCH)
        found = file_sha256(weights)
    if found != spec.weights_sha256:
        raise ModelError("E_WEIGHTS", where=str(weights), found=f"sha256 {found}", wanted=wanted, fix=_FETCH)


def _threshold(spec: SegmentationSpec, weights: Path | None, device: str) -> Segmenter:
    del weights, device

    def mask(scan: Volume, provided: Volume | None) -> np.ndarray:
        del provided  # a mask that the site gave is not looked at: methods are never mixed within a federation
        return threshold_mask(scan, air_hu=spec.air_hu)

    return mask


def _provided(spec: SegmentationSpec, weights: Path | None, device: str) -> Segmenter:
    del spec, weights, device
    return provided_mask


def _r231(spec: SegmentationSpec, weights: Path | None, device: str) -> Segmenter:
    check_weights(spec, weights)
    from fourdvq.preprocessing.segmentation.r231 import R231

    network = R231(Path(weights or ""), sha256=spec.weights_sha256, device=device, step_mm=spec.step_mm)

    def mask(scan: Volume, provided: Volume | None) -> np.ndarray:
        del provided  # as above
        return network.mask(scan)

    return mask


SEGMENTERS: dict[str, Callable[[SegmentationSpec, Path | None, str], Segmenter]] = {
    "threshold": _threshold,
    "provided": _provided,
    "lungmask_r231": _r231,
}
NEED_WEIGHTS = ("lungmask_r231",)
