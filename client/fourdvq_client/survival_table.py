"""The site's survival table for one analysis, from codes that `query.encode` cached and the prepared clinical rows.

It is made here, used by `CoxDesk`, and never leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fourdvq.data.datasets import clinical_of, open_prepared
from fourdvq.errors import Refused
from fourdvq.generation import code_histogram
from fourdvq.plan import Plan
from fourdvq.survival.biomarkers import biomarker_table
from fourdvq.survival.messages import HelloRequest
from fourdvq.survival.table import CoxSite
from fourdvq_client.latent_cache import LatentCache
from fourdvq_client.workspace import Workspace

COHORTS = {"train": ("train", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class SurvivalTables:
    """Makes the table that a `cox_hello` asks for."""

    workspace: Workspace
    site: str

    def table(self, hello: HelloRequest, tokenizer: str, plan: Plan) -> CoxSite:
        """Shares of the codes in the first scan of every patient of the cohort. Raises Refused E_COX_RULE `source`
        for scans that this version does not analyse, ModelError E_TOKENIZER where codes are missing."""
        if hello.source != "real" or hello.feature != "level":
            raise Refused("E_COX_RULE", where="source", found=f"{hello.source} {hello.feature}", wanted="real level")
        histograms = self._first_scans(tokenizer, plan, *COHORTS[hello.cohort])
        clinical = clinical_of(self.workspace.prep, transplant=plan.survival.transplant)
        rows = [row for row in clinical if row.pseudonym in histograms]
        return biomarker_table(histograms, rows, name=self.site).site

    def _first_scans(self, tokenizer: str, plan: Plan, *splits: str) -> dict[str, Any]:
        cache = LatentCache(self.workspace.latents / tokenizer)
        shares = {}
        for patient in open_prepared(self.workspace.prep).of(*splits):
            latents = cache.need(patient)
            mask = latents.lung if plan.survival.region == "lung" else None
            shares[patient.pseudonym] = code_histogram(latents.indices[0], mask, plan.model.n_codes).numpy()
        return shares
