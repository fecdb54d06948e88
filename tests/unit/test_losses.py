"""Losses against hand-computed values and autograd."""

from __future__ import annotations

import math

import pytest
import torch

from fourdvq.losses import GAN_LOSSES, adaptive_weight, feature_matching, hinge_discriminator, l1_loss


def test_hinge_is_half_of_both_margins_on_plain_logits():
    # real 0.5 and 2 miss the margin by 0.5 and 0; fake -3 and 0 by 0 and 1
    assert float(hinge_discriminator(torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0]))) == pytest.approx(0.375)
    assert float(GAN_LOSSES["hinge"].generator(torch.tensor([1.0, -3.0]))) == pytest.approx(1.0)


def test_log_losses_are_equation_3_with_sigmoid_probabilities():
    real, fake = torch.tensor([0.3, -1.2]), torch.tensor([2.0, -0.4])
    p, q = torch.sigmoid(real.double()), torch.sigmoid(fake.double())
    wanted = -(p.log().mean() + (1 - q).log().mean())
    assert float(GAN_LOSSES["log"].discriminator(real, fake)) == pytest.approx(float(wanted), rel=1e-6)
    assert float(GAN_LOSSES["log"].generator(fake)) == pytest.approx(float((1 - q).log().mean()), rel=1e-6)


def test_log_losses_do_not_overflow_at_large_logits():
    assert math.isfinite(float(GAN_LOSSES["log"].discriminator(torch.tensor([-200.0]), torch.tensor([200.0]))))


@pytest.mark.parametrize("loss", sorted(GAN_LOSSES))
def test_a_generator_step_raises_the_logit(loss):
    logit = torch.tensor([0.2], requires_grad=True)
    (gradient,) = torch.autograd.grad(GAN_LOSSES[loss].generator(logit), logit)
    assert float(gradient) < 0


def test_feature_matching_sums_layers_and_trains_only_the_fake():
    real = [torch.ones(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    fake = [torch.full((2,), 3.0, requires_grad=True), torch.ones(3, requires_grad=True)]
    loss = feature_matching(real, fake)
    assert float(loss.detach()) == pytest.approx(2.0 + 1.0)
    loss.backward()
    assert real[0].grad is None
    assert fake[0].grad is not None


def test_feature_maps_of_different_number_are_refused():
    with pytest.raises(ValueError, match="matched"):
        feature_matching([torch.ones(1)], [])


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    recon = 2 * weight
    pull = torch.tensor([0.5, 0.5])  # of the loss recon.sum() / 2
    assert float(adaptive_weight((3 * weight).sum(), recon, pull, weight)) == pytest.approx(3.0, rel=1e-3)


def test_l1_is_the_mean_absolute_difference_in_float32():
    assert float(l1_loss(torch.tensor([1.0, -1.0]).bfloat16(), torch.tensor([0.0, 0.0]))) == 1.0
