"""The lung mask of a scan: given by the site, found by thresholds, or found by the R231 network.

A federation uses one method; which one, with its numbers and the hash of its weights, stands in the preprocessing
profile. No method stands in for another: where the chosen one fails, the scan is refused. All masks are bool (D, H, W)
on the scan's own grid, which is oriented to LPS.
"""

from fourdvq.preprocessing.segmentation.body import filled_body
from fourdvq.preprocessing.segmentation.field_of_view import field_cuts
from fourdvq.preprocessing.segmentation.methods import NEED_WEIGHTS, SEGMENTERS, Segmenter, check_weights, segmenter
from fourdvq.preprocessing.segmentation.provided import left_out, provided_mask
from fourdvq.preprocessing.segmentation.sides import LungSides, lung_sides
from fourdvq.preprocessing.segmentation.threshold import threshold_mask

__all__ = [
    "NEED_WEIGHTS",
    "SEGMENTERS",
    "LungSides",
    "Segmenter",
    "check_weights",
    "field_cuts",
    "filled_body",
    "left_out",
    "lung_sides",
    "provided_mask",
    "segmenter",
    "threshold_mask",
]
