"""What stands before and behind the R231 network: slices cropped to the body, and labels made whole again.

The same operations in the same order as the package lungmask 0.2.22, because the weights were trained on such slices;
the masks are equal voxel for voxel (`tests/reference/test_lungmask_package.py`). Written anew from their description.
Axes: a slice is (H, W), a stack (D, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

SIZE = 256  # pixels of a slice that the network sees
HU_RANGE = (-1024, 600)
SMALLEST_REGION = 3  # voxels: smaller regions are dropped, not given to a neighbour
_BODY_SIZE = 128
_BODY_HU = -500
_DISC = np.ones((3, 3), dtype=bool)
_BALL = np.ones((3, 3, 3), dtype=bool)


@dataclass(frozen=True)
class Crop:
    """Rows and columns of a slice, the ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left


def network_input(axial: np.ndarray) -> tuple[np.ndarray, Crop]:
    """A slice of HU int16 as the network sees it, float32 (256, 256) in [0, 1], and the part of the slice it shows."""
    low, high = HU_RANGE
    axial = np.clip(axial, low, high)
    crop = body_crop(axial)
    part = axial[crop.top : crop.bottom, crop.left : crop.right]
    resized = ndimage.zoom(part, (SIZE / part.shape[0], SIZE / part.shape[1]), order=1)
    return ((resized - float(low)) / (high - low)).astype(np.float32), crop


def body_crop(axial: np.ndarray) -> Crop:
    """The smallest rectangle around the largest piece of tissue in a slice; the whole slice if there is none."""
    height, width = axial.shape
    small = ndimage.zoom(axial, (_BODY_SIZE / height, _BODY_SIZE / width), order=0)
    tissue = ndimage.binary_closing(small > _BODY_HU)
    tissue = ndimage.binary_fill_holes(tissue, structure=_DISC)
    tissue = ndimage.binary_erosion(tissue, iterations=2)
    labels, n = ndimage.label(tissue)
    if n == 0:
        return Crop(0, 0, height, width)
    sizes = np.bincount(labels.ravel())[1:]
    body = ndimage.binary_dilation(labels == int(np.argmax(sizes)) + 1, iterations=2)
    native = ndimage.zoom(body, (height / _BODY_SIZE, width / _BODY_SIZE), order=0)
    rows, columns = ndimage.find_objects(ndimage.label(native, structure=_DISC)[0])[0]
    return Crop(rows.start, columns.start, rows.stop, columns.stop)


def to_slice(labels: np.ndarray, crop: Crop, shape: tuple[int, int]) -> np.ndarray:
    """Labels of a crop, (256, 256), on the whole slice; 0 outside the crop."""
    result = np.zeros(shape, dtype=np.uint8)
    scale = (crop.shape[0] / labels.shape[0], crop.shape[1] / labels.shape[1])
    result[crop.top : crop.bottom, crop.left : crop.right] = ndimage.zoom(labels, scale, order=0)
    return result


def clean_labels(labels: np.ndarray) -> np.ndarray:
    """Every lung label as one region without holes, uint8 (D, H, W), from what the network said pixel by pixel.

    A region that is not its label's largest takes the label of the neighbour with the longest common border, from small
    to large; what is then still apart is dropped.
    """
    regions = _Regions(labels)
    for region in regions.from_small_to_large():
        regions.merge_if_minor(region)
    merged = regions.labels()
    result = np.zeros(merged.shape, dtype=np.uint8)
    for label in np.unique(merged[merged > 0]):
        result[ndimage.binary_fill_holes(_largest(merged == label))] = label
    return result


class _Regions:
    """Connected regions of equal labels, numbered in the order of their first voxels, and what they merge into."""

    def __init__(self, labels: np.ndarray) -> None:
        self.map = _numbered(labels)
        count = int(self.map.max(initial=0))
        flat, first = np.unique(self.map, return_index=True)
        self.label = np.zeros(count + 1, dtype=np.uint8)
        self.label[flat] = labels.ravel()[first]
        self.label[0] = 0
        self.size = np.bincount(self.map.ravel(), minlength=count + 1)
        self.boxes = [None, *ndimage.find_objects(self.map, count)]
        self._order = 1 + np.argsort(self.size[1:], kind="stable")
        self._named = np.zeros(count + 1, dtype=np.uint8)
        self._largest: dict[int, int] = {}
        for region in self._order:
            label = int(self.label[region])
            if self.size[region] > self._largest.get(label, 0):
                self._largest[label] = int(self.size[region])
                self._named[region] = label

    def from_small_to_large(self) -> Iterator[int]:
        """Numbers of the regions, by their sizes before anything was merged."""
        return (int(region) for region in self._order)

    def merge_if_minor(self, region: int) -> None:
        """Give a region that is not its label's largest to the neighbour it touches most; alone it stays."""
        if not SMALLEST_REGION <= self.size[region] < self._largest[int(self.label[region])]:
            return
        box = tuple(slice(max(0, s.start - 2), s.stop + 2) for s in self.boxes[region])
        here = self.map[box]
        own = here == region
        around, counts = np.unique(here[ndimage.binary_dilation(own)], return_counts=True)
        others = (around != 0) & (around != region)
        if not others.any():
            return
        into = int(around[others][np.argmax(counts[others])])
        here[own] = into
        self.boxes[into] = tuple(
            slice(min(a.start, b.start), max(a.stop, b.stop))
            for a, b in zip(self.boxes[into], self.boxes[region], strict=True)
        )
        label, gained = int(self.label[into]), int(self.size[region])
        if self.size[into] == self._largest[label]:
            self._largest[label] += gained
        self.size[into] += gained

    def labels(self) -> np.ndarray:
        """The label of every voxel after the merges; 0 for regions that never were their label's largest."""
        result: np.ndarray = self._named[self.map]
        return result


def _numbered(labels: np.ndarray) -> np.ndarray:
    """Connected regions of equal non-zero labels (corners count), int32, numbered by their first voxels."""
    result = np.zeros(labels.shape, dtype=np.int32)
    count = 0
    for label in np.unique(labels[labels > 0]):
        found, n = ndimage.label(labels == label, structure=_BALL)
        result[found > 0] = found[found > 0] + count
        count += n
    inside = np.flatnonzero(result)
    first = np.zeros(count + 1, dtype=np.int64)
    first[result.ravel()[inside[::-1]]] = inside[::-1]  # the last to be written is the first voxel
    number = np.zeros(count + 1, dtype=np.int32)
    number[1 + np.argsort(first[1:])] = np.arange(1, count + 1)
    renumbered: np.ndarray = number[result]
    return renumbered


def _largest(mask: np.ndarray) -> np.ndarray:
    labels, _ = ndimage.label(mask, structure=_BALL)
    sizes = np.bincount(labels.ravel())[1:]
    result: np.ndarray = labels == int(np.argsort(sizes)[-1]) + 1
    return result
