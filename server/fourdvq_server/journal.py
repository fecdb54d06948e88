"""Replies on disk as they arrive, so that a coordinator that dies in a round does not ask a site twice.

Two files per site: `<site>.safetensors` with all arrays and tensors, then `<site>.json` with envelope, plain fields and
the sha256 of the first. Only the second makes a reply exist.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourdvq.config import to_plain
from fourdvq.data.files import file_sha256
from fourdvq.errors import FourdvqError
from fourdvq.wire.body import Parts, put_together, put_together_one, take_apart
from fourdvq.wire.messages import Reply, ReplyEnvelope, Task, reply_types
from fourdvq_server.store import load_tensors, save_tensors, write_json

_ARRAY, _TENSOR = "array/", "tensor/"


@dataclass(frozen=True)
class Journaled:
    """A reply read back, with the bytes it had on the wire."""

    envelope: ReplyEnvelope
    body: Reply
    bytes_up: int


class Journal:
    """The replies of one exchange."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, kind: str, envelope: ReplyEnvelope, body: Reply, bytes_up: int) -> None:
        """Keep a validated reply; it survives a kill after this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = take_apart(body)
        flat = {_ARRAY + name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in parts.arrays.items()}
        flat |= {f"{_TENSOR}{owner}/{n}": t for owner, group in parts.tensors.items() for n, t in group.items()}
        path = self.folder / f"{envelope.site}.safetensors"
        save_tensors(path, flat)
        record = {"kind": kind, "envelope": to_plain(envelope), "fields": parts.fields, "bytes_up": bytes_up}
        record |= {"sha256": file_sha256(path), "owners": sorted(parts.tensors), "arrays": sorted(parts.arrays)}
        write_json(self.folder / f"{envelope.site}.json", record)

    def read(self, site: str, task: Task, *, plan: str, parent: str) -> Journaled | None:
        """The reply of `site` to this very question, or None if there is none, it is damaged, or it answers another."""
        path = self.folder / f"{site}.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            envelope, body = self._put_together(site, record, type(task).kind)
        except (FourdvqError, ValueError, KeyError, OSError):
            return None
        if (record["kind"], envelope.plan, envelope.parent) != (type(task).kind, plan, parent):
            return None
        return Journaled(envelope, body, int(record["bytes_up"]))

    def _put_together(self, site: str, record: dict[str, Any], kind: str) -> tuple[ReplyEnvelope, Reply]:
        path = self.folder / f"{site}.safetensors"
        if file_sha256(path) != record["sha256"]:
            raise ValueError(path.name)
        parts = Parts(fields=record["fields"], tensors={owner: {} for owner in record["owners"]})
        for name, tensor in load_tensors(path).items():
            if name.startswith(_ARRAY):
                parts.arrays[name.removeprefix(_ARRAY)] = tensor.numpy()
            else:
                owner, _, rest = name.removeprefix(_TENSOR).partition("/")
                parts.tensors[owner][rest] = tensor
        envelope = put_together(ReplyEnvelope, Parts(fields=record["envelope"]))
        return envelope, put_together_one(reply_types(kind), parts)
