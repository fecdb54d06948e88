"""Attacks on what leaves a site, each with its negative control: it works with the rules off and fails with them on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fourdvq.errors import Refused
from fourdvq.survival import CoxSiteState, Policy, SelectionRun, Settings
from fourdvq.survival.messages import (
    CoxRequest,
    GridRequest,
    GroupRequest,
    HelloRequest,
    KmRequest,
    LogRankRequest,
    MomentsRequest,
    array_fields,
)
from fourdvq.survival.run import ModelRun, agree_grid
from fourdvq.survival.scale import scale_from_moments
from fourdvq.survival.shared import first_grid
from survival_data import KEY, cohort, cohorts

SHARED = HelloRequest(folds=0, baseline="shared", run="r1", purpose="model")


def site_state(site, policy, key) -> Any:
    """A site whose answers are of any type, as an attacker sees them."""
    return CoxSiteState(site, policy, key)


def opened(site, policy, grid: GridRequest | None):
    """A site asked as by the coordinator of a shared baseline; the agreed grid."""
    state = site_state(site, policy, KEY)
    state.answer(SHARED)
    scale = scale_from_moments(state.answer(MomentsRequest()), rounded=policy != "off")
    state.answer(scale)
    steps = agree_grid(grid or first_grid(30.0))
    request = next(steps)
    while True:
        try:
            request = steps.send(state.answer(request))
        except StopIteration as end:
            return state, scale, end.value


def recovered_rows(site, policy, grid) -> int:
    """Patients whose exact covariates appear when the sums of neighbouring risk sets are subtracted, at beta = 0."""
    state, scale, _ = opened(site, policy, grid)
    q, b = site.C.shape[1], site.X.shape[1]
    active = np.zeros((1, b + 1), dtype=bool)
    active[0, b] = True
    sums = state.answer(CoxRequest(np.zeros(1, dtype=np.int64), active, np.zeros((1, 1 + q))))
    risk = sums.risk[:, :, 0]
    cells = -np.diff(np.column_stack([risk, np.zeros(len(risk))]), axis=1)
    alone = np.abs(cells[0] - 1.0) < 1e-9
    rows = cells[2 : 2 + q, alone].T * scale.sd[b:] + scale.mean[b:]
    return sum(bool((np.abs(site.C - row).max(axis=1) < 1e-8).any()) for row in rows)


def test_differencing_risk_sets_recovers_rows_with_rules_off_and_none_with_rules_on():
    site = cohort(98, codes=3)
    exact = GridRequest(edges=np.unique(site.t[site.e]), exact=True)
    assert recovered_rows(site, "off", exact) >= 30
    assert recovered_rows(site, "off", first_grid(30.0)) >= 1
    assert recovered_rows(site, Policy(), None) == 0


def test_exact_times_are_refused_under_a_policy():
    site = cohort(98, codes=3)
    with pytest.raises(Refused, match="times"):
        opened(site, Policy(), GridRequest(edges=np.unique(site.t[site.e]), exact=True))


def test_a_large_beta_isolates_a_patient_with_rules_off_and_is_refused_with_rules_on():
    site = cohort(60, codes=3)
    found: dict[Any, Any] = {}
    for policy in ("off", Policy()):
        state = site_state(site, policy, KEY)
        state.answer(HelloRequest(folds=0, run="r1"))
        scale = scale_from_moments(state.answer(MomentsRequest()), rounded=False)
        state.answer(scale)
        active = np.zeros((1, 4), dtype=bool)
        active[0, 3] = True
        beta = np.array([[0.0, 50.0, 0.0, 0.0]])
        try:
            found[policy] = state.answer(CoxRequest(np.zeros(1, dtype=np.int64), active, beta))
        except Refused as refusal:
            found[policy] = refusal
    # At beta = 50 per SD the mean over each risk set is the covariate of its oldest member: its sum is exact.
    z = (site.C[:, 0] - scale.mean[3]) / scale.sd[3]
    oldest = [z[site.t >= u].max() for u in site.t[site.e]]
    assert z[site.e].sum() - found["off"].gradient[0, 1] == pytest.approx(sum(oldest), abs=1e-3)
    assert isinstance(found[Policy()], Refused)


def test_the_only_carrier_of_a_code_is_read_from_the_moments_with_rules_off_and_not_with_rules_on():
    site = cohort(60, codes=3)
    X = site.X.copy()
    X[:, 1] = np.where(np.arange(60) == 17, 0.0123, 0.0)
    site = dataclasses.replace(site, X=X)
    sums = {}
    for policy in ("off", Policy()):
        state = site_state(site, policy, KEY)
        state.answer(HelloRequest(folds=0, run="r1"))
        sums[policy] = state.answer(MomentsRequest()).sx[1]
    assert sums["off"] == 0.0123
    assert sums[Policy()] == 0.0


def everything_sent(sites, policy, settings, **options):
    """All arrays that leave the first site in a whole selection, by message and field."""
    states = [site_state(s, policy, KEY) for s in sites]
    run, sent = SelectionRun(HelloRequest(run="r1", **options), settings, permutations=2), []
    while (request := run.request()) is not None:
        answers = [s.answer(request) for s in states]
        sent += [(type(answers[0]), name, array) for name, array in answers[0].arrays().items()]
        run.update(answers[0] + answers[1])
    return sent


@pytest.mark.parametrize("baseline", ["site", "shared"])
def test_no_message_holds_a_time_an_age_or_a_share_of_a_patient(baseline):
    sites = cohorts([73, 58], codes=20)
    secret = np.unique(np.concatenate([sites[0].t, sites[0].C[:, 0], sites[0].X[sites[0].X > 0]]))
    # Small whole numbers are times by chance; an exact match of any other value would be a leak.
    secret = secret[(secret != np.rint(secret)) | (secret > 200)]
    for kind, name, array in everything_sent(sites, Policy(), Settings.under(Policy()), baseline=baseline):
        values = array.ravel().astype(float)
        assert not np.isin(values[values != 0], secret).any(), (kind.__name__, name)


@pytest.mark.parametrize("baseline", ["site", "shared"])
def test_shapes_depend_on_the_plan_and_never_on_the_number_of_patients_or_deaths(baseline):
    shapes = []
    for sizes in ([73, 58], [97, 58]):
        sites = cohorts(sizes, codes=6)
        sent = everything_sent(sites, Policy(), Settings.under(Policy()), baseline=baseline)
        forbidden = {sizes[0], int(sites[0].e.sum()), len(np.unique(sites[0].t[sites[0].e]))}
        found = set()
        for kind, name, array in sent:
            axes = dict(zip(array_fields(kind)[name][1].names, array.shape, strict=True))
            found |= {(kind.__name__, name, axis) for axis in axes}
            # m counts models and Q sums; the plan fixes what they can be.
            assert not {n for axis, n in axes.items() if axis in ("B+q", "F", "B", "p", "P", "one", "A")} & forbidden
        shapes.append(found)
    assert shapes[0] == shapes[1]


def test_masked_parts_are_noise_and_their_sum_is_exact():
    from fourdvq.survival.local import share_masks
    from fourdvq.survival.masking import encode, unmask_total

    states = [site_state(s, "off", KEY) for s in cohorts([60, 60, 60], codes=40)]
    share_masks(states, run="r1")
    hello = HelloRequest(folds=0, run="r1")
    for state in states:
        state.send(hello)
    # The hello used counter 0 at every site; what follows is under fresh streams.
    plain = [s.answer(MomentsRequest()) for s in states]
    hidden = [s.send(MomentsRequest()) for s in states]
    total: Any = unmask_total(hidden)
    np.testing.assert_allclose(total.sx, sum(p.sx for p in plain), atol=1e-13)
    assert (total.n == sum(p.n for p in plain)).all()
    bits = np.unpackbits(hidden[0].arrays["sx"].view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.05
    same = hidden[0].arrays["sx"] == encode(plain[0], sites=3)["sx"]
    assert not same.any()


def test_masks_are_never_used_twice():
    from fourdvq.survival.local import share_masks

    states = [site_state(s, "off", KEY) for s in cohorts([60, 60], codes=10)]
    share_masks(states, run="r1")
    states[0].send(HelloRequest(folds=0, run="r1"))
    first, second = (states[0].send(MomentsRequest()) for _ in range(2))
    assert (first.arrays["sx"] != second.arrays["sx"]).all()
    assert first.counter != second.counter


def test_two_folds_of_moments_are_never_sent():
    # The moments are over all training patients: their difference between folds would be a validation fold.
    state = site_state(cohort(80, codes=5), Policy(), KEY)
    state.answer(HelloRequest(run="r1"))
    moments = state.answer(MomentsRequest())
    assert moments.sx.ndim == 1
    assert int(moments.n[0]) == 80


def test_the_broadcast_scale_hides_the_exact_totals_and_moves_no_estimate():
    sites = [dataclasses.replace(s, train=None) for s in cohorts([60, 50], codes=6)]
    fitted = []
    for settings in (Settings(), Settings(rounded=True)):
        run = ModelRun(HelloRequest(folds=0), settings)
        states = [site_state(s, "off", KEY) for s in sites]
        while (request := run.request()) is not None:
            run.update(states[0].answer(request) + states[1].answer(request))
        fitted.append(run.result())
    rounded = fitted[1]
    digits = [float(f"{v:.3g}") for v in rounded.study.scale.sd]
    np.testing.assert_allclose(rounded.study.scale.sd, digits, rtol=1e-12)
    z = [(f.fits.beta / f.fits.se)[0, :-1] for f in fitted]
    np.testing.assert_allclose(z[0], z[1], atol=1e-7)


def deaths_between(state, first, second) -> Any:
    """Deaths between the edges of two grids, each of which the site accepts alone."""
    state.answer(HelloRequest(folds=0, run="r1", purpose="km"))
    found = []
    for edge in (first, second):
        state.answer(GridRequest(edges=np.array([edge, 7290.0])))
        found.append(int(state.answer(KmRequest()).deaths[0]))
    return found[1] - found[0]


def test_two_grids_date_a_single_death_with_rules_off_and_the_second_is_refused_with_rules_on():
    site = cohort(98, codes=3)
    counts = [int((site.e & (site.t > 30.0 * k) & (site.t <= 30.0 * (k + 1))).sum()) for k in range(8, 20)]
    start = 30.0 * (8 + counts.index(1))  # a month in which exactly one patient died
    assert deaths_between(site_state(site, "off", KEY), start, start + 30.0) == 1
    with pytest.raises(Refused, match="times"):
        deaths_between(site_state(site, Policy(), KEY), start, start + 30.0)


def logrank_of_two_splits(state, betas) -> list[float]:
    state.answer(HelloRequest(folds=0, run="r1"))
    state.answer(scale_from_moments(state.answer(MomentsRequest()), rounded=False))
    found = []
    for beta in betas:
        state.answer(GroupRequest(beta=beta))
        found.append(float(state.answer(LogRankRequest()).observed_minus_expected[0]))
    return found


def test_moving_one_patient_over_the_cut_tells_event_and_hazard_with_rules_off_and_is_refused_with_rules_on():
    site = cohort(60, codes=3)
    z = (site.C - site.C.mean(axis=0)) / site.C.std(axis=0, ddof=1)
    # A second division that differs in one patient: the one nearest to the cut changes sides first.
    first = np.array([0.0, 1.0, 0.2, 0.0])
    risk = z @ first[1:]
    for step in np.linspace(0.0, 0.4, 4001):
        second = np.array([0.0, 1.0, 0.2, step])
        moved = np.flatnonzero((risk > 0) != (z @ second[1:] > 0))
        if len(moved):
            break
    assert len(moved) == 1
    (patient,) = moved
    before, after = logrank_of_two_splits(site_state(site, "off", KEY), (first, second))
    at_risk = np.array([(site.t >= u).sum() for u in site.t[site.e]])
    hazard = (1.0 / at_risk)[site.t[site.e] <= site.t[patient]].sum()
    sign = 1.0 if z[patient] @ second[1:] > 0 else -1.0
    assert sign * (after - before) == pytest.approx(float(site.e[patient]) - hazard, abs=1e-9)
    with pytest.raises(Refused, match="one_split"):
        logrank_of_two_splits(site_state(site, Policy(), KEY), (first, second))
