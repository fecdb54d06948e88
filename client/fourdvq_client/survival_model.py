"""The survival model that a run's coordinator told this site: risk of its own patients, computed and kept here.

runs/<run>/survival_model.json    codes and covariates with mean, SD, coefficient, SE and p per SD; no patient
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fourdvq.survival.frozen import risk_of
from fourdvq.survival.messages import ResultMessage
from fourdvq.survival.table import CoxSite
from fourdvq_client.workspace import Workspace, write_private

FILE = "survival_model.json"


@dataclass(frozen=True, eq=False)
class SurvivalModel:
    """Coefficients beta (l,) per SD of the codes, then the covariates, with the mean and SD (l,) of their units."""

    codes: tuple[int, ...]
    covariates: tuple[str, ...]
    beta: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    tokenizer: str

    def risk(self, site: CoxSite) -> np.ndarray:
        """(n,) log hazard ratio of every row against a patient with the training means."""
        columns = np.column_stack([site.X[:, list(self.codes)], site.C])
        return risk_of((columns - self.mean) / self.sd, np.append(0.0, self.beta))


def keep_model(
    workspace: Workspace, run: str, result: ResultMessage, covariates: Sequence[str], tokenizer: str
) -> None:
    """Write what `cox_result` told."""
    numbers = {name: getattr(result, name).tolist() for name in ("codes", "beta", "se", "p", "mean", "sd")}
    plain = {"tokenizer": tokenizer, "covariates": list(covariates), **numbers}
    write_private(workspace.runs / run / FILE, (json.dumps(plain, indent=1) + "\n").encode())


def read_model(workspace: Workspace, tokenizer: str) -> SurvivalModel | None:
    """The model of the last run that told one for codes of this tokenizer, None if there is none."""
    files = sorted(workspace.runs.glob(f"*/{FILE}"), key=lambda path: (path.stat().st_mtime, path.parent.name))
    for path in reversed(files):
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["tokenizer"] == tokenizer:
            numbers = {name: np.array(plain[name], dtype=np.float64) for name in ("beta", "mean", "sd")}
            return SurvivalModel(tuple(plain["codes"]), tuple(plain["covariates"]), **numbers, tokenizer=tokenizer)
    return None
