"""Laws of 16-bit weights on the wire: nothing is lost over the rounds, whatever their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourdvq.errors import ModelError, WireError
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.plan import ModelSpec
from fourdvq.training.update import apply, join_from_wire, split_for_wire
from fourdvq.wire.body import body_bytes
from fourdvq.wire.flower import pack, unpack
from fourdvq.wire.messages import PROTOCOL, OdeTask, TaskEnvelope
from fourdvq.wire.narrow import narrowed, widened

ROUNDS = 300
HEX = "ab" * 32
TASK = TaskEnvelope(PROTOCOL, "run-1", 3, "0" * 32, HEX, "", HEX, HEX)


def some_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-30, 3, 4000)
    return {"a": torch.randn(4000, generator=generator) * scales, "b": torch.zeros(7)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_sent_and_what_is_kept_are_the_weights_bit_for_bit(dtype):
    weights = some_weights()
    sent, rest = split_for_wire(weights, dtype)
    back = join_from_wire(sent, rest)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assert torch.equal(sent["a"], weights["a"].to(getattr(torch, dtype)).float())
    assert set(rest) == ({"a"} if dtype == "bfloat16" else set())  # nothing is kept back of what is exact


def test_rounded_weights_follow_the_exact_sum_of_small_changes_within_one_unit_in_the_last_place():
    """Changes far below a unit in the last place: rounding alone would never move a weight."""
    weights = {"a": torch.linspace(0.5, 2.0, 500)}
    generator = torch.Generator().manual_seed(1)
    sent, rest = split_for_wire(weights, "bfloat16")
    forgetful = sent["a"]
    exact = weights["a"].double()
    for _ in range(ROUNDS):
        change = 1e-4 * (1.0 + torch.rand(500, generator=generator))
        exact = exact + change.double()
        sent, rest = split_for_wire(apply(join_from_wire(sent, rest), {"a": change}), "bfloat16")
        forgetful = (forgetful + change).bfloat16().float()
        unit = torch.exp2(torch.floor(torch.log2(exact)) - 7)  # of bfloat16: seven bits behind the point
        assert bool(((sent["a"].double() - exact).abs() <= unit).all())
    assert float((exact - weights["a"].double()).min()) > 0.04
    # Rounding without carrying leaves weights where they were: ten units behind and more.
    assert float(((forgetful.double() - exact).abs() / unit).max()) > 10.0


def test_codes_travel_whole():
    weights = {"codebook.codes": torch.rand(8, 2), "encoder.weight": torch.rand(8, 2)}
    sent, rest = split_for_wire(weights, "bfloat16")
    assert torch.equal(sent["codebook.codes"], weights["codebook.codes"])
    assert torch.equal(sent["encoder.weight"], weights["encoder.weight"].bfloat16().float())
    assert set(rest) == {"encoder.weight"}


def test_a_weight_beyond_the_wire_s_range_is_refused():
    with pytest.raises(ModelError, match="E_NONFINITE"):
        split_for_wire({"a": torch.tensor([1e6])}, "float16")


@pytest.mark.parametrize(("decoder", "megabytes"), [("half", 12.0), ("tats", 12.0)])
def test_a_whole_generator_in_16_bits_needs_less_than_twelve_megabytes(decoder, megabytes):
    with torch.device("meta"):
        model = VQGAN3d(ModelSpec(decoder=decoder))
    size = sum(2 * t.numel() for n, t in model.state_dict().items() if not n.startswith("codebook."))
    assert size < megabytes * 1e6


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.sampled_from(["none", "bfloat16", "float16"]))
def test_a_model_arrives_bit_for_bit_whatever_its_values(patterns, rounded):
    """Any bit pattern of float32: also infinities, -0 and numbers below the normal range; NaN only has to stay NaN."""
    weights = torch.from_numpy(np.array(patterns, np.uint32).view(np.float32))
    if rounded != "none":
        weights = weights.to(getattr(torch, rounded)).float()
    number = ~torch.isnan(weights)
    back = widened(narrowed({"w": weights}, "weights"))["w"]
    assert back.dtype is torch.float32
    assert torch.equal(back[number].view(torch.int32), weights[number].view(torch.int32))
    assert bool(torch.isnan(back[~number]).all())


@pytest.mark.parametrize(("dtype", "bytes_a_weight"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_a_rounded_model_travels_in_half_the_bytes_and_is_the_same_float32_model_at_the_site(dtype, bytes_a_weight):
    weights = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)), "n": torch.arange(3)}
    sent, _ = split_for_wire(weights, dtype)
    task = OdeTask(steps=1, tokenizer_sha256=HEX, weights=sent)
    assert body_bytes(task) == 1000 * bytes_a_weight + 3 * 8
    arrived = unpack(pack(TASK, task), TaskEnvelope, OdeTask)[1]
    assert arrived.weights.keys() == sent.keys()
    assert all(torch.equal(arrived.weights[n], t) and arrived.weights[n].dtype == t.dtype for n, t in sent.items())


def test_weights_of_16_bits_that_would_come_back_as_float32_are_refused():
    with pytest.raises(WireError, match="E_MESSAGE"):
        pack(TASK, OdeTask(steps=1, tokenizer_sha256=HEX, weights={"w": torch.zeros(2, dtype=torch.bfloat16)}))
