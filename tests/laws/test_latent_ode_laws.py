"""Laws of a prediction: it depends on the patient and on its own time, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdvq.models.latent_ode import LatentODE
from fourdvq.plan import TemporalSpec
from temporal_cases import patients, small_ode

ANCHORS = ["last_given", "identity", "paper"]
TOLERANCE = 1e-5  # float32 sums in another order


def predict(model: LatentODE, years: list[float], asked: list[float], *, seed: int = 1) -> torch.Tensor:
    z, t, observed = patients(1, years, seed=seed)
    with torch.no_grad():
        return model(z, t, observed, torch.tensor([asked]))[0]


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_half_year_and_one_year_intervals_agree_at_common_times(anchor, solver):
    model = small_ode(anchor=anchor, solver=solver)
    fine = predict(model, [0.0, 1.0], [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    coarse = predict(model, [0.0, 1.0], [0.0, 1.0, 2.0, 3.0])
    assert (coarse[-1] - coarse[0]).abs().max() > 0.05
    torch.testing.assert_close(fine[::2], coarse, atol=1e-4, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.0, 6.0, width=32), min_size=1, max_size=5), st.floats(0.0, 6.0, width=32))
def test_a_prediction_does_not_depend_on_the_other_times_asked_for(others, time):
    model = small_ode()
    alone = predict(model, [0.0, 0.8], [time])[0]
    among = predict(model, [0.0, 0.8], [*others, time])[-1]
    torch.testing.assert_close(among, alone, atol=TOLERANCE, rtol=0)


def test_the_published_projector_breaks_that_law():
    model = small_ode(projector="paper", anchor="identity")
    fine = predict(model, [0.0, 1.0], [0.0, 0.5, 1.0, 1.5, 2.0])
    coarse = predict(model, [0.0, 1.0], [0.0, 1.0, 2.0])
    assert (fine[-1] - coarse[-1]).abs().max() > 0.05


@pytest.mark.parametrize("projector", ["rate", "paper"])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_the_order_of_the_asked_times_is_irrelevant(projector, anchor):
    model = small_ode(projector=projector, anchor=anchor)
    asked = [2.0, 0.0, 3.7, 0.5, 1.0]
    order = sorted(range(len(asked)), key=asked.__getitem__)
    shuffled = predict(model, [0.0, 1.0], asked)
    ordered = predict(model, [0.0, 1.0], sorted(asked))
    torch.testing.assert_close(shuffled[order], ordered, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("projector", ["rate", "paper"])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("encoder", ["conv_gru", "ode_conv_gru"])
def test_a_patient_does_not_depend_on_batch_mates(projector, solver, encoder):
    model = small_ode(projector=projector, solver=solver, encoder=encoder, time_gap_channel=True).double()
    z, t, observed = patients(3, [0.0, 0.9, 2.0])
    z, t = z.double(), t.double()
    t[1] = torch.tensor([0.0, 0.2, 4.4])
    t[2] = torch.tensor([0.5, 0.7, 9.0])
    observed[2, 2] = False
    s = torch.tensor([[0.9, 2.5], [4.5, 5.9], [0.5, 0.8]]).double()
    with torch.no_grad():
        together = model(z, t, observed, s)
        for b in range(3):
            alone = model(z[b : b + 1], t[b : b + 1], observed[b : b + 1], s[b : b + 1])[0]
            torch.testing.assert_close(together[b], alone, atol=1e-10, rtol=0)


def test_padding_scans_and_repeated_times_change_nothing():
    model = small_ode(projector="paper")
    z, t, observed = patients(1, [0.0, 0.9])
    padded_z = torch.cat([z, torch.full_like(z[:, :1], 7.0)], dim=1)
    padded_t = torch.tensor([[0.0, 0.9, 0.0]])
    padded_seen = torch.tensor([[True, True, False]])
    with torch.no_grad():
        plain = model(z, t, observed, torch.tensor([[1.4, 2.0]]))
        padded = model(padded_z, padded_t, padded_seen, torch.tensor([[1.4, 2.0, 2.0]]))
    torch.testing.assert_close(padded[:, :2], plain, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(padded[:, 2], plain[:, 1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("projector", ["rate", "paper"])
@pytest.mark.parametrize(("anchor", "scan"), [("last_given", 2), ("last_given", 0), ("identity", 0)])
def test_the_prediction_at_the_anchor_is_the_anchor_exactly(projector, anchor, scan):
    model = small_ode(projector=projector, anchor=anchor)
    years = [0.0, 0.6, 1.7]
    z, _, _ = patients(1, years)
    assert torch.equal(predict(model, years, [3.0, years[scan], 1.0])[1], z[0, scan])


@pytest.mark.parametrize("projector", ["rate", "paper"])
def test_the_published_anchor_changes_even_the_baseline(projector):
    z, _, _ = patients(1, [0.0, 1.0])
    at_baseline = predict(small_ode(projector=projector, anchor="paper"), [0.0, 1.0], [0.0, 1.0])[0]
    assert (at_baseline - z[0, 0]).abs().max() > 0.01


@pytest.mark.parametrize("projector", ["rate", "paper"])
@pytest.mark.parametrize(("anchor", "scan"), [("last_given", -1), ("identity", 0)])
def test_a_fresh_model_predicts_no_change(projector, anchor, scan):
    torch.manual_seed(0)
    model = LatentODE(TemporalSpec(hidden=4, dynamics_width=6, projector=projector, anchor=anchor), 3)
    if projector == "paper":  # its difference map of two equal states is not zero by itself
        torch.nn.init.zeros_(model.projector.weight)
        torch.nn.init.zeros_(model.projector.bias)
    z, _, _ = patients(1, [0.0, 1.0])
    for future in predict(model, [0.0, 1.0], [1.0, 2.0, 5.5]):
        assert torch.equal(future, z[0, scan])


def test_codes_outside_the_lung_are_neither_read_nor_written():
    model = small_ode()
    z, t, observed = patients(1, [0.0, 1.0])
    lung = torch.zeros(1, *z.shape[3:], dtype=torch.bool)
    lung[:, 1:, 1:3] = True
    other = torch.where(lung[:, None, None], z, 99.0)
    s = torch.tensor([[2.0]])
    with torch.no_grad():
        ours, theirs = model(z, t, observed, s, lung), model(other, t, observed, s, lung)
    assert torch.equal(ours, theirs)
    assert not ours[0, 0, :, ~lung[0]].any()


def test_without_skip_the_prediction_does_not_start_from_a_scan():
    model = small_ode(skip=False)
    torch.nn.init.zeros_(model.projector.weight)
    torch.nn.init.zeros_(model.projector.bias)
    assert not predict(model, [0.0, 1.0], [1.0, 2.0]).any()


AWARE = {"velocity_input": True, "lung_context": True, "initial_state": "variational"}


def test_a_model_that_sees_rate_and_whole_lung_keeps_the_laws_of_a_prediction():
    model = small_ode(**AWARE).double()
    z, t, observed = patients(2, [0.0, 0.9, 2.0])
    z, t = z.double(), t.double()
    t[1] = torch.tensor([0.3, 0.7, 9.0])
    observed[1, 2] = False
    s = torch.tensor([[2.0, 3.5], [0.7, 1.9]]).double()
    lung = torch.zeros(2, *z.shape[3:], dtype=torch.bool)
    lung[0, 1:, 1:3], lung[1, :2, :3] = True, True
    with torch.no_grad():
        together = model(z, t, observed, s, lung)
        for b in range(2):
            part = slice(b, b + 1)
            alone = model(z[part], t[part], observed[part], s[part, 1:], lung[part])[0]
            torch.testing.assert_close(together[b, 1:], alone, atol=1e-10, rtol=0)
        changed = torch.where(lung[:, None, None], z, 7.0)
        changed[1, 2] = 5.0  # a scan that is not observed
        torch.testing.assert_close(model(changed, t, observed, s, lung), together, atol=1e-10, rtol=0)
    assert torch.equal(together[0, 0], z[0, 2] * lung[0])


def test_the_rate_that_the_encoder_sees_is_the_change_per_year():
    """Twice the time between the same two scans is half the rate: the dynamics' start differs, and by nothing else."""
    model = small_ode(velocity_input=True, lung_context=True)
    z, t, observed = patients(1, [0.0, 1.0])
    still = z[:, :1].expand(-1, 2, *z.shape[2:]).clone()
    with torch.no_grad():
        slow, fast = (model.initial_state(z, t * k, observed).h for k in (2.0, 1.0))
        a, b = (model.initial_state(still, t * k, observed).h for k in (2.0, 1.0))
    assert (slow - fast).abs().max() > 1e-3
    assert torch.equal(a, b)


def test_one_scan_has_no_rate():
    model = small_ode(**AWARE)
    z, t, observed = patients(1, [0.0, 1.0])
    observed[0, 1] = False
    other = z.clone()
    other[0, 1] = 3.0
    s = torch.tensor([[2.0]])
    with torch.no_grad():
        assert torch.equal(model(z, t, observed, s), model(other, t, observed, s))
