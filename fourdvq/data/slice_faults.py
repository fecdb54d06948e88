"""What the header of a single CT image may have against it, whatever the other images of its series say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fourdvq.data.dicom_file import SliceHeader
from fourdvq.data.limits import shown
from fourdvq.errors import VolumeError

# Uncompressed, deflated, RLE, JPEG baseline to lossless, JPEG-LS, JPEG 2000 and HTJ2K: read by SimpleITK 2.5.
SYNTAXES = frozenset(
    "1.2.840.10008.1.2" + tail
    for tail in (
        "", ".1", ".1.99", ".2", ".5", ".4.50", ".4.51", ".4.57", ".4.70", ".4.80", ".4.81", ".4.90", ".4.91",
        ".4.201", ".4.202", ".4.203",
    )
)  # fmt: skip


@dataclass(frozen=True)
class _Fault:
    """A code, when it holds, and words for it in which `{s}` is the header."""

    code: str
    holds: Callable[[SliceHeader], bool]
    found: str
    wanted: str = ""
    fix: str = ""


def check_header(s: SliceHeader) -> None:
    """Raise VolumeError for the first fault: E_BURNED, E_UNSUPPORTED, E_GEOMETRY, E_RESCALE, E_SYNTAX or E_HU."""
    for fault in _FAULTS:
        if fault.holds(s):
            found, fix = fault.found.format(s=s), fault.fix.format(s=s)
            raise VolumeError(fault.code, where=shown(s.path), found=found, wanted=fault.wanted, fix=fix)


def _is_skewed(s: SliceHeader) -> bool:
    row, column = np.array(s.orientation).reshape(2, 3)
    lengths = np.array([row @ row, column @ column])
    return not (np.abs(lengths - 1).max() < 1e-2 and abs(row @ column) < 1e-2)


def _has_no_scale(s: SliceHeader) -> bool:
    return s.slope is None or s.intercept is None or s.slope == 0


def _has_another_syntax(s: SliceHeader) -> bool:
    return bool(s.transfer_syntax) and s.transfer_syntax not in SYNTAXES


def _is_not_grey(s: SliceHeader) -> bool:
    return min(s.rows, s.columns) < 2 or s.pixels.samples != 1 or s.pixels.photometric != "MONOCHROME2"


def _has_odd_layout(s: SliceHeader) -> bool:
    place = s.pixels
    return not (
        place.bits_allocated in (8, 16, 32)
        and 1 < place.bits_stored <= place.bits_allocated
        and place.high_bit == place.bits_stored - 1
    )


# In this order: a later one may rely on what those before it have ruled out.
_FAULTS = (
    _Fault("E_BURNED", lambda s: s.burned_in, "BurnedInAnnotation YES"),
    _Fault("E_UNSUPPORTED", lambda s: s.frames > 1 and s.frame is None, "{s.frames} frames in one file"),
    _Fault("E_GEOMETRY", lambda s: not s.has_geometry, "no position, orientation or pixel spacing"),
    _Fault("E_GEOMETRY", _is_skewed, "row and column directions that are not orthonormal"),
    _Fault("E_RESCALE", _has_no_scale, "no RescaleSlope or RescaleIntercept"),
    _Fault(
        "E_SYNTAX",
        _has_another_syntax,
        "{s.transfer_syntax}",
        fix="export the series as Explicit VR Little Endian, or convert it with a tool that reads {s.transfer_syntax}: "
        "no extra of this package adds it",
    ),
    _Fault(
        "E_HU",
        _is_not_grey,
        "{s.rows} x {s.columns} pixels, {s.pixels.samples} x {s.pixels.photometric!r}",
        wanted="one grey value a pixel (MONOCHROME2)",
    ),
    _Fault(
        "E_UNSUPPORTED",
        _has_odd_layout,
        "{s.pixels.bits_stored} bits of {s.pixels.bits_allocated}, the highest {s.pixels.high_bit}",
        wanted="8 to 16 bits from the lowest up",
    ),
)
