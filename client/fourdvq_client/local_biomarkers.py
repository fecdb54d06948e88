"""Code histograms of the site's own patients under a released model, their risk under the survival model that the
coordinator told this site, and where the selected codes lie in a scan. All of it stays here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fourdvq.data.datasets import PreparedPatient, clinical_of, load_x01, open_prepared
from fourdvq.data.files import csv_bytes
from fourdvq.data.latents import LatentPatient
from fourdvq.errors import CohortError
from fourdvq.generation import code_histogram
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.plan import Plan
from fourdvq.survival.biomarkers import biomarker_table
from fourdvq.survival.pictures import code_patch, places_of
from fourdvq_client.latent_cache import LatentCache, encode_patient
from fourdvq_client.released import Released, world_model
from fourdvq_client.survival_model import SurvivalModel, read_model
from fourdvq_client.workspace import SiteConfig, Workspace, write_private

Codes = tuple[int, ...]


@dataclass(frozen=True)
class LocalHistograms:
    """Shares (n, K) of the codes inside the lung at each patient's first scan; rows sum to 1.

    `risk` (n,): log hazard ratio against a patient with the training means, NaN for incomplete covariates and where no
    run told a model. `selected`: the codes of that model. `picture`: what they are and where they lie, None without.
    """

    pseudonyms: tuple[str, ...]
    shares: np.ndarray
    file: Path
    risk: np.ndarray
    selected: tuple[int, ...] = ()
    picture: Path | None = None

    def most_common(self, top: int) -> list[tuple[int, float, int]]:
        """(code, mean share, patients in whom it occurs) of the codes with the largest mean share."""
        means = self.shares.mean(axis=0)
        order = np.argsort(-means, kind="stable")[:top]
        return [(int(k), float(means[k]), int((self.shares[:, k] > 0).sum())) for k in order]


def local_histograms(workspace: Workspace, config: SiteConfig, release: Released) -> LocalHistograms:
    """Histograms of all approved patients; codes that `query.encode` cached are taken from the cache.

    Raises CohortError E_PROFILE if the scans were prepared under another profile than the model's.
    """
    cohort = open_prepared(workspace.prep)
    if cohort.profile_sha256 != release.plan.profile_sha256:
        raise CohortError("E_PROFILE", where="prep/", found=cohort.profile_sha256[:12], wanted="the model's profile")
    world = world_model(release, config.device)
    cache = LatentCache(workspace.latents / world.tokenizer_sha256)
    n_codes = release.plan.model.n_codes
    model = read_model(workspace, world.tokenizer_sha256)
    rows, coded = [], {}
    for patient in cohort.patients:
        latents = cache.get(patient) or cache.put(
            patient, encode_patient(world.vqgan, patient, release.plan, world.tokenizer_sha256)
        )
        rows.append(code_histogram(latents.indices[0].long(), latents.lung, n_codes).numpy())
        coded[patient.pseudonym] = latents
    names = tuple(p.pseudonym for p in cohort.patients)
    shares = np.stack(rows)
    risk, picture, selected = np.full(len(names), np.nan), None, Codes()
    if model is not None:
        risk, selected = _risk(workspace, release.plan, model, dict(zip(names, shares, strict=True))), model.codes
        best = int(shares[:, list(selected)].sum(axis=1).argmax())
        picture = workspace.reports / "codes.png"
        write_private(picture, _places(world.vqgan, cohort.patients[best], coded[names[best]], release.plan, selected))
    path = workspace.reports / "biomarkers.csv"
    write_private(path, _csv(names, shares, risk))
    return LocalHistograms(names, shares, path, risk, selected, picture)


def _risk(workspace: Workspace, plan: Plan, model: SurvivalModel, shares: dict[str, np.ndarray]) -> np.ndarray:
    """(n,) in the order of `shares`."""
    clinical = clinical_of(workspace.prep, transplant=plan.survival.transplant)
    table = biomarker_table(shares, clinical, name="here").site
    known = dict(zip(table.ids or (), model.risk(table), strict=True))
    return np.array([known.get(name, np.nan) for name in shares])


def _places(vqgan: VQGAN3d, patient: PreparedPatient, latents: LatentPatient, plan: Plan, codes: Codes) -> bytes:
    """The codes' patches, and where they lie in the first scan of the patient who has most of them."""
    scan = load_x01(patient.scans[0], plan.window_hu)[0].double().numpy()
    patches = [code_patch(vqgan, code) for code in codes]
    return places_of(scan, latents.indices[0].long().numpy(), latents.lung.numpy(), codes, patches)


def _csv(names: tuple[str, ...], shares: np.ndarray, risk: np.ndarray) -> bytes:
    columns = ["pseudonym", "log_hazard_ratio", *(f"code_{k}" for k in range(shares.shape[1]))]
    patients = zip(names, risk, shares, strict=True)
    return csv_bytes(
        columns, ([n, "" if np.isnan(r) else f"{r:.6g}", *(f"{v:.9g}" for v in row)] for n, r, row in patients)
    )
