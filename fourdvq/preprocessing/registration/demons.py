"""Deformable registration by symmetric demons, coarse to fine. Source: Vercauteren et al. 2009, as SimpleITK has it.

It follows intensities, so it can also move fibrosis that has grown: its use is named in the profile, and its pictures
are looked at.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from fourdvq.preprocessing.grid import empty_image
from fourdvq.preprocessing.profile import RegistrationSpec
from fourdvq.preprocessing.registration.backends import AlignedPair, FoundField

PRESMOOTHING = 0.35  # voxels of the working grid, times the level's shrink factor


def demons_field(pair: AlignedPair, spec: RegistrationSpec, device: str = "cpu") -> FoundField:
    """The displacement between two aligned scans; always on one CPU thread, whatever the device."""
    del device  # SimpleITK has no other
    place = empty_image(pair.grid)
    fixed, moving = (sitk.GetImageFromArray(a.astype(np.float32)) for a in (pair.fixed, pair.moving))
    fixed.CopyInformation(place)
    moving.CopyInformation(place)
    field: sitk.Image | None = None
    for shrink, iterations in zip(spec.shrink, spec.iterations, strict=True):
        level_fixed, level_moving = (_shrunk(image, shrink, spec.spacing_mm) for image in (fixed, moving))
        method = sitk.FastSymmetricForcesDemonsRegistrationFilter()
        method.SetNumberOfThreads(1)
        method.SetNumberOfIterations(iterations)
        method.SetStandardDeviations(spec.field_sigma)
        if field is None:
            field = method.Execute(level_fixed, level_moving)
        else:
            start = sitk.Resample(field, level_fixed, sitk.Transform(), sitk.sitkLinear, 0.0, field.GetPixelID())
            field = method.Execute(level_fixed, level_moving, start)
    return FoundField(sitk.Resample(field, fixed, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkVectorFloat64))


def _shrunk(image: sitk.Image, shrink: int, spacing_mm: float) -> sitk.Image:
    if shrink == 1:
        return image
    return sitk.Shrink(sitk.SmoothingRecursiveGaussian(image, PRESMOOTHING * shrink * spacing_mm), [shrink] * 3)
