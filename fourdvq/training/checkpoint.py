"""A training state on disk: tensors as safetensors, the rest as JSON, each with its sha256, replaced atomically.

The tensors' file is named by its hash and `state.json` names the file, so a process killed at any moment leaves either
the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fourdvq.config import canonical_json
from fourdvq.data.files import write_atomic
from fourdvq.errors import ModelError

SCHEMA = 1
STATE_FILE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """Everything that training needs to go on as if it had not stopped. `meta` holds JSON values only."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save_state(folder: Path, state: TrainState) -> None:
    """Write `state` into `folder` (made if absent), replacing what an earlier call wrote there."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors({name: t.detach().to("cpu").contiguous() for name, t in state.tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"tensors-{digest[:16]}.safetensors"
    write_atomic(folder / name, data)
    body = {"schema": SCHEMA, "tensors": name, "tensors_sha256": digest, "meta": state.meta}
    record = {**body, "sha256": _digest_of(body)}
    write_atomic(folder / STATE_FILE, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    for old in folder.glob("tensors-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load_state(folder: Path) -> TrainState:
    """Read what `save_state` wrote. ModelError E_CHECKPOINT if a file is missing, damaged or of another schema."""
    record = _read_record(folder / STATE_FILE)
    path = folder / record["tensors"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, type(error).__name__) from None
    if hashlib.sha256(data).hexdigest() != record["tensors_sha256"]:
        raise _damaged(path, "another sha256")
    try:
        return TrainState(load_tensors(data), record["meta"])
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        stated = record.pop("sha256")
        intact = stated == _digest_of(record) and record["schema"] == SCHEMA
        # A name with a folder in it would lead out of the checkpoint.
        intact = intact and Path(record["tensors"]).name == record["tensors"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, type(error).__name__) from None
    if not intact:
        raise _damaged(path, "another sha256 or schema")
    return record


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def _damaged(path: Path, found: str) -> ModelError:
    return ModelError("E_CHECKPOINT", where=str(path), found=found)


__all__ = ["TrainState", "load_state", "save_state", "write_atomic"]
