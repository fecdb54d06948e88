"""Pairs of scans for tests of registration: a planted motion of a real chest, the public pair, phantoms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from fourdvq.data.phantom import draw_patients, scan
from fourdvq.data.phantom.rendering import displacement_field
from fourdvq.data.volume import Volume, from_image, read_mask, read_volume, to_image

POINTS = 2000
SMOOTH_MM = 40.0  # SD of the Gaussian that makes a planted motion smooth


@dataclass(frozen=True)
class PairCase:
    """Two scans with their lungs, bool (D, H, W), and what is known: fixed points (N, 3) LPS mm and where they went."""

    fixed: Volume
    fixed_mask: np.ndarray
    moving: Volume
    moving_mask: np.ndarray
    points: np.ndarray
    truth: np.ndarray | None = None  # of the points, LPS mm

    def errors(self, transform: sitk.Transform) -> np.ndarray:
        """Distances (N,) in mm between where a transform puts the points and where they are."""
        if self.truth is None:
            raise ValueError("the truth of this pair is not known")
        return np.linalg.norm(moved(transform, self.points) - self.truth, axis=1)


def moved(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """Points (N, 3) under a transform."""
    return np.array([transform.TransformPoint(p.tolist()) for p in points])


def planted(folder: Path, seed: int, *, largest_mm: float = 20.0, noise_hu: float = 20.0) -> PairCase:
    """ct-64 at half its voxel size against itself, moved by a smooth random field, with the noise of a second scan.

    moving(y) = fixed(y + b(y)): both are read from the original voxels with the same cubic spline, so they are equally
    sharp. `largest_mm` is the greatest |b| in the lung.
    """
    return _planted(folder, seed, largest_mm, noise_hu)[0]


@dataclass(frozen=True)
class RimCase:
    """A planted motion whose second scan has a new dense rim under the pleura of its lower lungs."""

    case: PairCase
    rim: Callable[[np.ndarray], np.ndarray]  # which points (N, 3) of the second scan lie in it, in LPS mm

    def kept(self, transform: sitk.Transform) -> float:
        """The rim that a map brings to the baseline's lung over the rim that the true one brings; 1 keeps all of it."""
        assert self.case.truth is not None
        return float(self.rim(moved(transform, self.case.points)).sum() / self.rim(self.case.truth).sum())


def rimmed(folder: Path, seed: int, *, thickness_mm: float, hu: float = -250.0) -> RimCase:
    """As `planted`, with a rim of `hu` give or take 150 HU: tissue as bright as the chest wall behind it."""
    case, raw, nodes = _planted(folder, seed, 12.0, 10.0)
    depth = ndimage.distance_transform_edt(case.fixed_mask, sampling=case.fixed.spacing)
    low = np.quantile(np.argwhere(case.fixed_mask)[:, 0], 0.4)
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(size=case.fixed_mask.shape), 2.4)

    def rim_at(index: np.ndarray) -> np.ndarray:  # of voxels of the second scan, (3, N)
        there = 2 * (index / 2 + _looked_up(nodes, index / 2))
        below = ndimage.map_coordinates(depth, there, order=1)
        return (below > 0) & (below < thickness_mm) & (there[0] < low)

    def rim(points: np.ndarray) -> np.ndarray:
        return rim_at(((points - np.array(raw.origin))[:, ::-1] / np.array(raw.spacing) * 2).T)

    every = np.stack(np.meshgrid(*[np.arange(n, dtype=float) for n in case.moving_mask.shape], indexing="ij"))
    ill = rim_at(every.reshape(3, -1)).reshape(case.moving_mask.shape) & case.moving_mask
    dense = np.maximum(case.moving.hu, hu + 150 * texture / texture.std())
    values = np.where(ill, np.clip(np.rint(dense), -1024, 3071), case.moving.hu).astype(np.int16)
    return RimCase(replace(case, moving=replace(case.moving, hu=values)), rim)


