"""Laws of 16-bit weights on the wire: nothing is lost over the rounds, whatever their number."""

from __future__ import annotations

import pytest
import torch

from fourdvq.errors import ModelError
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.plan import ModelSpec
from fourdvq.training.update import apply, join_from_wire, split_for_wire

ROUNDS = 300


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
    assert sent["a"].dtype is getattr(torch, dtype)


def test_rounded_weights_follow_the_exact_sum_of_small_changes_within_one_unit_in_the_last_place():
    """Changes far below a unit in the last place: rounding alone would never move a weight."""
    weights = {"a": torch.linspace(0.5, 2.0, 500)}
    generator = torch.Generator().manual_seed(1)
    sent, rest = split_for_wire(weights, "bfloat16")
    forgetful = sent["a"].float()
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
    assert sent["encoder.weight"].dtype is torch.bfloat16
    assert float(rest["codebook.codes"].abs().sum()) == 0.0


def test_a_weight_beyond_the_wire_s_range_is_refused():
    with pytest.raises(ModelError, match="E_NONFINITE"):
        split_for_wire({"a": torch.tensor([1e6])}, "float16")


@pytest.mark.parametrize(("decoder", "megabytes"), [("half", 12.0), ("tats", 12.0)])
def test_a_whole_generator_in_16_bits_needs_less_than_twelve_megabytes(decoder, megabytes):
    with torch.device("meta"):
        model = VQGAN3d(ModelSpec(decoder=decoder))
    size = sum(2 * t.numel() for n, t in model.state_dict().items() if not n.startswith("codebook."))
    assert size < megabytes * 1e6
