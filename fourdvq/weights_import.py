"""The one door for foreign weight files (.pth): VGG16, LPIPS heads, lung segmentation. Nothing else may read them.

A .pth file is a pickle, and a pickle is a program. So: the sha256 that a person wrote down comes first, then torch's
restricted reader, in a process of its own, and what comes out is a safetensors file, which everything else loads.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from fourdvq.data.files import file_sha256, write_atomic
from fourdvq.errors import ModelError
from fourdvq.perceptual import perceptual_tensors

WRAPPERS = ("state_dict", "model_state_dict")  # under which training scripts commonly put the weights


def import_weights(source: Path, target: Path, *, sha256: str) -> str:
    """Turn a .pth of named tensors into the safetensors file `target`; returns the sha256 of what was written.

    Raises ModelError E_WEIGHTS if the file is missing, its sha256 is another, or it holds more than named tensors.
    """
    if not source.is_file():
        raise ModelError("E_WEIGHTS", where=str(source), found="no file", wanted=f"a file with sha256 {sha256}")
    found = file_sha256(source)
    if found != sha256:
        raise ModelError("E_WEIGHTS", where=str(source), found=f"sha256 {found}", wanted=f"sha256 {sha256}")
    process = multiprocessing.get_context("spawn").Process(target=_convert, args=(source, target, sha256))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise ModelError(
            "E_WEIGHTS",
            where=str(source),
            found=f"a reader that ended with {process.exitcode}",
            wanted="named tensors and nothing else",
        )
    return file_sha256(target)


def read_weights(source: Path, *, sha256: str) -> dict[str, Tensor]:
    """The named tensors of a .pth file, by the same door and with the same errors as `import_weights`."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "weights.safetensors"
        import_weights(source, part, sha256=sha256)
        return load_file(part)


def import_perceptual(vgg: Path, heads: Path, target: Path, *, vgg_sha256: str, heads_sha256: str) -> str:
    """Make the file of `fourdvq.perceptual` from torchvision's VGG16 and LPIPS' heads; returns its sha256."""
    parts = [read_weights(vgg, sha256=vgg_sha256), read_weights(heads, sha256=heads_sha256)]
    write_atomic(target, save_tensors(perceptual_tensors(*parts)))
    return file_sha256(target)


def _convert(source: Path, target: Path, sha256: str) -> None:
    """In the process of its own: hash and parse the same bytes, so that the file cannot change between the two."""
    data = source.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        sys.exit(3)
    try:
        tensors = _named_tensors(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except Exception:  # whatever a foreign file provokes; its text could quote the file's content
        sys.exit(4)
    if tensors is None:
        sys.exit(5)
    write_atomic(target, save_tensors(tensors))


def _named_tensors(content: Any) -> dict[str, Tensor] | None:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    plain = isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )
    # Tensors may share memory in a .pth and must not in safetensors.
    return {name: tensor.detach().contiguous().clone() for name, tensor in content.items()} if plain else None
