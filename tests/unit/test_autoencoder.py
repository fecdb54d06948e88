"""Parameter counts of the published layout, and shapes of every variant."""

from __future__ import annotations

import itertools

import pytest
import torch

from fourdvq.models.autoencoder import Decoder3d, Encoder3d, decoder_widths
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.plan import ModelSpec


def n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("base", "compression", "decoder", "encoder_count", "decoder_count"),
    [
        (32, 4, "tats", 1_763_776, 3_789_185),
        (32, 4, "half", 1_763_776, 2_847_624),
        (32, 8, "tats", 7_401_920, 16_113_537),
        (8, 4, "tats", 110_704, 237_665),
    ],
)
def test_parameter_counts_are_those_of_the_published_layers(base, compression, decoder, encoder_count, decoder_count):
    with torch.device("meta"):
        model = VQGAN3d(ModelSpec(base_width=base, compression=compression, decoder=decoder))
    assert n_parameters(model.encoder) == encoder_count
    assert n_parameters(model.decoder) == decoder_count


def test_the_two_pointwise_convolutions_of_the_tiny_preset_have_292_parameters():
    model = VQGAN3d(ModelSpec(base_width=8, code_dim=4))
    assert n_parameters(model.pre_quantise) + n_parameters(model.post_quantise) == 292


@pytest.mark.parametrize(
    ("variant", "compression", "widths"),
    [
        ("tats", 4, [128, 64]),
        ("thin", 4, [128, 32]),
        ("half", 4, [128]),
        ("tats", 8, [256, 128, 64]),
        ("half", 8, [256, 128]),
    ],
)
def test_decoder_widths(variant, compression, widths):
    assert decoder_widths(32, compression, variant) == widths


@pytest.mark.parametrize(
    ("variant", "compression", "norm", "padding"),
    list(itertools.product(["tats", "thin", "half"], [4, 8], ["group", "batch"], ["zeros", "replicate"])),
)
def test_every_variant_returns_the_size_it_got(variant, compression, norm, padding):
    encoder = Encoder3d(2, compression, norm=norm, padding=padding)
    decoder = Decoder3d(2, compression, variant=variant, norm=norm, padding=padding)
    x = torch.zeros(1, 1, 16, 16, 32)
    h = encoder(x)
    assert h.shape == (1, 2 * compression, 16 // compression, 16 // compression, 32 // compression)
    assert decoder(h).shape == x.shape
