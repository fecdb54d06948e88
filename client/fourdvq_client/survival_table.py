"""The site's survival table for one analysis, from codes that `query.encode` cached and the prepared clinical rows.

Two kinds: the first scan of every patient (selection, models), and, for the purpose `longitudinal`, later scans of test
patients. There the feature is the level of the third scan or the change over the year after the second one, and the
source real, generated from the first two scans, the second one carried forward, or all of them side by side for the
patients who have all (`paired`). The table is made here, used by `CoxDesk`, and never leaves.
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
from fourdvq_client.third_scans import SECOND, THIRD, Shares, follow_up_of, read_future_codes, with_third_scan
from fourdvq_client.workspace import Workspace

COHORTS = {"train": ("train", "validation"), "test": ("test",)}
LONGITUDINAL = "longitudinal"
SOURCES = {"level": ("real", "generated", "carried"), "change": ("real", "generated")}


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
        if hello.purpose == LONGITUDINAL:
            scans = self._later_scans(hello, patients, plan)
            shares = self._later_shares(hello, patients, scans, tokenizer, plan)
            if plan.survival.test_origin == "landmark":
                clinical = _from_landmark(clinical, patients, scans)
        elif hello.source == "real" and hello.feature == "level":
            shares = self._shares({p.pseudonym: 0 for p in patients}, patients, tokenizer, plan)
        else:
            raise _source(f"{hello.source} {hello.feature}", "real level")
        rows = [row for row in clinical if row.pseudonym in shares]
        return biomarker_table(shares, rows, name=self.site).site

    def _later_scans(self, hello: HelloRequest, patients: Sequence[PreparedPatient], plan: Plan) -> dict[str, int]:
        """By pseudonym the scan that the feature needs: the third, or the follow-up."""
        if hello.cohort != "test":
            raise _source(hello.cohort, "test patients alone")
        if hello.feature == "level":
            return {p.pseudonym: THIRD for p in with_third_scan(patients)}
        found = {p.pseudonym: follow_up_of(p, plan.survival.followup_window_days) for p in patients}
        return {name: index for name, index in found.items() if index is not None}

    def _later_shares(
        self,
        hello: HelloRequest,
        patients: Sequence[PreparedPatient],
        scans: Mapping[str, int],
        tokenizer: str,
        plan: Plan,
    ) -> Shares:
        """The sources asked for, side by side, of the patients who have all of them."""
        known = SOURCES[hello.feature]
        names = known if hello.source == "paired" else (hello.source,)
        if not set(names) <= set(known):
            raise _source(f"{hello.source} {hello.feature}", ", ".join(known))
        parts = [self._of_source(name, hello, patients, scans, tokenizer, plan) for name in names]
        common = sorted(set(parts[0]).intersection(*parts[1:]))
        return {name: np.concatenate([part[name] for part in parts]) for name in common}

    def _of_source(
        self,
        source: str,
        hello: HelloRequest,
        patients: Sequence[PreparedPatient],
        scans: Mapping[str, int],
        tokenizer: str,
        plan: Plan,
    ) -> Shares:
        if source == "generated":
            made = read_future_codes(self.workspace, hello.run, tokenizer)
            found = made.third if hello.feature == "level" else made.change
            return {name: found[name] for name in scans if name in found}
        second = self._shares(dict.fromkeys(scans, SECOND), patients, tokenizer, plan)
        if source == "carried":
            return second
        real = self._shares(scans, patients, tokenizer, plan)
        return real if hello.feature == "level" else {name: real[name] - second[name] for name in real}

    def _shares(
        self, scans: Mapping[str, int], patients: Sequence[PreparedPatient], tokenizer: str, plan: Plan
    ) -> Shares:
        """Shares (K,) of the named scan of each patient in `scans`."""
        need: Callable[[PreparedPatient], LatentPatient] = LatentCache(self.workspace.latents / tokenizer).need
        shares = {}
        for patient in (p for p in patients if p.pseudonym in scans):
            latents = need(patient)
            mask = latents.lung if plan.survival.region == "lung" else None
            indices = latents.indices[scans[patient.pseudonym]]
            shares[patient.pseudonym] = code_histogram(indices, mask, plan.model.n_codes).numpy()
        return shares


def _from_landmark(
    clinical: list[ClinicalRow], patients: Sequence[PreparedPatient], scans: Mapping[str, int]
) -> list[ClinicalRow]:
    """Rows of the patients who were followed beyond the scan that counts, with time counted from it.

    From the first scan it would credit everybody with the time that had to be survived to be scanned again.
    """
    days = {p.pseudonym: p.scans[scans[p.pseudonym]].days - p.scans[0].days for p in patients if p.pseudonym in scans}
    return [
        dataclasses.replace(row, time_days=row.time_days - days[row.pseudonym])
        for row in clinical
        if row.time_days is not None and row.time_days > days.get(row.pseudonym, np.inf)
    ]


def _source(found: str, wanted: str) -> Refused:
    return Refused("E_COX_RULE", where="source", found=found, wanted=wanted)
