"""The model of the selected codes and its risk groups as plain facts: what JSON, tables, figures and reports are made
from, for codes of a run and for biomarkers of a table alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from fourdvq.survival.curves import FrozenScore, RiskGroups, steps_of
from fourdvq.survival.run import ModelResult
from fourdvq.survival.selection import Z95
from fourdvq.survival.small_sample import banner

PH_TRANSFORM: Final = "log"
GROUPS_NOTE = (
    "risk above or below that of the training mean; the curves are of the patients that the model was fitted on, and "
    "so they and the calibration are better than on new patients"
)


def model_facts(fitted: ModelResult, names: Sequence[str], ridge: float) -> dict[str, Any]:
    """Coefficients per SD with hazard ratio, 95 % interval, p and the test of proportional hazards (transform log)."""
    scale, fits = fitted.study.scale, fitted.fits
    beta, se, p = (values[0, -1, 1:] for values in (fits.beta, fits.se, fits.p))
    nothing = np.full(len(beta), np.nan)
    chi2, ph_p = (nothing, nothing) if fitted.ph is None else (fitted.ph.chi2[1:], fitted.ph.p[1:])
    deaths, parameters = int(fitted.study.total.events[0]), len(beta)
    rows = [
        {
            "name": name,
            "hazard_ratio": math.exp(beta[k]),
            "low": math.exp(beta[k] - Z95 * se[k]),
            "high": math.exp(beta[k] + Z95 * se[k]),
            "p": float(p[k]),
            "ph_chi2": known(chi2[k]),
            "ph_p": known(ph_p[k]),
            "beta_per_sd": float(beta[k]),
            "se": float(se[k]),
            "mean": float(scale.mean[k]),
            "sd": float(scale.sd[k]),
        }
        for k, name in enumerate(names)
    ]
    return {
        "ridge": ridge,
        "coefficients": rows,
        "deaths_per_parameter": deaths / parameters,
        "banner": banner(deaths, parameters),
    }


def score_of(model: Mapping[str, Any]) -> FrozenScore:
    """The frozen coefficients in `model_facts`."""
    beta, mean, sd = (np.array([row[key] for row in model["coefficients"]]) for key in ("beta_per_sd", "mean", "sd"))
    return FrozenScore(beta=beta, mean=mean, sd=sd)


def group_facts(found: RiskGroups) -> dict[str, Any]:
    """Curves as years and survival with interval, the log-rank test, and the rows of the calibration."""
    curves = {}
    for group, curve in found.curves.items():
        years, values = steps_of(curve)
        curves[group] = {"years": years, **values}
    return {
        "curves": curves,
        "logrank_chi2": known(found.chi2),
        "logrank_p": known(found.p),
        "calibration": [{name: plain(value) for name, value in vars(row).items()} for row in found.calibration],
        "note": GROUPS_NOTE,
    }


def known(value: float) -> float | None:
    """The number, or None where there is none."""
    return float(value) if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """As `known` for numbers; words and counts as they are."""
    return known(value) if isinstance(value, float) else value
