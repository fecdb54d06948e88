"""Convolutions that keep or halve or double the size, normalisation, the shuffle."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fourdvq.models.blocks import (
    Conv3dSame,
    ConvTranspose3dSame,
    ResBlock3d,
    levels_of,
    norm3d,
    norm_silu,
    voxel_shuffle,
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_sizes_are_kept_halved_and_doubled(padding):
    x = random(1, 3, 6, 10, 8)
    assert Conv3dSame(3, 5, padding=padding)(x).shape == (1, 5, 6, 10, 8)
    assert Conv3dSame(3, 5, 4, stride=2, padding=padding)(x).shape == (1, 5, 3, 5, 4)
    assert ConvTranspose3dSame(3, 5, padding=padding)(x).shape == (1, 5, 12, 20, 16)


def test_replicate_padding_leaves_a_constant_volume_constant():
    conv = Conv3dSame(1, 1, padding="replicate")
    out = conv(torch.full((1, 1, 4, 6, 6), 0.7))
    torch.testing.assert_close(out, torch.full_like(out, float(out.flatten()[0].detach())))
    doubled = ConvTranspose3dSame(1, 1, padding="replicate")(torch.full((1, 1, 4, 6, 6), 0.7))
    # A transposed convolution has one value per position within its stride, so compare every second voxel.
    corner = doubled[..., :2, :2, :2].repeat(1, 1, 4, 6, 6)
    torch.testing.assert_close(doubled, corner)


@pytest.mark.parametrize("depth", [6, 7])
def test_small_volumes_give_the_same_convolution_and_gradient_as_torch(depth):
    conv = Conv3dSame(3, 4)
    x = random(1, 3, depth, 9, 8).requires_grad_()
    ours = conv(x)
    plain = F.conv3d(x, conv.conv.weight, conv.conv.bias, padding=1)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(y.square().sum(), (x, conv.conv.weight)) for y in (ours, plain)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# Either side of the size at which torch changes its way.
@pytest.mark.parametrize("size", [(6, 9, 8), (160, 130, 8)], ids=["small", "large"])
@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_without_gradients_a_volume_of_one_channel_gives_the_same_convolution_with_channels_last(size, padding):
    conv = Conv3dSame(1, 4, padding=padding)
    x = random(1, 1, *size)
    with torch.no_grad():
        ours = conv(x)
    torch.testing.assert_close(ours, conv(x), rtol=1e-5, atol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last_3d)
    assert conv(x).is_contiguous()


@pytest.mark.parametrize(("channels", "groups"), [(4, 2), (8, 4), (24, 12), (64, 32), (80, 20), (128, 32)])
def test_group_number_divides_the_channels(channels, groups):
    assert norm3d("group", channels).num_groups == groups


def test_group_norm_on_16_bits_keeps_them_and_agrees_with_float32():
    norm = norm3d("group", 8)
    x = random(1, 8, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = norm_silu(norm, x.bfloat16())
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), F.silu(norm(x)), rtol=0.03, atol=0.03)


def test_residual_block_with_a_zero_last_convolution_is_the_identity():
    block = ResBlock3d(8, norm="group", padding="zeros")
    for parameter in block.conv2.parameters():
        torch.nn.init.zeros_(parameter)
    x = random(1, 8, 4, 4, 4)
    torch.testing.assert_close(block(x), x)


def test_shuffle_puts_channel_ijk_at_voxel_ijk_of_its_cube():
    x = random(2, 8, 3, 4, 5)
    out = voxel_shuffle(x)
    assert out.shape == (2, 1, 6, 8, 10)
    for channel in range(8):
        i, j, k = channel >> 2 & 1, channel >> 1 & 1, channel & 1
        torch.testing.assert_close(out[:, 0, i::2, j::2, k::2], x[:, channel])


@pytest.mark.parametrize("compression", [0, 1, 3, 6])
def test_a_compression_that_is_no_power_of_two_is_refused(compression):
    with pytest.raises(ValueError, match="power of two"):
        levels_of(compression)


def test_a_kernel_that_cannot_be_padded_evenly_is_refused():
    with pytest.raises(ValueError, match="evenly"):
        Conv3dSame(1, 1, 3, stride=2)
