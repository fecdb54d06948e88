"""Enhanced multi-frame CT: one file holds a whole stack, and each frame's geometry lies in functional groups.

A group stands once for all frames (shared) or once for each. Source: DICOM PS3.3, C.7.6.16 and C.8.15.
"""

from __future__ import annotations

import pydicom

from fourdvq.data.dicom_file import SliceHeader, number_of, numbers_of, text_of, values_of
from fourdvq.data.limits import shown
from fourdvq.errors import VolumeError

_NOTHING = pydicom.Dataset()


def frames_of(header: SliceHeader, data: pydicom.Dataset) -> tuple[SliceHeader, ...]:
    """One header for each frame. Raises VolumeError E_CORRUPT if the file announces another number of frames."""
    groups = list(data.PerFrameFunctionalGroupsSequence)
    if len(groups) != header.frames:
        found = f"{header.frames} frames announced, {len(groups)} described"
        raise VolumeError("E_CORRUPT", where=shown(header.path), found=found)
    header = header._replace(instance=text_of(data, "SOPInstanceUID"))
    shared = (list(data.get("SharedFunctionalGroupsSequence") or []) or [_NOTHING])[0]
    return tuple(_frame(header, shared, own, i) for i, own in enumerate(groups))


def _frame(header: SliceHeader, shared: pydicom.Dataset, own: pydicom.Dataset, i: int) -> SliceHeader:
    measures = _group("PixelMeasuresSequence", own, shared)
    scale = _group("PixelValueTransformationSequence", own, shared)
    content = _group("FrameContentSequence", own, shared)
    reconstruction = _group("CTReconstructionSequence", own, shared)
    kinds = tuple(str(v) for v in values_of(_group("CTImageFrameTypeSequence", own, shared), "FrameType"))
    spacing = numbers_of(measures, "PixelSpacing", 2)
    return header._replace(
        frame=i,
        image_type=kinds or header.image_type,
        pixel_spacing=spacing if spacing and min(spacing) > 0 else None,
        thickness=number_of(measures, "SliceThickness"),
        position=numbers_of(_group("PlanePositionSequence", own, shared), "ImagePositionPatient", 3),
        orientation=numbers_of(_group("PlaneOrientationSequence", own, shared), "ImageOrientationPatient", 6),
        slope=number_of(scale, "RescaleSlope"),
        intercept=number_of(scale, "RescaleIntercept"),
        acquisition=text_of(content, "FrameAcquisitionNumber") or header.acquisition,
        stack=text_of(content, "StackID"),
        kernel="/".join(str(v) for v in values_of(reconstruction, "ConvolutionKernel")) or header.kernel,
        contrast=header.contrast or "ContrastBolusUsageSequence" in own or "ContrastBolusUsageSequence" in shared,
        kvp=number_of(_group("CTXRayDetailsSequence", own, shared), "KVP") or header.kvp,
    )


def _group(name: str, own: pydicom.Dataset, shared: pydicom.Dataset) -> pydicom.Dataset:
    """The group of the frame itself, else the one that all frames share, else an empty one."""
    for place in (own, shared):
        items = place.get(name)
        if items:
            return items[0]
    return _NOTHING
