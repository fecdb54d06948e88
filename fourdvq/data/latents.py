"""Cached codes of one patient: written once after the tokenizer is frozen, read by stage 2 and the survival analysis.

`latents.safetensors` holds indices (T, d, h, w), the packed lung mask (d, h, w), the times, and of each scan the mean
over the lung of what the encoder gave before it was put onto the codebook: c numbers that keep a slow change of the
whole lung, most of which the codes round away. The metadata hold the sha256 of the tokenizer. Codes of another
tokenizer mean something else, so they are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fourdvq.data.files import write_atomic
from fourdvq.errors import ModelError

FILE_NAME = "latents.safetensors"


@dataclass(frozen=True)
class LatentPatient:
    """Codes of a patient's scans: indices (T, d, h, w) integer, lung (d, h, w) bool, years (T,) float64 from scan 1.

    `means` (T, c) float32: the encoder's output before quantisation, mean over the lung.
    """

    pseudonym: str
    indices: Tensor
    lung: Tensor
    years: Tensor
    means: Tensor
    tokenizer_sha256: str


def save_latents(folder: Path, patient: LatentPatient) -> Path:
    """Write the patient's codes atomically (uint8 if every index is below 256, else int16) and return the file."""
    small = torch.uint8 if int(patient.indices.max()) < 256 else torch.int16
    tensors = {
        "indices": patient.indices.to(small).contiguous(),
        "lung": torch.from_numpy(np.packbits(patient.lung.numpy().astype(bool))),
        "years": patient.years.to(torch.float64).contiguous(),
        "means": patient.means.to(torch.float32).contiguous(),
    }
    metadata = {"pseudonym": patient.pseudonym, "tokenizer_sha256": patient.tokenizer_sha256}
    path = folder / FILE_NAME
    write_atomic(path, save(tensors, metadata))
    return path


def load_latents(folder: Path, *, tokenizer_sha256: str | None = None) -> LatentPatient:
    """Read a patient's codes.

    Raises ModelError E_FILE if there are none, E_CHECKPOINT if the file is damaged, and E_TOKENIZER if
    `tokenizer_sha256` is given and the codes were made by another tokenizer.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ModelError("E_FILE", where=str(path))
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in ("indices", "lung", "years", "means")}
    except SafetensorError as error:
        raise ModelError("E_CHECKPOINT", where=str(path), found=str(error)[:100]) from None
    made_by = metadata.get("tokenizer_sha256", "")
    if tokenizer_sha256 is not None and made_by != tokenizer_sha256:
        raise ModelError("E_TOKENIZER", where=str(path), found=made_by[:12], wanted=tokenizer_sha256[:12])
    shape = tuple(tensors["indices"].shape[1:])
    bits = np.unpackbits(tensors["lung"].numpy(), count=int(np.prod(shape))).reshape(shape).astype(bool)
    lung = torch.from_numpy(bits)
    return LatentPatient(
        pseudonym=metadata.get("pseudonym", ""),
        indices=tensors["indices"],
        lung=lung,
        years=tensors["years"],
        means=tensors["means"],
        tokenizer_sha256=made_by,
    )
