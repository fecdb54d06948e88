"""Codes of patients under one tokenizer, made once: latents/<tokenizer>/<pseudonym>/, bound to their scans' content."""

from __future__ import annotations

from pathlib import Path

import torch

from fourdvq.config import sha256_of
from fourdvq.data.datasets import PreparedPatient, latent_mask, load_lung, load_x01
from fourdvq.data.files import write_atomic
from fourdvq.data.latents import LatentPatient, load_latents, save_latents
from fourdvq.errors import FourdvqError, ModelError
from fourdvq.generation import encode_scan
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.plan import Plan


class LatentCache:
    """The folder of one tokenizer; its name is the tokenizer's sha256."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, patient: PreparedPatient) -> LatentPatient | None:
        """The patient's codes, or None if there are none, or they were made from other scans."""
        folder = self._folder / patient.pseudonym
        made_from = folder / "made_from"
        if not made_from.is_file() or made_from.read_text(encoding="utf-8") != _content(patient):
            return None
        try:
            return load_latents(folder, tokenizer_sha256=self._folder.name)
        except FourdvqError:
            return None

    def need(self, patient: PreparedPatient) -> LatentPatient:
        """The patient's codes. Raises ModelError E_TOKENIZER if the scans were not encoded, or changed since."""
        latents = self.get(patient)
        if latents is None:
            raise ModelError(
                "E_TOKENIZER",
                where=f"latents of {patient.pseudonym}",
                found="none for these scans",
                fix="the coordinator repeats `query.encode` when the run is resumed",
            )
        return latents

    def put(self, patient: PreparedPatient, latents: LatentPatient) -> LatentPatient:
        """Keep the codes and return them."""
        folder = self._folder / patient.pseudonym
        save_latents(folder, latents)
        write_atomic(folder / "made_from", _content(patient).encode())
        return latents


@torch.inference_mode()
def encode_patient(model: VQGAN3d, patient: PreparedPatient, plan: Plan, tokenizer: str) -> LatentPatient:
    """Codes of all scans of a patient, with the lung on the code grid and the times; `model` is in evaluation mode."""
    lung = latent_mask(load_lung(patient.scans[0]), plan.model.compression)
    coded, means = zip(*(encode_scan(model, load_x01(s, plan.window_hu), lung) for s in patient.scans), strict=True)
    return LatentPatient(
        pseudonym=patient.pseudonym,
        indices=torch.cat([one.indices.cpu() for one in coded]),
        lung=lung,
        years=torch.tensor([s.years for s in patient.scans], dtype=torch.float64),
        means=torch.cat(means).cpu(),
        tokenizer_sha256=tokenizer,
    )


def _content(patient: PreparedPatient) -> str:
    return sha256_of([[s.index, s.days, s.content_sha256] for s in patient.scans])
