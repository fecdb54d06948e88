"""Typed messages to Flower records and back. The one file of the library that knows Flower.

A message is three records: `envelope` and `fields` as canonical JSON text in a ConfigRecord, and `tensors`, an
ArrayRecord in which every array is the bytes of a safetensors file (one for each tensor set, one for all arrays). So
nothing is unpickled, bfloat16 travels, and equal weights sent to many sites are stored once.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from fourdvq.config import canonical_json
from fourdvq.errors import WireError
from fourdvq.wire.body import Parts, put_together, put_together_one, take_apart

E = TypeVar("E")
B = TypeVar("B")

_RECORDS = {"envelope": ConfigRecord, "fields": ConfigRecord, "tensors": ArrayRecord}
_ARRAYS = "arrays"  # the key of the blob that holds all array fields; no tensor set has this name
_STYPE = "safetensors"


def pack(envelope: Any, body: Any) -> RecordDict:
    """Encode a typed envelope and body. Raises WireError E_MESSAGE if a value does not have its declared form."""
    parts = take_apart(body)
    blobs = {name: _blob(tensors) for name, tensors in parts.tensors.items()}
    if parts.arrays:
        blobs[_ARRAYS] = _blob({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in parts.arrays.items()})
    return RecordDict(
        {
            "envelope": ConfigRecord({"json": canonical_json(take_apart(envelope).fields)}),
            "fields": ConfigRecord({"json": canonical_json(parts.fields)}),
            "tensors": ArrayRecord(blobs),
        }
    )


def unpack(records: RecordDict, envelope_cls: type[E], *body_classes: type[B]) -> tuple[E, B]:
    """Decode and check: exactly the three records, exactly the declared fields, tensors only as safetensors bytes.

    The body is the first of `body_classes` that has exactly these fields.
    """
    _exact_records(records)
    envelope = put_together(envelope_cls, Parts(fields=_fields(records, "envelope")))
    parts = Parts(fields=_fields(records, "fields"))
    for name, array in records.array_records["tensors"].items():
        tensors = _unblob(array)
        if name == _ARRAYS:
            parts.arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        else:
            parts.tensors[name] = tensors
    return envelope, put_together_one(body_classes, parts)


def unpack_envelope(records: RecordDict, envelope_cls: type[E]) -> E:
    """Decode the envelope alone, before anything large is touched."""
    _exact_records(records)
    return put_together(envelope_cls, Parts(fields=_fields(records, "envelope")))


def wire_bytes(records: RecordDict) -> int:
    """Bytes of a message's content as it travels: array data and JSON text."""
    arrays = sum(len(a.data) for r in records.array_records.values() for a in r.values())
    return arrays + sum(len(str(v)) for r in records.config_records.values() for v in r.values())


def _blob(tensors: dict[str, torch.Tensor]) -> Array:
    data = save_safetensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    return Array("uint8", (len(data),), _STYPE, data)


def _unblob(array: Array) -> dict[str, torch.Tensor]:
    if array.stype != _STYPE:
        raise WireError("E_MESSAGE", where="tensors", found="an array of another serialisation", wanted=_STYPE)
    try:
        return load_safetensors(array.data)
    except SafetensorError:
        raise WireError(
            "E_MESSAGE", where="tensors", found="bytes that are not a safetensors file", wanted=_STYPE
        ) from None


def _exact_records(records: RecordDict) -> None:
    found = {name: type(record) for name, record in records.items()}
    if found != _RECORDS:
        raise WireError(
            "E_MESSAGE",
            where="records",
            found=f"{len(found)} records of other names or types",
            wanted=", ".join(_RECORDS),
        )


def _fields(records: RecordDict, name: str) -> dict[str, Any]:
    record = records.config_records[name]
    if set(record) != {"json"} or not isinstance(record["json"], str):
        raise WireError("E_MESSAGE", where=name, found="other keys", wanted="json")
    try:
        fields = json.loads(record["json"])
    except ValueError:
        raise WireError("E_MESSAGE", where=name, found="text that is not JSON", wanted="json") from None
    if not isinstance(fields, dict):
        raise WireError("E_MESSAGE", where=name, found=type(fields).__name__, wanted="an object")
    return fields
