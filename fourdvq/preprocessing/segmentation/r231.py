"""Lung mask by the network lungmask R231, which was trained on severe disease: fibrosis and effusions stay inside.

The publication's method (Hofmanninger et al. 2020). The weights are the file that the authors published,
known by its sha256, and never fetched during a run. They pass the one door for foreign weight files into tensors, and
the network here is our own statement of theirs (docs/decisions/0010): the package itself would read the file as a
pickle, silence all warnings of the process and choose the device on its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from fourdvq.data.volume import Volume
from fourdvq.errors import ConfigError
from fourdvq.preprocessing.segmentation.r231_network import SliceUNet, network_from
from fourdvq.preprocessing.segmentation.r231_slices import SIZE, clean_labels, network_input, to_slice
from fourdvq.weights_import import read_weights

BATCH = {"cpu": 2, "cuda": 16}  # slices at a time, about 0.25 GB each; the mask does not depend on it


class R231:
    """The network on its device, ready for any number of scans."""

    def __init__(self, weights: Path, *, sha256: str, device: str = "cpu", step_mm: float | None = None) -> None:
        """Read the weights file, whose sha256 must be this one.

        `step_mm`: look at a slice every so many mm and interpolate between them; None looks at every slice. Raises
        ModelError E_WEIGHTS or E_NONFINITE for the file, ConfigError E_UNSUPPORTED for a device that is not there.
        """
        self.device = _device(device)
        self.step_mm = step_mm
        self.network: SliceUNet = network_from(read_weights(weights, sha256=sha256)).to(self.device)

    def mask(self, scan: Volume) -> np.ndarray:
        """Both lungs of an LPS-oriented scan, bool (D, H, W); empty if the network sees none."""
        depth = scan.hu.shape[0]
        stride = 1 if self.step_mm is None else max(1, round(self.step_mm / scan.spacing[0]))
        looked_at = np.unique([*range(0, depth, stride), depth - 1])
        inputs, crops = zip(*(network_input(scan.hu[z]) for z in looked_at), strict=True)
        labels = clean_labels(self._labels(np.stack(inputs)))
        shape = (scan.hu.shape[1], scan.hu.shape[2])
        masks = np.stack([to_slice(found, crop, shape) > 0 for found, crop in zip(labels, crops, strict=True)])
        return masks if stride == 1 else between_slices(masks, looked_at, scan.spacing[1:])

    @torch.inference_mode()
    def _labels(self, slices: np.ndarray) -> np.ndarray:
        """The most probable class of every pixel, uint8 (D, 256, 256), a bounded number of slices at a time."""
        result = np.empty((len(slices), SIZE, SIZE), dtype=np.uint8)
        batch = BATCH[self.device.type]
        # Full float32 and one algorithm: the same scan must get the same mask on every card.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for start in range(0, len(slices), batch):
                part = torch.from_numpy(slices[start : start + batch, None]).to(self.device)
                result[start : start + batch] = self.network(part).argmax(dim=1).to(torch.uint8).cpu().numpy()
        return result


def between_slices(masks: np.ndarray, at: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Masks at the slice numbers `at`, bool (n, H, W), for every slice from the first to the last of them.

    In between, the border moves evenly from one mask to the next (linear interpolation of signed distances); what is
    empty in one of the two ends close to the other. `spacing` (y, x) in mm.
    """
    result = np.zeros((int(at[-1] - at[0]) + 1, *masks.shape[1:]), dtype=bool)
    below = _signed_distance(masks[0], spacing)
    for number in range(len(at) - 1):
        start, stop = int(at[number] - at[0]), int(at[number + 1] - at[0])
        above = _signed_distance(masks[number + 1], spacing)
        result[start] = masks[number]
        for z in range(start + 1, stop):
            share = np.float32((z - start) / (stop - start))
            result[z] = (1 - share) * below + share * above < 0
        below = above
    result[-1] = masks[-1]
    return result


def _signed_distance(mask: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Millimetres to the border, float32, negative inside; for an empty mask the slice's diagonal everywhere."""
    if not mask.any():
        height, width = (n * s for n, s in zip(mask.shape, spacing, strict=True))
        return np.full(mask.shape, np.hypot(height, width), dtype=np.float32)
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing)
    inside = ndimage.distance_transform_edt(mask, sampling=spacing)
    result: np.ndarray = (outside - inside).astype(np.float32)
    return result


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type not in BATCH or (device.type == "cuda" and not torch.cuda.is_available()):
        wanted = "cpu, or cuda:N with a GPU that torch can use"
        raise ConfigError("E_UNSUPPORTED", where="device", found=name, wanted=wanted)
    return device
