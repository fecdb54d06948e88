"""The picture a person judges a scan by: the lung's outline, and for a pair the alignment before and after.

Baseline is blue and follow-up yellow, so that aligned tissue turns grey (as in the paper's quality control); all
outside the mask is dimmed. Slices are seen from the feet and from the front: the patient's right is on the left. Drawn
with numpy and Pillow alone: a plotting library would cost more than the registration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from fourdvq.preprocessing.canvas import ACCENT, PANEL, Panel, Scale, canvas, histogram, text_panel

WINDOW_HU = (-1000.0, 0.0)
HISTOGRAM_HU = (-1024.0, 200.0)
GAMMA = 0.7
DIM = 0.35
AXIAL_AT = (0.75, 0.5, 0.25)  # of the mask's extent along z
AXIAL_NAMES = ("upper", "middle", "lower")
BLUE, YELLOW, GREY = (70, 110, 255), (235, 215, 40), (190, 190, 190)
_MOVEMENT_MM = (5.0, 10.0, 20.0, 40.0)  # full scales to choose from
_DEEP = ((8, 8, 40), (90, 30, 140), (220, 70, 90), (255, 220, 120))
_WARM = ((40, 90, 220), (245, 245, 245), (215, 50, 40))


@dataclass(frozen=True)
class PairView:
    """A follow-up on the target grid, HU (D, H, W): centroids only, registered, and final; |u| and log J if any."""

    before: np.ndarray
    after: np.ndarray
    final: np.ndarray
    length_mm: np.ndarray | None = None
    log_j: np.ndarray | None = None


@dataclass(frozen=True)
class _Cuts:
    """Where the slices are taken, and the voxel size (z, y, x) in mm."""

    axial: tuple[int, ...]
    middle_z: int
    middle_y: int
    spacing: tuple[float, float, float]

    def coronal_of(self, volume: np.ndarray) -> np.ndarray:
        """Head at the top."""
        return volume[::-1, self.middle_y]

    @property
    def axial_mm(self) -> tuple[float, float]:
        return self.spacing[1], self.spacing[2]

    @property
    def coronal_mm(self) -> tuple[float, float]:
        return self.spacing[0], self.spacing[2]


def scan_picture(
    hu: np.ndarray,
    mask: np.ndarray,
    spacing: tuple[float, float, float],
    *,
    title: str = "",
    facts: Sequence[str] = (),
) -> tuple[bytes, bytes]:
    """PNG and small JPEG of one scan (D, H, W): three axial slices and a coronal one, each with the lung's outline."""
    cuts = _cuts(mask, spacing)
    lines = [(text, None) for text in facts]
    second = [histogram([(hu[mask], BLUE)], HISTOGRAM_HU, "HU in the lung"), text_panel(lines)]
    return canvas(title, [_outline_row(hu, mask, cuts), second])


def pair_picture(
    baseline: np.ndarray,
    view: PairView,
    mask: np.ndarray,
    spacing: tuple[float, float, float],
    *,
    title: str = "",
    facts: Sequence[str] = (),
) -> tuple[bytes, bytes]:
    """PNG and small JPEG of a pair on the target grid.

    Rows: the final scan with the outline of the baseline's lung; before, after and final merged with the baseline,
    axial and coronal, with the HU in the lung; how far the lung moved and where it grew or shrank.
    """
    cuts = _cuts(mask, spacing)
    named = (("before: lungs centred", view.before), ("after registration", view.after), ("final", view.final))
    dim = np.where(mask, 1.0, DIM).astype(np.float32)
    axial, coronal = [], []
    for name, follow_up in named:
        z = cuts.middle_z
        merged = _merge(baseline[z], follow_up[z]) * dim[z][..., None]
        axial.append(Panel(f"{name}, axial", _sized(merged, cuts.axial_mm), sides="RL"))
        flat = _merge(cuts.coronal_of(baseline), cuts.coronal_of(follow_up)) * cuts.coronal_of(dim)[..., None]
        coronal.append(Panel(f"{name}, coronal", _sized(flat, cuts.coronal_mm), sides="RL"))
    axial.append(histogram([(baseline[mask], BLUE), (view.final[mask], YELLOW)], HISTOGRAM_HU, "HU in the lung"))
    colours = [("baseline only", BLUE), ("follow-up only", YELLOW), ("aligned", GREY), ("lung outline", ACCENT)]
    coronal.append(text_panel([*colours, *((text, None) for text in facts)]))
    rows = [_outline_row(view.final, mask, cuts), axial, coronal]
    if view.length_mm is not None and view.log_j is not None:
        rows.append(_field_row(view.length_mm, view.log_j, mask, cuts))
    return canvas(title, rows)


