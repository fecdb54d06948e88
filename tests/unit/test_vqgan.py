"""The generator: straight-through codes, what is shared, strict loading, the tokenizer's hash."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fourdvq.errors import ModelError
from fourdvq.federation.codebook import CodebookState
from fourdvq.models.vqgan import (
    VQGAN3d,
    codebook_state,
    generator_weights,
    load_codebook,
    load_generator,
    tokenizer_sha256,
)
from fourdvq.training.seeds import seeded
from vqgan_cases import TINY, smooth_volume


def model(**changes) -> VQGAN3d:
    with seeded(0, "test"):
        return VQGAN3d(replace(TINY, **changes))


def scan() -> torch.Tensor:
    return smooth_volume(0)[None] - 0.5


@pytest.mark.parametrize(("quantiser", "code_dim"), [("ema", 4), ("loss", 4), ("fsq", 3)])
def test_quantised_latents_are_exactly_the_codes_of_their_indices(quantiser, code_dim):
    net = model(quantiser=quantiser, code_dim=code_dim, n_codes=32)
    out = net(scan())
    assert out.recon.shape == (1, 1, 16, 32, 32)
    assert out.indices.shape == (1, 4, 8, 8)
    assert torch.equal(out.z_q, net.embed(out.indices))
    assert torch.equal(net.quantise(out.z_q).indices, out.indices)


def test_the_gradient_passes_the_quantiser_unchanged():
    net = model()
    z = torch.randn(1, 4, 2, 3, 3, requires_grad=True)
    upstream = torch.randn(1, 4, 2, 3, 3)
    (net.quantise(z).z_q * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)


@pytest.mark.parametrize(("quantiser", "moves"), [("ema", False), ("loss", True)])
def test_only_the_loss_quantiser_sends_a_gradient_to_its_codes(quantiser, moves):
    net = model(quantiser=quantiser)
    out = net(scan())
    (out.commitment + out.codebook_loss).backward()
    assert net.codebook.codes.requires_grad is moves
    assert (net.codebook.codes.grad is not None) is moves
    assert net.pre_quantise.weight.grad is not None


def test_quantiser_and_losses_stay_in_float32_under_autocast():
    net = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(scan())
    assert out.recon.dtype is torch.bfloat16
    assert (out.z_q.dtype, out.commitment.dtype) == (torch.float32, torch.float32)


def test_shared_weights_hold_everything_but_the_codebook():
    ema, learnt = generator_weights(model()), generator_weights(model(quantiser="loss"))
    assert not any(name.startswith("codebook") for name in ema)
    assert set(learnt) - set(ema) == {"codebook.codes"}
    batch = generator_weights(model(norm="batch"))
    assert any(name.endswith("running_mean") for name in batch)
    assert all(t.is_floating_point() for t in batch.values())


def test_loading_what_was_taken_gives_the_same_model():
    source, target = model(), VQGAN3d(TINY)
    load_generator(target, generator_weights(source))
    load_codebook(target, codebook_state(source))
    assert bool(target.codebook.is_seeded)
    assert torch.equal(source(scan()).recon, target(scan()).recon)


def broken(weights: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = "pre_quantise.bias"
    value = weights.pop(name)
    changed = {
        "missing": {},
        "extra": {name: value, "extra": value},
        "broadcastable": {name: value[:1]},
        "dtype": {name: value.double()},
        "nan": {name: torch.full_like(value, float("nan"))},
    }
    return weights | changed[how]


@pytest.mark.parametrize("how", ["missing", "extra", "broadcastable", "dtype", "nan"])
def test_weights_that_do_not_fit_are_refused_and_change_nothing(how):
    net = model()
    before = generator_weights(net)
    with pytest.raises(ModelError, match="E_WEIGHTS"):
        load_generator(net, broken({n: t + 1 for n, t in before.items()}, how))
    assert all(torch.equal(t, before[n]) for n, t in generator_weights(net).items())


def test_a_codebook_of_another_shape_or_another_fsq_grid_is_refused():
    state = codebook_state(model())
    with pytest.raises(ModelError, match="E_WEIGHTS"):
        load_codebook(model(), CodebookState(state.codes[:1], state.counts, state.sums))
    fixed = model(quantiser="fsq", code_dim=3, n_codes=32)
    grid = codebook_state(fixed)
    load_codebook(fixed, grid)
    with pytest.raises(ModelError, match="fixed grid"):
        load_codebook(fixed, CodebookState(grid.codes + 0.01, grid.counts, grid.sums))


def test_the_tokenizer_hash_follows_encoder_and_codes_and_nothing_else():
    net = model()
    first = tokenizer_sha256(net)
    with torch.no_grad():
        net.decoder.last.conv.weight.add_(1.0)
        net.codebook.counts.add_(1.0)
    assert tokenizer_sha256(net) == first
    with torch.no_grad():
        net.codebook.codes[0, 0] += 1e-3
    second = tokenizer_sha256(net)
    with torch.no_grad():
        net.pre_quantise.weight += 1e-3
    assert len({first, second, tokenizer_sha256(net)}) == 3
