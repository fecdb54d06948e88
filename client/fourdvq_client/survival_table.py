"""The site's survival table for one analysis, from codes that `query.encode` cached and the prepared clinical rows.

Two kinds: the first scan of every patient (selection, models), and, for the purpose `longitudinal`, the third scan of
test patients in one of three sources: real, generated from the first two, or the second one carried forward. The table
is made here, used by `CoxDesk`, and never leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fourdvq.data.datasets import ClinicalRow, PreparedPatient, clinical_of, open_prepared
from fourdvq.data.latents import LatentPatient
from fourdvq.errors import Refused
from fourdvq.generation import code_histogram
from fourdvq.plan import Plan
from fourdvq.survival.biomarkers import biomarker_table
from fourdvq.survival.messages import HelloRequest
from fourdvq.survival.table import CoxSite
from fourdvq_client.latent_cache import LatentCache
from fourdvq_client.third_scans import THIRD, read_future_codes, with_third_scan
from fourdvq_client.workspace import Workspace

COHORTS = {"train": ("train", "validation"), "test": ("test",)}
LONGITUDINAL = "longitudinal"
SCAN_OF = {"real": THIRD, "carried": THIRD - 1}  # whose codes stand for the third scan
Shares = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class SurvivalTables:
    """Makes the table that a `cox_hello` asks for."""

    workspace: Workspace
    site: str

    def table(self, hello: HelloRequest, tokenizer: str, plan: Plan) -> CoxSite:
        """Raises Refused E_COX_RULE `source` for scans that this version does not analyse, ModelError E_TOKENIZER where
        codes are missing."""
        clinical = clinical_of(self.workspace.prep, transplant=plan.survival.transplant)
        patients = open_prepared(self.workspace.prep).of(*COHORTS[hello.cohort])
        if hello.feature != "level":
            raise Refused("E_COX_RULE", where="source", found=hello.feature, wanted="level")
        if hello.purpose == LONGITUDINAL:
            shares = self._third_scans(hello, patients, tokenizer, plan)
            clinical = _from_third_scan(clinical, patients) if plan.survival.test_origin == "landmark" else clinical
        elif hello.source == "real":
            shares = self._shares(patients, 0, tokenizer, plan)
        else:
            raise Refused("E_COX_RULE", where="source", found=hello.source, wanted="real")
        rows = [row for row in clinical if row.pseudonym in shares]
        return biomarker_table(shares, rows, name=self.site).site

    def _third_scans(
        self, hello: HelloRequest, patients: Sequence[PreparedPatient], tokenizer: str, plan: Plan
    ) -> Shares:
        if hello.cohort != "test":
            raise Refused("E_COX_RULE", where="source", found=hello.cohort, wanted="test patients alone")
        patients = with_third_scan(patients)
        if hello.source != "generated":
            return self._shares(patients, SCAN_OF[hello.source], tokenizer, plan)
        made = read_future_codes(self.workspace, hello.run, tokenizer)
        return {p.pseudonym: made[p.pseudonym] for p in patients if p.pseudonym in made}

    def _shares(self, patients: Sequence[PreparedPatient], scan: int, tokenizer: str, plan: Plan) -> Shares:
        need: Callable[[PreparedPatient], LatentPatient] = LatentCache(self.workspace.latents / tokenizer).need
        shares = {}
        for patient in patients:
            latents = need(patient)
            mask = latents.lung if plan.survival.region == "lung" else None
            shares[patient.pseudonym] = code_histogram(latents.indices[scan], mask, plan.model.n_codes).numpy()
        return shares


def _from_third_scan(clinical: list[ClinicalRow], patients: Sequence[PreparedPatient]) -> list[ClinicalRow]:
    """Rows of the patients who were followed beyond their third scan, with time counted from it.

    From the first scan it would credit everybody with the time that had to be survived to be scanned a third time.
    """
    landmark = {p.pseudonym: p.scans[THIRD].days - p.scans[0].days for p in with_third_scan(patients)}
    return [
        dataclasses.replace(row, time_days=row.time_days - landmark[row.pseudonym])
        for row in clinical
        if row.time_days is not None and row.time_days > landmark.get(row.pseudonym, np.inf)
    ]
