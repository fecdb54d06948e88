"""The judges' size and what they look at."""

from __future__ import annotations

import pytest
import torch

from fourdvq.models.discriminators import axial_slices, build_discriminator
from fourdvq.training.adversary import Adversary
from vqgan_cases import SMALL_GAN, smooth_volume


@pytest.mark.parametrize(("dims", "count"), [(2, 2_763_585), (3, 11_048_769)])
def test_parameter_counts_of_the_published_layout(dims, count):
    with torch.device("meta"):
        net = build_discriminator(dims)
    assert sum(p.numel() for p in net.parameters()) == count


def test_axial_slices_take_one_row_of_each_volume():
    volumes = torch.arange(2 * 3 * 4 * 5).float().view(2, 1, 3, 4, 5)
    taken = axial_slices(volumes, torch.tensor([2, 0]))
    assert torch.equal(taken[0, 0], volumes[0, 0, 2])
    assert torch.equal(taken[1, 0], volumes[1, 0, 0])


def test_generator_losses_leave_no_gradient_in_the_discriminators_and_their_own_none_in_the_recon():
    adversary = Adversary(SMALL_GAN, seed=0)
    scan = smooth_volume(0)[None] - 0.5
    recon = (smooth_volume(1)[None] - 0.5).requires_grad_()
    judgement = adversary.judge(scan, recon, torch.tensor([5]))
    pull = judgement.gradient(judgement.adversarial + judgement.matching)
    assert pull.abs().sum() > 0
    assert all(p.grad is None for p in adversary.parameters())
    judgement.own.backward()
    assert recon.grad is None
    assert all(p.grad is not None for p in adversary.parameters())
