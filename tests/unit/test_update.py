"""An update's size, clipping, wire form and hash."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from fourdvq.errors import ConfigError, ModelError
from fourdvq.training.update import (
    apply,
    clip_relative,
    delta,
    global_norm,
    payload_sha256,
    relative_norm,
    to_wire,
)

BEFORE = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0]])}
AFTER = {"a": torch.tensor([3.0, 5.0]), "b": torch.tensor([[10.0]])}


def test_applying_a_delta_undoes_taking_it():
    back = apply(BEFORE, delta(BEFORE, AFTER))
    assert all(torch.equal(back[name], AFTER[name]) for name in AFTER)


def test_norms_by_hand():
    assert global_norm(BEFORE) == pytest.approx(13.0)
    assert relative_norm(delta(BEFORE, AFTER), BEFORE) == pytest.approx(math.sqrt(5) / 13)
    assert relative_norm(BEFORE, {"a": torch.zeros(2)}) == math.inf


def test_clipping_keeps_the_direction_and_small_updates():
    change = delta(BEFORE, AFTER)
    clipped = clip_relative(change, BEFORE, 0.05)
    assert relative_norm(clipped, BEFORE) == pytest.approx(0.05, rel=1e-6)
    assert float(clipped["b"] / change["b"]) == pytest.approx(float(clipped["a"][1] / change["a"][1]))
    assert all(torch.equal(clip_relative(change, BEFORE, 1.0)[name], change[name]) for name in change)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_is_no_limit_is_refused(limit):
    with pytest.raises(ConfigError, match="E_VALUE"):
        clip_relative(BEFORE, BEFORE, limit)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_the_wire_rounds_by_at_most_half_a_unit_of_its_dtype(dtype, error):
    values = {"w": 0.5 + torch.rand(1000, generator=torch.Generator().manual_seed(0))}  # no subnormals
    packed = to_wire(values, dtype)["w"]
    assert str(packed.dtype) == f"torch.{dtype}"
    assert float(((packed.float() - values["w"]) / values["w"]).abs().max()) <= error


def test_a_value_beyond_the_wire_dtype_is_refused():
    with pytest.raises(ModelError, match="E_NONFINITE"):
        to_wire({"w": torch.tensor([1e6])}, "float16")
    with pytest.raises(ConfigError, match="E_VALUE"):
        to_wire(BEFORE, "int8")


def test_a_delta_between_other_forms_is_refused():
    with pytest.raises(ModelError, match="E_WEIGHTS"):
        delta(BEFORE, {"a": torch.zeros(2), "b": torch.zeros(1)})
    with pytest.raises(ModelError, match="E_WEIGHTS"):
        apply(BEFORE, {"a": torch.zeros(2)})


def test_the_payload_hash_is_over_sorted_name_dtype_shape_and_little_endian_bytes():
    digest = hashlib.sha256()
    digest.update(b"a\0float32\x00[2]\0" + b"\0\0\x80\x3f\0\0\0\x40")  # 1.0 and 2.0
    digest.update(b"b\0bfloat16\x00[1, 1]\0" + b"\x80\x3f")
    tensors = {"b": torch.ones(1, 1, dtype=torch.bfloat16), "a": torch.tensor([1.0, 2.0])}
    assert payload_sha256(tensors) == digest.hexdigest()


def test_the_payload_hash_sees_shape_dtype_and_name():
    tensor = torch.zeros(4)
    forms = [{"a": tensor}, {"b": tensor}, {"a": tensor.view(2, 2)}, {"a": tensor.half()}, {"a": tensor + 1}]
    assert len({payload_sha256(form) for form in forms}) == len(forms)
