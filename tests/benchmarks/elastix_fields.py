"""The public pair registered by elastix, as a reference that shares no code with ours; for `prep_registration.py`.

    python3 -m venv /tmp/elastix && /tmp/elastix/bin/pip install itk-elastix==0.25.4
    FOURDVQ_REAL_DATA=... /tmp/elastix/bin/python tests/benchmarks/elastix_fields.py FIELDS.npy

Writes the displacement in LPS mm from the baseline's points into the follow-up, float32 (2, D, H, W, 3) on the grid of
the baseline's mask: a cubic B-spline with nodes every 10 mm after the given affine map, once by normalised correlation
and once by mutual information. How far the two are apart tells how well the truth is known. The follow-up is registered
to its own copy on the baseline's grid, where both show the same lung.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import itk  # type: ignore[import-not-found]
import numpy as np

METRICS = ("AdvancedNormalizedCorrelation", "AdvancedMattesMutualInformation")
NODES_MM = 10.0
LEVELS = 4
CLAMP_HU = (-1000, 500)
_CHANGED = {
    "Registration": "MultiResolutionRegistration",
    "MaximumNumberOfIterations": "800",
    "NumberOfSpatialSamples": "6000",
    "NewSamplesEveryIteration": "true",
    "ImageSampler": "RandomCoordinate",
    "ErodeMask": "false",
    "RequiredRatioOfValidSamples": "0.05",
    "AutomaticTransformInitialization": "false",
}


def main() -> None:
    pair = Path(os.environ["FOURDVQ_REAL_DATA"]) / "elastix"
    np.save(sys.argv[1], np.stack([field(pair, metric) for metric in METRICS]).astype(np.float32))


def field(pair: Path, metric: str) -> np.ndarray:
    """Displacement (D, H, W, 3) in LPS mm."""
    fixed, moving = (
        _clamped(pair / name) for name in ("3DCT_lung_followup_on_baseline_grid.mha", "followup_reconstructed.nii.gz")
    )
    parameters = itk.ParameterObject.New()
    values = parameters.GetDefaultParameterMap("bspline", LEVELS, NODES_MM)
    for name in ("Metric0Weight", "Metric1Weight"):
        values.pop(name, None)
    values["Metric"] = [metric]
    for name, value in _CHANGED.items():
        values[name] = [value]
    parameters.AddParameterMap(values)
    method = itk.ElastixRegistrationMethod.New(fixed, moving)
    method.SetFixedMask(itk.imread(str(pair / "3DCT_lung_baseline_mask.mha"), itk.UC))
    method.SetParameterObject(parameters)
    method.SetInitialTransformParameterFileName(str(pair / "transformparameters.3DCT_lung.affine.txt"))
    method.SetNumberOfThreads(1)
    method.UpdateLargestPossibleRegion()
    found = itk.TransformixFilter.New(moving)
    found.SetTransformParameterObject(method.GetTransformParameterObject())
    found.SetComputeDeformationField(True)
    found.UpdateLargestPossibleRegion()
    return itk.array_from_image(found.GetOutputDeformationField())


def _clamped(path: Path) -> itk.Image:
    image = itk.imread(str(path), itk.F)
    values = itk.array_view_from_image(image)
    np.clip(values, *CLAMP_HU, out=values)
    return image


if __name__ == "__main__":
    main()
