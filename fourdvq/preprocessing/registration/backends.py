"""What a registration backend is, the ones that come with the package, and those that other packages plug in.

A backend gets an aligned pair and returns a displacement field. Another package offers one under the entry-point group
`fourdvq.registration`: its name is the entry point's, its object a `Backend`. The federation's profile names the
backend, so every site needs the same package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from fourdvq.errors import ConfigError
from fourdvq.preprocessing.grid import Grid
from fourdvq.preprocessing.plugged_in import plugged_in
from fourdvq.preprocessing.profile import RegistrationSpec


@dataclass(frozen=True)
class AlignedPair:
    """Both scans on one isotropic grid after the affine step: HU float32 clamped to the profile's range, and how much
    of each voxel is lung, float32 in [0, 1]; all (D, H, W).
    """

    grid: Grid
    fixed: np.ndarray
    fixed_share: np.ndarray
    moving: np.ndarray
    moving_share: np.ndarray

    @property
    def fixed_mask(self) -> np.ndarray:
        """The fixed lungs, bool."""
        mask: np.ndarray = self.fixed_share >= 0.5
        return mask

    @property
    def moving_mask(self) -> np.ndarray:
        """The moving lungs, bool."""
        mask: np.ndarray = self.moving_share >= 0.5
        return mask

    def exchanged(self) -> AlignedPair:
        """The same pair with the roles exchanged."""
        return AlignedPair(self.grid, self.moving, self.moving_share, self.fixed, self.fixed_share)


@dataclass(frozen=True)
class KeypointFacts:
    """How many keypoints led the field, and how far it stays from them: 95th percentile in mm."""

    count: int
    residual_p95_mm: float


@dataclass(frozen=True)
class FoundField:
    """Displacement u in LPS mm (x, y, z components, float64) on the pair's grid: fixed(x) looks like moving(x + u)."""

    u: sitk.Image
    keypoints: KeypointFacts | None = None


FieldFinder = Callable[[AlignedPair, RegistrationSpec, str], FoundField]  # pair, numbers of the profile, torch device


@dataclass(frozen=True)
class Backend:
    """What a named backend does after the centroids: an affine step or not, and a displacement field or none.

    A field finder must be deterministic and raise RegistrationError E_REG where it cannot align the pair.
    """

    affine: bool
    field: FieldFinder | None = None


def _demons(pair: AlignedPair, spec: RegistrationSpec, device: str) -> FoundField:
    from fourdvq.preprocessing.registration.demons import demons_field

    return demons_field(pair, spec, device)


def _corrfield(pair: AlignedPair, spec: RegistrationSpec, device: str) -> FoundField:
    from fourdvq.preprocessing.registration.corrfield import corrfield_field  # brings torch

    return corrfield_field(pair, spec, device)


BACKENDS: dict[str, Backend] = {
    "corrfield": Backend(affine=True, field=_corrfield),
    "demons": Backend(affine=True, field=_demons),
    "affine": Backend(affine=True),
    "none": Backend(affine=False),
}


def backend_names() -> list[str]:
    """Every name that a profile may ask for here, sorted; plug-ins are not loaded."""
    return sorted({*BACKENDS, *plugged_in()})


def backend_named(name: str) -> Backend:
    """The backend of that name; our own go before plug-ins of the same name.

    Raises ConfigError E_UNSUPPORTED if there is none, or if the plug-in cannot be imported or is no Backend.
    """
    if name in BACKENDS:
        return BACKENDS[name]
    point = plugged_in().get(name)
    if point is None:
        raise _unsupported(name, "one of " + ", ".join(backend_names()))
    try:
        backend = point.load()
    except (ImportError, AttributeError) as error:
        found = f"{name}: {point.value} cannot be imported ({error})"
        raise _unsupported(found, "a plug-in that this installation can import") from None
    if not isinstance(backend, Backend):
        found = f"{name}: {point.value} is a {type(backend).__name__}"
        raise _unsupported(found, "a fourdvq.preprocessing.registration.Backend")
    return backend


def _unsupported(found: str, wanted: str) -> ConfigError:
    fix = "use a profile with a backend that every site has, or install the package that brings it"
    return ConfigError("E_UNSUPPORTED", where="profile.registration.backend", found=found, wanted=wanted, fix=fix)
