"""Phantom cohort: patients that can be checked, because the truth is known.

A chest in HU with fibrosis that starts under the pleura at the bases and grows continuously, at each patient's own
rate; scans at irregular times, each with its own breath, table position, noise and kernel; survival that follows the
true extent. `make_cohort` writes what a hospital would bring and the truth beside it; `render` and `severity` give the
truth at any other time. docs/reference/phantom.md describes the model and the files.
"""

from fourdvq.data.phantom.cohort import make_cohort
from fourdvq.data.phantom.patients import PhantomPatient, PhantomVisit, draw_patients, extent_at, hazard_at
from fourdvq.data.phantom.rendering import PhantomScan, lung_mask, render, scan, severity
from fourdvq.data.phantom.truth import PhantomCohort, load_cohort_truth, load_displacement, load_lung, load_severity

__all__ = [
    "PhantomCohort",
    "PhantomPatient",
    "PhantomScan",
    "PhantomVisit",
    "draw_patients",
    "extent_at",
    "hazard_at",
    "load_cohort_truth",
    "load_displacement",
    "load_lung",
    "load_severity",
    "lung_mask",
    "make_cohort",
    "render",
    "scan",
    "severity",
]
