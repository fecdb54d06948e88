"""Training of stage 2: what is given, what is counted, what is refused, and that stopping changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fourdvq.data.latents import LatentPatient
from fourdvq.errors import DataError, ModelError
from fourdvq.models.latent_ode import InitialState
from fourdvq.plan import FederationSpec, OdeTraining, TemporalSpec
from fourdvq.training.checkpoint import load_state, save_state
from fourdvq.training.latent_ode import OdeTrainer, choose_given, time_weights, trajectory_loss
from fourdvq.training.precision import self_check
from fourdvq.training.update import global_norm
from temporal_cases import CODES, DIM, GRID, randomise, small_ode
from temporal_cases import latent_cohort as cohort
from temporal_cases import ode_codebook as codebook
from temporal_cases import ode_plan as plan
from temporal_cases import ode_trainer as trainer
from temporal_cases import patients as given_patients


def test_training_lowers_the_error_on_a_world_where_every_code_rises_by_one_a_year():
    book = torch.linspace(-1, 1, CODES)[:, None].expand(CODES, DIM).contiguous()
    start = torch.tensor(np.random.default_rng(0).integers(0, CODES - 3, GRID))
    lung = torch.ones(GRID, dtype=torch.bool)
    years = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    indices = torch.stack([start + k for k in range(4)]).to(torch.uint8)
    settings = dataclasses.replace(plan(), ode=OdeTraining(lr=1e-2))
    ours = OdeTrainer(settings, book, seed=0)
    patients = [LatentPatient("p", indices, lung, years, torch.zeros(4, DIM), "t")]
    untrained = ours.train(patients, steps=1).losses["recon"]
    ours.train(patients, steps=60)
    assert ours.train(patients, steps=5).losses["recon"] < 0.05 * untrained


def test_a_stopped_and_restored_trainer_ends_with_the_same_weights_bit_for_bit(tmp_path):
    patients = cohort()
    straight = trainer(mask_prob=0.3)
    straight.train(patients, steps=7)
    first = trainer(mask_prob=0.3)
    first.train(patients, steps=3)
    save_state(tmp_path / "ode", first.state())
    second = trainer(seed=99, mask_prob=0.3)
    second.restore(load_state(tmp_path / "ode"))
    second.train(patients, steps=4)
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_a_state_of_another_plan_is_refused():
    with pytest.raises(ModelError, match="E_CHECKPOINT"):
        trainer(hidden=5).restore(trainer().state())


def test_the_proximal_term_keeps_a_round_near_its_start():
    settings = dataclasses.replace(plan(), ode=OdeTraining(lr=1e-2, clip=1e9))
    pulled = dataclasses.replace(settings, federation=FederationSpec(proximal_mu=100.0))
    moved = [global_norm(OdeTrainer(p, codebook(), seed=0).train(cohort(), steps=15).delta) for p in (settings, pulled)]
    assert moved[1] < 0.5 * moved[0]


def test_every_site_starts_from_the_weights_that_the_plan_determines():
    a, b = (OdeTrainer(plan(), codebook(), seed=seed).model.state_dict() for seed in (1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "settings",
    [
        {"projector": "paper", "anchor": "paper", "solver": "dopri5"},
        {"projector": "paper", "anchor": "paper", "solver": "dopri5", "skip": False},
        {"projector": "paper", "anchor": "paper", "solver": "dopri5", "mask_prob": 0.5, "grid": "halfyear"},
        {"projector": "paper", "anchor": "last_given", "encoder": "ode_conv_gru"},
        {"anchor": "identity", "time_gap_channel": True},
    ],
    ids=["proposed", "no skip", "masked", "ode conv gru", "identity"],
)
def test_every_row_of_the_ablation_table_trains(settings):
    ours = trainer(**settings)
    done = ours.train(cohort(), steps=3)
    assert np.isfinite(done.losses["loss"])
    assert all(float(d.abs().max()) > 0 for d in done.delta.values())


def drifting_patients(rates: list[float]) -> list[LatentPatient]:
    """Patients whose codes stay as they are while the mean before quantisation rises by a patient's own rate."""
    years = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    frozen = torch.zeros(3, *GRID, dtype=torch.uint8)
    lung = torch.ones(GRID, dtype=torch.bool)
    return [
        LatentPatient(f"p{i}", frozen, lung, years, (rate * years[:, None]).float().expand(3, DIM), "t")
        for i, rate in enumerate(rates)
    ]


def forecast_drift(lambda_drift: float) -> np.ndarray:
    """Predicted change of the lung's mean in the year after two scans, a row for each of eight trained patients."""
    settings = dataclasses.replace(
        plan(lung_context=True), ode=OdeTraining(lr=1e-2, lambda_drift=lambda_drift, precision="fp32")
    )
    ours, patients = OdeTrainer(settings, codebook(), seed=0), drifting_patients([-0.4 + 0.1 * i for i in range(8)])
    ours.train(patients, steps=120)
    z = codebook()[0][None, None, :, None, None, None].expand(1, 3, DIM, *GRID)
    t, seen = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[True, True, False]])
    found = [ours.model(z, t, seen, t[:, 2:], means=p.means[None]).mean(dim=(3, 4, 5))[0, 0] for p in patients]
    return (torch.stack(found) - codebook()[0]).detach().numpy()


