"""A federation of one site, one round, is local training."""

from __future__ import annotations

import torch

from fourdvq.federation.aggregate import weighted_mean
from fourdvq.training.update import apply
from temporal_cases import latent_cohort as cohort
from temporal_cases import ode_trainer as trainer


def test_one_site_one_round_equals_local_training():
    local, site = trainer(), trainer()
    start = {name: tensor.clone() for name, tensor in local.model.state_dict().items()}
    local.train(cohort(), steps=6)
    site.load_global(start)
    done = site.train(cohort(), steps=6)
    merged = apply(start, weighted_mean([(float(done.patients_used), done.delta)]))
    for name, tensor in local.model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)


def test_rounds_with_the_optimiser_kept_equal_one_long_training():
    long, site = trainer(), trainer()
    weights = {name: tensor.clone() for name, tensor in long.model.state_dict().items()}
    long.train(cohort(), steps=6)
    for _ in range(3):
        site.load_global(weights)
        weights = apply(weights, weighted_mean([(1.0, site.train(cohort(), steps=2).delta)]))
    for name, tensor in long.model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0)