def _planted(folder: Path, seed: int, largest_mm: float, noise_hu: float) -> tuple[PairCase, Volume, np.ndarray]:
    """The case, ct-64 itself, and b (3, D, H, W) in its voxels."""
    raw = read_volume(folder / "cip" / "ct-64.nrrd")
    lung = read_mask(folder / "cip" / "wholeLung-64.nrrd").hu > 0
    rng, step = np.random.default_rng(seed), np.array(raw.spacing)
    b = [ndimage.gaussian_filter(rng.normal(size=lung.shape), SMOOTH_MM / step, mode="nearest") for _ in range(3)]
    nodes = np.stack(b) * (largest_mm / np.linalg.norm(b, axis=0)[lung].max()) / step[:, None, None, None]
    size = tuple(2 * n - 1 for n in lung.shape)
    at = np.stack(np.meshgrid(*[np.arange(n) / 2 for n in size], indexing="ij"))
    there = at + _looked_up(nodes, at.reshape(3, -1)).reshape(at.shape)
    spline = ndimage.spline_filter(raw.hu.astype(np.float64), 3)
    images = [ndimage.map_coordinates(spline, a, order=3, prefilter=False, mode="nearest") for a in (at, there)]
    images[1] += noise_hu * rng.normal(size=size)
    masks = [ndimage.map_coordinates(lung.astype(np.float32), a, order=1) >= 0.5 for a in (at, there)]
    inside = np.argwhere(masks[0])
    points = inside[rng.choice(len(inside), POINTS, replace=False)] / 2 + rng.uniform(-0.25, 0.25, (POINTS, 3))
    went = points.copy()
    for _ in range(60):  # y = x - b(y); b is a contraction
        went = points - _looked_up(nodes, went.T).T
    fixed, moving = (_volume(image, raw) for image in images)
    case = PairCase(fixed, masks[0], moving, masks[1], _lps(points, raw), _lps(went, raw))
    return case, raw, nodes


def real_pair(folder: Path, *, same_scan: bool) -> PairCase:
    """The public follow-up onto its baseline; `same_scan`: onto itself, as it was once warped to the baseline."""
    pair = folder / "elastix"
    mask, moving_mask = (read_mask(pair / f"3DCT_lung_{name}_mask.mha") for name in ("baseline", "followup"))
    if same_scan:
        fixed = read_volume(pair / "3DCT_lung_followup_on_baseline_grid.mha")
    else:
        small = to_image(read_volume(pair / "3DCT_lung_baseline_small.mha"))
        fixed = from_image(sitk.Resample(small, to_image(mask), sitk.Transform(), sitk.sitkLinear, -1000.0))
    inside = np.argwhere(mask.hu > 0)
    chosen = inside[np.random.default_rng(0).choice(len(inside), POINTS, replace=False)]
    points = np.array(mask.origin) + (chosen * np.array(mask.spacing))[:, ::-1]
    moving = read_volume(pair / "followup_reconstructed.nii.gz")
    return PairCase(fixed, mask.hu > 0, moving, moving_mask.hu > 0, points)


@dataclass(frozen=True)
class PhantomPair:
    """A phantom's first two scans; `severity` (D, H, W) is the truth of the second on its own grid."""

    case: PairCase
    severity: np.ndarray

    def severity_at(self, points: np.ndarray) -> np.ndarray:
        """True severity of the second scan at LPS points (N, 3); 0 outside its grid."""
        scan_place = self.case.moving
        index = (points - np.array(scan_place.origin))[:, ::-1] / np.array(scan_place.spacing)
        return ndimage.map_coordinates(self.severity, index.T, order=1)


def phantom_pair(number: int, *, seed: int = 11, size: tuple[int, int, int] = (96, 128, 128)) -> PhantomPair:
    """The first and second scan of phantom patient `number`: another breath, table position, noise and more disease."""
    patient = draw_patients(number + 1, seed, size=size, scans_per_patient=(2, 2))[number]
    first, second = (scan(patient, visit) for visit in patient.visits)
    u = displacement_field(second.displacement, size)
    inside = np.argwhere(first.lung)
    z, y, x = inside[np.random.default_rng(number).choice(len(inside), POINTS, replace=False)].T
    place = first.volume
    points = np.array(place.origin) + np.stack([x, y, z], axis=1) * np.array(place.spacing[::-1])
    truth = points + u[:, z, y, x].T
    return PhantomPair(PairCase(first.volume, first.lung, second.volume, second.lung, points, truth), second.severity)


def _looked_up(nodes: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.stack([ndimage.map_coordinates(c, at, order=1, mode="nearest") for c in nodes])


def _volume(values: np.ndarray, raw: Volume) -> Volume:
    spacing = (raw.spacing[0] / 2, raw.spacing[1] / 2, raw.spacing[2] / 2)
    return Volume(np.clip(np.rint(values), -1024, 3071).astype(np.int16), spacing, raw.origin, raw.direction)


def _lps(index_zyx: np.ndarray, raw: Volume) -> np.ndarray:
    return np.array(raw.origin) + (index_zyx * np.array(raw.spacing))[:, ::-1]