def test_a_slow_change_that_the_codes_round_away_is_forecast_from_the_lungs_means():
    rates = np.array([-0.4 + 0.1 * i for i in range(8)])
    predicted = forecast_drift(100.0).mean(axis=1)
    assert np.corrcoef(predicted, rates)[0, 1] > 0.95
    assert 0.8 < np.polyfit(rates, predicted, 1)[0] < 1.2
    # The negative control: the codes alone, which never move, teach that nothing happens.
    assert np.abs(forecast_drift(0.0)).max() < 0.05


def test_the_drift_term_is_the_weighted_square_of_what_the_mean_moved_too_far():
    zq = torch.zeros(3, 1, 1, 1, 2)
    zhat = torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 6.0]]).view(3, 1, 1, 1, 2)  # means 0, 2, 4
    means = torch.tensor([[0.0], [1.5], [4.5]])  # moves 1.5, 3.0
    lung, exact = torch.ones(1, 1, 2, dtype=torch.bool), np.array([True, False, False])
    weights = np.array([1.0, 1.0, 2.0])
    found = trajectory_loss(zhat, zq, lung, exact, OdeTraining(lambda_drift=3.0), weights, means)
    assert found.drift is not None
    assert float(found.drift) == pytest.approx((1.0 * 0.5**2 + 2.0 * 1.0**2) / 2)
    assert float(found.total) == pytest.approx(float(found.recon + found.diff + 3 * found.drift))
    assert trajectory_loss(zhat, zq, lung, exact, OdeTraining(), weights, means).drift is None


def gradient(precision: str, **temporal: object) -> torch.Tensor:
    """Of the first draw's loss, all weights in one vector."""
    ours = OdeTrainer(dataclasses.replace(plan(**temporal), ode=OdeTraining(precision=precision)), codebook(), seed=0)
    randomise(ours.model, seed=3, scale=0.2)
    ours.loss_of(cohort(1)[0], np.random.default_rng(0)).total.backward()
    return torch.cat([p.grad.flatten() for p in ours.model.parameters() if p.grad is not None])


def test_bfloat16_gives_the_gradient_of_float32_but_for_its_rounding():
    exact, rounded = gradient("fp32"), gradient("bf16")
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.999
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
    # The negative control: where the machine has bfloat16, something was rounded.
    assert self_check("cpu").sound is not torch.equal(exact, rounded)


def test_a_solver_that_chooses_its_steps_is_float32_whatever_the_plan_says():
    assert torch.equal(gradient("fp32", solver="dopri5"), gradient("bf16", solver="dopri5"))


@pytest.mark.parametrize("initial_state", ["deterministic", "variational"])
def test_states_are_summed_over_time_in_float32_under_autocast(initial_state):
    model = small_ode(velocity_input=True, lung_context=True, initial_state=initial_state)
    z, t, observed = given_patients(1, [0.0, 1.2])
    with torch.autocast("cpu", torch.bfloat16):
        start = model.initial_state(z, t, observed)
        states = model.solve(start.drawn(), t[:, 0], t)
    assert start.h.dtype is states.dtype is torch.float32


def test_the_order_of_the_patients_is_irrelevant():
    a, b = trainer(), trainer()
    a.train(cohort(), steps=5)
    b.train(cohort()[::-1], steps=5)
    assert all(torch.equal(x, b.model.state_dict()[n]) for n, x in a.model.state_dict().items())


def test_an_epoch_draws_every_patient_once_and_patients_are_counted_once():
    ours = trainer()
    assert ours.train(cohort(4), steps=3).patients_used == 3
    ours = trainer()
    assert ours.train(cohort(4), steps=4).patients_used == 4
    assert ours.train(cohort(4), steps=9).patients_used == 4


def test_patients_with_one_scan_are_left_out():
    single = dataclasses.replace(cohort(1, scans=1)[0], pseudonym="single")
    assert trainer().train([*cohort(2), single], steps=6).patients_used == 2
    with pytest.raises(DataError, match="E_FEW"):
        trainer().train([single], steps=1)


def test_two_scans_in_one_half_year_are_one_scan_on_the_half_year_grid():
    close = dataclasses.replace(cohort(1, scans=2)[0], years=torch.tensor([0.0, 0.2], dtype=torch.float64))
    assert trainer(grid="exact").train([close], steps=1).patients_used == 1
    with pytest.raises(DataError, match="E_FEW"):
        trainer(grid="halfyear").train([close], steps=1)


