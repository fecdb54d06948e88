"""Code histograms of the site's own patients under a released model: the candidates of the survival analysis."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fourdvq.data.datasets import open_prepared
from fourdvq.errors import CohortError
from fourdvq.generation import code_histogram
from fourdvq_client.latent_cache import LatentCache, encode_patient
from fourdvq_client.released import Released, world_model
from fourdvq_client.workspace import SiteConfig, Workspace, write_private


@dataclass(frozen=True)
class LocalHistograms:
    """Shares (n, K) of the codes inside the lung at each patient's first scan; rows sum to 1."""

    pseudonyms: tuple[str, ...]
    shares: np.ndarray
    file: Path

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
    rows = []
    for patient in cohort.patients:
        latents = cache.get(patient) or cache.put(
            patient, encode_patient(world.vqgan, patient, release.plan, world.tokenizer_sha256)
        )
        rows.append(code_histogram(latents.indices[0].long(), latents.lung, n_codes).numpy())
    names = tuple(p.pseudonym for p in cohort.patients)
    shares = np.stack(rows)
    path = workspace.reports / "biomarkers.csv"
    write_private(path, _csv(names, shares))
    return LocalHistograms(names, shares, path)


def _csv(names: tuple[str, ...], shares: np.ndarray) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["pseudonym", *(f"code_{k}" for k in range(shares.shape[1]))])
    writer.writerows([name, *(f"{v:.9g}" for v in row)] for name, row in zip(names, shares, strict=True))
    return text.getvalue().encode()
