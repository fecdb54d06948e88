"""Laws of the messages: round trip, nothing undeclared, sums over sites equal the union."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdvq.errors import WireError
from fourdvq.survival.masking import Masker
from fourdvq.survival.messages import array_fields
from fourdvq.wire.body import body_bytes, body_sha256, leaf_types
from fourdvq.wire.flower import pack, unpack, unpack_envelope, wire_bytes
from fourdvq.wire.masked import masked_reply, masked_sums
from fourdvq.wire.messages import (
    COX_TASKS,
    OTHER_REPLIES,
    PROTOCOL,
    REPLIES,
    TASKS,
    EvalSummary,
    MaskedReply,
    OdeUpdate,
    PlanTask,
    Receipt,
    Refusal,
    ReplyEnvelope,
    SiteCard,
    TaskEnvelope,
    VqganTask,
    VqganUpdate,
    reply_types,
)

HEX = "ab" * 32
TASK = TaskEnvelope(PROTOCOL, "run-1", 3, "0" * 32, HEX, "", HEX, HEX)
REPLY = ReplyEnvelope(PROTOCOL, "run-1", 3, "0" * 32, HEX, "", "leuven", HEX, HEX, 0.0)

numbers = st.floats(-1e6, 1e6)


def update(seed: int, scans: int) -> VqganUpdate:
    rng = np.random.default_rng(seed)
    delta = {
        "enc.weight": torch.from_numpy(rng.normal(size=(2, 3)).astype(np.float32)),
        "dec.bias": torch.from_numpy(rng.normal(size=4).astype(np.float32)),
    }
    return VqganUpdate(delta, rng.random(8), rng.normal(size=(8, 4)), scans, {"rec": float(rng.random())})


def summary(seed: int) -> EvalSummary:
    rng = np.random.default_rng(seed)
    rows = tuple(sorted(rng.choice(["model.mse", "persistence.mse", "ceiling.psnr", "skill"], size=3, replace=False)))
    return EvalSummary(rows, rng.integers(1, 20, 3), rng.normal(size=3), rng.random(3), int(rng.integers(1, 9)))


def as_dict(s: EvalSummary) -> dict:
    return {
        row: (int(s.n[i]), round(float(s.total[i]), 9), round(float(s.total_sq[i]), 9)) for i, row in enumerate(s.rows)
    }


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 1000), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_a_message_comes_back_as_it_was_sent(seed, scans, dtype):
    sent = update(seed, scans)
    sent = replace(sent, delta={k: v.to(getattr(torch, dtype)) for k, v in sent.delta.items()})
    envelope, got = unpack(pack(REPLY, sent), ReplyEnvelope, VqganUpdate)
    assert envelope == REPLY
    assert body_sha256(got) == body_sha256(sent)
    assert all(
        torch.equal(got.delta[k], sent.delta[k]) and got.delta[k].dtype == sent.delta[k].dtype for k in sent.delta
    )


def test_bfloat16_halves_the_bytes_on_the_wire():
    whole = replace(update(0, 1), delta={"w": torch.zeros(1000)})
    half = replace(whole, delta={"w": torch.zeros(1000, dtype=torch.bfloat16)})
    assert body_bytes(whole) - body_bytes(half) == 2000
    assert wire_bytes(pack(REPLY, whole)) - wire_bytes(pack(REPLY, half)) == pytest.approx(2000, abs=16)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 50)), min_size=2, max_size=5))
def test_sum_of_updates_is_the_message_of_the_union_in_any_order(parts):
    updates = [update(*p) for p in parts]
    forward = updates[0]
    for u in updates[1:]:
        forward = forward + u
    backward = updates[-1]
    for u in reversed(updates[:-1]):
        backward = backward + u
    scans = np.array([u.scans for u in updates], dtype=float)
    pooled = sum(s * u.delta["enc.weight"].double() for s, u in zip(scans, updates, strict=True)) / scans.sum()
    assert forward.scans == backward.scans == int(scans.sum())
    torch.testing.assert_close(forward.delta["enc.weight"].double(), pooled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(forward.delta["enc.weight"], backward.delta["enc.weight"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(forward.code_counts, sum(u.code_counts for u in updates))
    np.testing.assert_allclose(forward.code_sums, sum(u.code_sums for u in updates))


def test_sum_of_ode_updates_weights_by_patients():
    a, b = (
        OdeUpdate({"w": torch.tensor([1.0])}, 1, {"ode": 1.0}),
        OdeUpdate({"w": torch.tensor([4.0])}, 2, {"ode": 4.0}),
    )
    both = a + b
    assert (both.patients, float(both.delta["w"]), both.losses["ode"]) == (3, pytest.approx(3.0), pytest.approx(3.0))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=4))
def test_sum_of_summaries_is_the_summary_of_the_union(seeds):
    parts = [summary(s) for s in seeds]
    total = parts[0]
    for p in parts[1:]:
        total = total + p
    expected: dict = {}
    for p in parts:
        for row, (n, t, q) in as_dict(p).items():
            before = expected.get(row, (0, 0.0, 0.0))
            expected[row] = (before[0] + n, before[1] + t, before[2] + q)
    assert as_dict(total).keys() == expected.keys()
    for row, values in expected.items():
        assert as_dict(total)[row] == pytest.approx(values)


UNDECLARED = {
    "an extra record": lambda r: r.__setitem__("extra", ConfigRecord({"x": 1})),
    "an extra scalar": lambda r: _edit(r, "fields", patient="LEU-004217"),
    "an extra tensor set": lambda r: r["tensors"].__setitem__("images", r["tensors"]["delta"]),
    "a missing field": lambda r: _edit(r, "fields", scans=None),
    "a number where a count is due": lambda r: _edit(r, "fields", scans=1.5),
    "an infinite loss": lambda r: r["fields"].__setitem__(
        "json", r["fields"]["json"].replace('"scans":7', '"scans":1e999')
    ),
    "a loss with a path for a name": lambda r: _edit(r, "fields", losses={"/data/LEU-004217": 1.0}),
    "a numpy array in place of safetensors bytes": lambda r: r["tensors"].__setitem__("delta", Array(np.zeros(3))),
    "bytes that are no safetensors file": lambda r: r["tensors"].__setitem__(
        "delta", Array("uint8", (3,), "safetensors", b"abc")
    ),
    "an envelope field of another kind": lambda r: _edit(r, "envelope", round="3"),
    "a site name with a path": lambda r: _edit(r, "envelope", site="/data/leuven"),
    "a run name with a date": lambda r: _edit(r, "envelope", run="2015/03/02"),
}


def _edit(records: RecordDict, name: str, **changes) -> None:
    fields = json.loads(records[name]["json"])
    for key, value in changes.items():
        if value is None:
            del fields[key]
        else:
            fields[key] = value
    records[name]["json"] = json.dumps(fields)


@pytest.mark.parametrize("case", UNDECLARED)
def test_what_is_not_declared_is_refused(case):
    records = pack(REPLY, update(1, 7))
    unpack(records, ReplyEnvelope, VqganUpdate)
    UNDECLARED[case](records)
    with pytest.raises(WireError) as caught:
        unpack(records, ReplyEnvelope, VqganUpdate)
    assert caught.value.code == "E_MESSAGE"
    assert "LEU-004217" not in str(caught.value)


OUTGOING = {
    "a path in a refusal": lambda: Refusal("/data/LEU-004217"),
    "lower case in a refusal": lambda: Refusal("no such file"),
    "an object array": lambda: replace(update(0, 1), code_counts=np.array([object()])),
    "a numpy float for a count": lambda: Receipt(HEX, scans=np.float64(3)),
    "not a number": lambda: replace(update(0, 1), losses={"rec": float("nan")}),
    "a foreign word": lambda: SiteCard("trainer", "1", HEX, HEX, "cpu", True, 1, 1, 1),
    "text that is not JSON": lambda: PlanTask("plan", "{}"),
    "a tensor named like a path": lambda: replace(update(0, 1), delta={"../x": torch.zeros(1)}),
}


@pytest.mark.parametrize("case", OUTGOING)
def test_what_has_no_declared_form_cannot_be_packed(case):
    with pytest.raises(WireError):
        pack(REPLY, OUTGOING[case]())


def test_the_envelope_is_read_before_anything_large():
    records = pack(
        TASK, VqganTask(4, 0, False, {"w": torch.zeros(2)}, np.zeros((8, 4), np.float32), np.zeros(8), np.zeros((8, 4)))
    )
    assert unpack_envelope(records, TaskEnvelope) == TASK


def test_every_task_has_a_reply_type_with_an_egress_kind():
    assert TASKS.keys() == REPLIES.keys()
    assert all(reply.egress for reply in REPLIES.values())


def test_no_field_of_any_message_is_free_text():
    """Every text field has a form or a fixed list of words: no field can hold a patient id."""
    import typing

    for cls in {*TASKS.values(), *REPLIES.values(), Refusal, TaskEnvelope, ReplyEnvelope}:
        for name, hint in leaf_types(cls):
            assert hint is not str, f"{cls.__name__}.{name}"
            assert typing.get_origin(hint) is not tuple or str not in typing.get_args(hint), f"{cls.__name__}.{name}"


def test_equal_weights_for_two_sites_are_one_object():
    weights = {"w": torch.arange(6.0)}
    a = pack(TASK, VqganTask(4, 0, False, weights, np.zeros((8, 4), np.float32), np.zeros(8), np.zeros((8, 4))))
    b = pack(
        replace(TASK, task_id="1" * 32),
        VqganTask(4, 0, False, weights, np.zeros((8, 4), np.float32), np.zeros(8), np.zeros((8, 4))),
    )
    assert isinstance(a["tensors"], ArrayRecord)
    assert a["tensors"].object_id == b["tensors"].object_id


@pytest.mark.parametrize("kind", sorted(COX_TASKS))
def test_cox_messages_come_back_as_they_were_sent(kind):
    task = TASKS[kind](
        analysis=1, tokenizer_sha256=HEX, request=example(TASKS[kind].__dataclass_fields__["request"].type)
    )
    reply = REPLIES[kind](sums=example(REPLIES[kind].__dataclass_fields__["sums"].type))
    assert body_sha256(unpack(pack(TASK, task), TaskEnvelope, TASKS[kind])[1]) == body_sha256(task)
    assert body_sha256(unpack(pack(REPLY, reply), ReplyEnvelope, REPLIES[kind])[1]) == body_sha256(reply)
    doubled = reply + reply
    assert all(np.array_equal(v, 2 * reply.sums.arrays()[k]) for k, v in doubled.sums.arrays().items())


@pytest.mark.parametrize("kind", sorted(COX_TASKS))
def test_masked_sums_come_back_as_what_they_are_and_as_nothing_else(kind):
    sums = example(REPLIES[kind].__dataclass_fields__["sums"].type)
    mine = X25519PrivateKey.generate()
    masker = Masker("a", mine, {"b": X25519PrivateKey.generate().public_key().public_bytes_raw()}, run="r/1")
    masked = masker.mask(sums)
    reply = unpack(pack(REPLY, masked_reply(masked)), ReplyEnvelope, *reply_types(kind))[1]
    assert type(reply) is MaskedReply
    back = masked_sums(reply, type(sums))
    assert (back.counter, back.parties) == (0, 2)
    assert all(np.array_equal(back.arrays[name], array) for name, array in masked.arrays.items())
    for broken in ({}, {**reply.hidden, "extra": torch.zeros(1, dtype=torch.int64)}):
        with pytest.raises(WireError):
            masked_sums(replace(reply, hidden=broken), type(sums))
    floats = {name: tensor.double() for name, tensor in reply.hidden.items()}
    with pytest.raises(WireError):
        masked_sums(replace(reply, hidden=floats), type(sums))


def test_no_two_answers_to_one_question_have_the_same_fields():
    for kind, others in OTHER_REPLIES.items():
        names = [tuple(name for name, _ in leaf_types(cls)) for cls in (REPLIES[kind], *others)]
        assert len(set(names)) == len(names), kind


def example(cls):
    """A message with every axis of size 2 (`one` of size 1)."""
    arrays = {
        name: np.ones([1 if axis == "one" else 2 for axis in axes.names], dtype=dtype)
        for name, (dtype, axes) in array_fields(cls).items()
    }
    return cls(**arrays)