def _cuts(mask: np.ndarray, spacing: tuple[float, float, float]) -> _Cuts:
    inside = np.flatnonzero(mask.any(axis=(1, 2)))
    axial = tuple(int(inside[0] + f * (inside[-1] - inside[0])) for f in AXIAL_AT) if inside.size else (0, 0, 0)
    return _Cuts(axial, axial[1], _middle(mask, 1), spacing)


def _middle(mask: np.ndarray, axis: int) -> int:
    inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
    return int(inside[inside.size // 2]) if inside.size else mask.shape[axis] // 2


def _outline_row(hu: np.ndarray, mask: np.ndarray, cuts: _Cuts) -> list[Panel]:
    row = [
        Panel(f"lung outline, axial {name}", _outlined(hu[z], mask[z], cuts.axial_mm), sides="RL")
        for name, z in zip(AXIAL_NAMES, cuts.axial, strict=True)
    ]
    coronal = _outlined(cuts.coronal_of(hu), cuts.coronal_of(mask), cuts.coronal_mm)
    depth = mask.shape[0]
    for z in cuts.axial:  # where the axial slices are
        line = round((depth - 0.5 - z) / depth * coronal.shape[0])
        coronal[min(line, coronal.shape[0] - 1), :10] = coronal[min(line, coronal.shape[0] - 1), -10:] = ACCENT
    return [*row, Panel("lung outline, coronal", coronal, sides="RL")]


def _outlined(hu: np.ndarray, mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    image = _sized(np.repeat(_grey(hu)[..., None], 3, axis=-1), spacing)
    size = (image.shape[1], image.shape[0])
    large = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0
    image[large & ~ndimage.binary_erosion(large)] = ACCENT
    return image


def _field_row(length_mm: np.ndarray, log_j: np.ndarray, mask: np.ndarray, cuts: _Cuts) -> list[Panel]:
    reach = float(np.percentile(length_mm[mask], 99)) if mask.any() else 0.0
    full = next((mm for mm in _MOVEMENT_MM if reach <= mm), _MOVEMENT_MM[-1])
    moved = Scale(tuple((f / 2, f"{full * f / 2:g}") for f in range(3)), _colours(_DEEP))
    grown = Scale(((0.0, "1/2"), (0.5, "1"), (1.0, "2")), _colours(_WARM))
    parts = (
        ("movement in mm", length_mm / full, moved),
        ("volume, times baseline", (log_j / np.log(2.0) + 1.0) / 2.0, grown),
    )
    row = []
    for name, share, scale in parts:
        z = cuts.middle_z
        flat = _painted(share[z], mask[z], scale.colours)
        row.append(Panel(f"{name}, axial", _sized(flat, cuts.axial_mm), scale=scale, sides="RL"))
        flat = _painted(cuts.coronal_of(share), cuts.coronal_of(mask), scale.colours)
        row.append(Panel(f"{name}, coronal", _sized(flat, cuts.coronal_mm), scale=scale, sides="RL"))
    return row


def _painted(share: np.ndarray, mask: np.ndarray, colours: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Colours inside the mask, dark grey outside: there nothing is measured."""
    painted: np.ndarray = np.where(mask[..., None], colours(np.clip(share, 0.0, 1.0)), 40.0)
    return painted


def _colours(stops: Sequence[tuple[int, int, int]]) -> Callable[[np.ndarray], np.ndarray]:
    at = np.linspace(0.0, 1.0, len(stops))
    table = np.array(stops, dtype=float)

    def colours(share: np.ndarray) -> np.ndarray:
        return np.stack([np.interp(share, at, table[:, c]) for c in range(3)], axis=-1)

    return colours


def _merge(baseline: np.ndarray, follow_up: np.ndarray) -> np.ndarray:
    b, f = _grey(baseline), _grey(follow_up)
    return np.stack([f, f, b], axis=-1)


def _grey(hu: np.ndarray) -> np.ndarray:
    """HU as 0 to 255 float in the lung window; air-filled lung is lifted out of the dark."""
    low, high = WINDOW_HU
    grey: np.ndarray = np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) ** GAMMA * 255
    return grey


def _sized(rgb: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """An RGB slice, resized so that millimetres are square and the longer side has PANEL pixels."""
    height, width = rgb.shape[0] * spacing[0], rgb.shape[1] * spacing[1]
    scale = PANEL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
    return np.array(image.resize(size, Image.Resampling.BICUBIC))