def test_codes_of_another_tokenizer_are_refused():
    with pytest.raises(ModelError, match="E_TOKENIZER"):
        trainer().train([*cohort(1), *cohort(1, tokenizer="other")], steps=1)
    with pytest.raises(ModelError, match="E_TOKENIZER"):
        OdeTrainer(plan(), codebook(), seed=0, tokenizer_sha256="frozen").train(cohort(), steps=1)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    ours = OdeTrainer(plan(), codebook() * float("nan"), seed=0)
    before = {n: t.clone() for n, t in ours.model.state_dict().items()}
    with pytest.raises(ModelError, match="E_NONFINITE"):
        ours.train(cohort(), steps=1)
    assert all(torch.equal(t, ours.model.state_dict()[n]) for n, t in before.items())


def test_weights_of_another_architecture_are_refused():
    with pytest.raises(ModelError, match="E_WEIGHTS"):
        trainer().load_global(trainer(hidden=5).model.state_dict())


@pytest.mark.parametrize(("n_scans", "allowed"), [(2, {1}), (3, {2}), (5, {2, 3, 4})])
def test_a_forecasting_model_is_given_the_first_scans_and_asked_for_a_later_one(n_scans, allowed):
    rng = np.random.default_rng(0)
    draws = [choose_given(n_scans, TemporalSpec(), rng) for _ in range(60)]
    assert {int(d.observed.sum()) for d in draws} == allowed
    for draw in draws:
        assert draw.observed[: draw.last + 1].all()
        assert not draw.exact[draw.last + 1 :].any()
        assert draw.exact[0]
        assert draw.exact[draw.last]


def test_the_published_model_reads_all_scans_and_hides_some_but_never_the_baseline():
    rng = np.random.default_rng(0)
    assert choose_given(4, TemporalSpec(anchor="paper"), rng).observed.all()
    draws = [choose_given(4, TemporalSpec(anchor="paper", mask_prob=0.5), rng).observed for _ in range(200)]
    share = np.mean(draws, axis=0)
    assert share[0] == 1
    np.testing.assert_allclose(share[1:], 0.5, atol=0.12)


def test_time_weights_rise_to_twice_the_first_and_average_one():
    w = time_weights(4, (1.0, 2.0))
    np.testing.assert_allclose(w[-1] / w[0], 2.0)
    np.testing.assert_allclose(np.diff(w), w[1] - w[0])
    np.testing.assert_allclose(w.mean(), 1.0)


def test_the_loss_equals_its_formula_written_out():
    rng = np.random.default_rng(1)
    zhat, zq = rng.normal(size=(3, DIM, *GRID)), rng.normal(size=(3, DIM, *GRID))
    lung = rng.random(GRID) < 0.4
    w = np.array([0.8, 1.0, 1.2])
    exact = np.array([True, False, False])
    optim = OdeTraining(lambda_recon=0.2, lambda_diff=1.0)
    inside = [(zhat[i] - zq[i])[:, lung] for i in range(3)]
    recon = (w[1] * (inside[1] ** 2).mean() + w[2] * (inside[2] ** 2).mean()) / 2
    diff = (w[1] * ((inside[1] - inside[0]) ** 2).mean() + w[2] * ((inside[2] - inside[1]) ** 2).mean()) / 2
    ours = trajectory_loss(torch.tensor(zhat), torch.tensor(zq), torch.tensor(lung), exact, optim, w)
    np.testing.assert_allclose(float(ours.total), 0.2 * recon + diff, rtol=1e-12)


def test_codes_outside_the_lung_do_not_enter_the_loss():
    patient = cohort(1)[0]
    elsewhere = patient.indices.clone()
    elsewhere[:, ~patient.lung] = 5
    ours = trainer()
    losses = [
        float(ours.loss_of(p, np.random.default_rng(0)).total.detach())
        for p in (patient, dataclasses.replace(patient, indices=elsewhere))
    ]
    assert losses[0] == losses[1] > 0


def test_a_variational_model_pays_for_its_random_part_and_a_deterministic_one_has_none():
    ours = trainer(initial_state="variational")
    done = ours.train(cohort(), steps=3)
    assert done.losses["kl"] > 0
    assert done.losses["loss"] == pytest.approx(
        done.losses["recon"] + done.losses["diff"] + OdeTraining().kl_weight * done.losses["kl"], rel=1e-6
    )
    assert "kl" not in trainer().train(cohort(), steps=1).losses


def test_the_divergence_from_the_prior_is_torchs():
    mean, log_sd = torch.randn(3, 4), torch.randn(3, 4) / 3
    state = InitialState(torch.zeros(3, 4, 1, 1, 1), mean, log_sd)
    prior = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, log_sd.exp()), prior).sum(dim=1)
    torch.testing.assert_close(state.kl(), expected)


def test_a_stopped_variational_trainer_ends_with_the_same_weights(tmp_path):
    straight, first, second = (trainer(seed=s, initial_state="variational") for s in (0, 0, 5))
    straight.train(cohort(), steps=4)
    first.train(cohort(), steps=2)
    save_state(tmp_path / "ode", first.state())
    second.restore(load_state(tmp_path / "ode"))
    second.train(cohort(), steps=2)
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
