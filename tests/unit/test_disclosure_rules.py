"""Every disclosure rule: just inside it a site answers, just outside it refuses, names the rule and sends nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fourdvq.errors import Refused, WireError, wire_code
from fourdvq.survival import CoxSiteState, ModelRun, Policy, SelectionRun, Settings, select_biomarkers
from fourdvq.survival.disclosure import RunRegister, allowed_codes, check_cohort, small_count
from fourdvq.survival.local import drive, share_masks
from fourdvq.survival.masking import encode, unmask_total
from fourdvq.survival.messages import (
    CalibrationRequest,
    CorrelationRequest,
    CoxRequest,
    GridRequest,
    GroupRequest,
    HelloRequest,
    KmRequest,
    LogRankRequest,
    MomentsRequest,
    PairedRequest,
    PairRequest,
    PhRequest,
    ResultMessage,
    ScaleRequest,
)
from fourdvq.survival.scale import scale_from_moments, site_moments
from survival_data import KEY, cohort, cohorts, with_folds

ONE_FIT = HelloRequest(folds=0, run="r1")
ZERO = np.zeros(1, dtype=np.int64)


def state_of(site=None, policy=None, **options) -> Any:
    return CoxSiteState(site or cohort(60, codes=4), policy or Policy(), KEY, **options)


def opened(state: Any, hello: HelloRequest = ONE_FIT) -> ScaleRequest:
    """Hello, moments and scale, as the coordinator does it."""
    state.answer(hello)
    scale = scale_from_moments(state.answer(MomentsRequest()), rounded=True)
    state.answer(scale)
    return scale


def request(state: CoxSiteState, beta=0.0, folds: int = 1, columns: int = 5) -> CoxRequest:
    active = np.ones((folds, columns), dtype=bool)
    return CoxRequest(ZERO, active, np.full((folds * columns, 4), float(beta)))


def assert_refuses(state: CoxSiteState, message, rule: str):
    before = len(state.audit)
    with pytest.raises(Refused) as caught:
        state.send(message)
    assert caught.value.code == "E_COX_RULE"
    assert caught.value.where == rule
    assert wire_code(caught.value) == "COX_REFUSED"
    assert len(state.audit) == before + 1
    assert state.audit[-1].rule == rule
    assert not any(character.isdigit() for character in str(caught.value).replace("E_COX_RULE", ""))


def with_outcome(n: int, deaths: int):
    site = cohort(n, codes=4)
    return dataclasses.replace(site, e=np.arange(n) < deaths)


@pytest.mark.parametrize(("n", "deaths", "rule"), [(19, 10, "min_patients"), (40, 4, "min_events")])
def test_small_cohorts_are_refused_before_anything_is_sent(n, deaths, rule):
    assert_refuses(state_of(with_outcome(n, deaths)), ONE_FIT, rule)
    bigger = state_of(with_outcome(n + 1, deaths + 1))
    bigger.answer(ONE_FIT)


def test_the_minimum_holds_in_every_training_fold():
    site = with_outcome(40, 6)
    train = np.ones((3, 40), dtype=bool)
    train[2, [0, 1]] = False  # leaves 4 deaths
    with pytest.raises(Refused, match="min_events"):
        check_cohort(Policy(), site, train)
    check_cohort(Policy(), site, train[:2])


def test_a_binary_covariate_with_four_patients_in_a_class_is_refused():
    site = cohort(60, codes=4)
    C = site.C.copy()
    for few, fine in ((4, False), (5, True)):
        C[:, 1] = np.arange(60) < few
        state = state_of(dataclasses.replace(site, C=C))
        if fine:
            state.answer(ONE_FIT)
        else:
            assert_refuses(state, ONE_FIT, "min_class")


def test_codes_need_ten_carriers_ten_values_and_no_dominating_patient():
    n = 60
    spread = np.where(np.arange(n) < 30, np.arange(n) + 1.0, 0.0)
    codes = {
        "fine": spread,
        "nine carriers": np.where(np.arange(n) < 9, np.arange(n) + 1.0, 0.0),
        "ten carriers": np.where(np.arange(n) < 10, np.arange(n) + 1.0, 0.0),
        "nine values": np.arange(n) % 9.0,
        "ten values": np.arange(n) % 10.0,
        "one dominates": np.where(np.arange(n) == 0, 300.0, spread),
    }
    allowed = allowed_codes(Policy(), np.column_stack(list(codes.values())))
    assert dict(zip(codes, allowed.tolist(), strict=True)) == {
        "fine": True,
        "nine carriers": False,
        "ten carriers": True,
        "nine values": False,
        "ten values": True,
        "one dominates": False,
    }


def test_a_withheld_code_is_sent_as_zero_and_its_models_are_refused():
    site = cohort(60, codes=4)
    X = site.X.copy()
    X[9:, 2] = 0.0
    state = state_of(dataclasses.replace(site, X=X))
    state.answer(ONE_FIT)
    moments = state.answer(MomentsRequest())
    assert list(moments.allowed) == [1, 1, 0, 1]
    assert moments.sx[2] == moments.sxx[2] == 0.0
    scale = scale_from_moments(moments, rounded=True)
    assert_refuses(state, dataclasses.replace(scale, kept=np.ones(4, dtype=bool)), "withheld_code")
    state.answer(scale)
    assert_refuses(state, request(state), "withheld_code")
    assert_refuses(state, CorrelationRequest(codes=np.array([2])), "withheld_code")


def test_a_model_of_withheld_unknown_or_many_codes_is_refused():
    site = cohort(60, codes=12)
    X = site.X.copy()
    X[9:, 2] = 0.0
    site = dataclasses.replace(site, X=X)
    for codes in ((2,), (0, 12), (-1,), (3, 3), tuple(range(11))):
        register = RunRegister()
        assert_refuses(state_of(site, register=register), dataclasses.replace(ONE_FIT, codes=codes), "withheld_code")
        assert not register.claims
    state_of(site).answer(dataclasses.replace(ONE_FIT, codes=(4, 0)))


def test_moments_are_sent_once():
    state = state_of()
    opened(state)
    assert_refuses(state, MomentsRequest(), "max_evaluations")


@pytest.mark.parametrize("beta", [3.01, -3.01, np.nan])
def test_coefficients_above_the_cap_are_refused(beta):
    state = state_of()
    opened(state)
    assert_refuses(state, request(state, beta), "max_abs_beta")
    for frozen in (GroupRequest, PairedRequest, PhRequest):
        assert_refuses(state, frozen(beta=np.array([0.0, beta, 0.0, 0.0])), "max_abs_beta")
    state.answer(request(state, 0.5))


def test_a_tiny_scale_that_would_undo_the_cap_is_refused():
    state = state_of()
    state.answer(ONE_FIT)
    scale = scale_from_moments(state.answer(MomentsRequest()), rounded=True)
    assert_refuses(state, dataclasses.replace(scale, sd=scale.sd / 10), "scale")
    state.answer(scale)
    assert_refuses(state, scale, "scale")


def test_a_model_dominated_by_one_patient_is_withheld_alone():
    site = cohort(60, codes=4)
    X = site.X.copy()
    X[:, 1] = np.where(np.arange(60) < 30, 0.001 * np.arange(60), 0.0)
    X[0, 1] = 0.1
    state = state_of(dataclasses.replace(site, X=X), Policy(max_dominance=1.0))
    opened(state)
    beta = np.zeros((5, 4))
    beta[1, 0] = 3.0
    sums = state.answer(CoxRequest(ZERO, np.ones((1, 5), dtype=bool), beta))
    assert list(sums.refused) == [0, 1, 0, 0, 0]
    assert not sums.gradient[1].any()
    assert sums.gradient[0].any()


def test_the_thirteenth_evaluation_is_refused_and_counted_per_model():
    state = state_of()
    opened(state)
    for _ in range(12):
        state.answer(request(state))
    assert_refuses(state, request(state), "max_evaluations")
    pairs = PairRequest(ZERO, np.ones((1, 5), dtype=bool), np.zeros((5, 4)), "training")
    for _ in range(12):
        state.answer(pairs)
    assert_refuses(state, pairs, "max_evaluations")


def test_a_second_run_or_another_fold_key_needs_local_approval():
    register, site = RunRegister(), cohort(60, codes=4)
    state_of(site, register=register).answer(ONE_FIT)
    again = dataclasses.replace(ONE_FIT, run="r2")
    assert_refuses(state_of(site, register=register), again, "one_run")
    other_key = CoxSiteState(site, Policy(), b"another key", register=register)
    assert_refuses(other_key, ONE_FIT, "one_run")
    state_of(site, register=register).answer(dataclasses.replace(ONE_FIT, purpose="external"))
    register.approvals = 1
    state_of(site, register=register).answer(again)
    assert register.approvals == 0


def test_a_run_can_begin_again_twice_and_not_more_also_at_a_site_that_was_restarted():
    register = RunRegister()
    for _ in range(3):
        state_of(register=register).answer(ONE_FIT)
    assert_refuses(state_of(register=register), ONE_FIT, "one_run")
    assert len(register.claims) == 3


def test_a_made_up_purpose_is_refused_since_each_has_its_own_budget():
    assert_refuses(state_of(), dataclasses.replace(ONE_FIT, purpose="selection_again"), "purpose")


def test_a_shared_baseline_withholds_models_with_large_weights_and_answers_the_others():
    state = state_of()
    opened(state, dataclasses.replace(ONE_FIT, baseline="shared"))
    state.answer(GridRequest(edges=np.array([90000.0])))
    beta = np.zeros((5, 4))
    beta[2] = 2.9
    sums = state.answer(CoxRequest(ZERO, np.ones((1, 5), dtype=bool), beta))
    assert list(sums.refused) == [0, 0, 1, 0, 0]
    assert not sums.risk[:, :, 2].any()
    assert sums.risk[0, 0, 0] == 60


def test_covariates_must_be_the_sites_own_and_on_its_list():
    assert_refuses(state_of(), dataclasses.replace(ONE_FIT, covariates=("age", "sex", "postcode")), "covariates")
    strict = Policy(covariates=("age", "sex"))
    assert_refuses(state_of(policy=strict), ONE_FIT, "covariates")
    state_of(policy=Policy(covariates=("age", "sex", "smoking"))).answer(
        dataclasses.replace(ONE_FIT, covariates=("age", "sex", "smoking"))
    )


def test_another_codebook_is_refused():
    state = state_of(codebook_sha256="a" * 64)
    assert_refuses(state, dataclasses.replace(ONE_FIT, codebook_sha256="b" * 64), "codebook")
    state.answer(dataclasses.replace(ONE_FIT, codebook_sha256="a" * 64))


def test_three_sites_need_masks():
    state = state_of()
    assert_refuses(state, dataclasses.replace(ONE_FIT, sites=3), "masking")
    states = [state_of(s) for s in cohorts([60, 60, 60], codes=4)]
    share_masks(states, run="r1")
    states[0].answer(dataclasses.replace(ONE_FIT, sites=3))


def test_a_value_outside_the_fixed_point_range_is_refused_and_never_wrapped():
    site = cohort(60, codes=4)
    states = [state_of(dataclasses.replace(s, C=s.C * 1000)) for s in (site, dataclasses.replace(site, name="other"))]
    share_masks(states, run="r1")
    states[0].answer(ONE_FIT)
    with pytest.raises(Refused) as caught:
        states[0].send(MomentsRequest())
    assert caught.value.where == "fixed_point_range"
    assert states[0].audit[-1].rule == "fixed_point_range"
    moments = site_moments(site)
    assert encode(moments, sites=2)["sx"].dtype == np.uint64
    with pytest.raises(Refused, match="fixed_point_range"):
        encode(dataclasses.replace(moments, sx=moments.sx * np.nan), sites=2)


def test_exact_times_and_narrow_bins_are_refused():
    state = state_of()
    state.answer(ONE_FIT)
    assert_refuses(state, GridRequest(edges=np.array([100.0, 200.0]), exact=True), "times")
    for edges in ([90.0, 105.0], [91.0, 121.0], [0.0, 30.0], [60.0, 30.0], []):
        assert_refuses(state, GridRequest(edges=np.array(edges)), "times")
    # A start that slides by a day would give exact times away, bit by bit.
    assert_refuses(state, GridRequest(edges=np.array([61.0, 91.0]), from_start=True), "times")
    sums = state.answer(GridRequest(edges=np.arange(1.0, 100.0) * 30))
    assert not sums.accepting.all()
    assert_refuses(state, KmRequest(), "times")


def test_patients_are_divided_once_and_counted_on_one_grid():
    state = state_of(cohort(120, codes=4))
    opened(state)
    assert_refuses(state, LogRankRequest(), "order")
    lone = np.array([0.0, 3.0, 0.0, 0.0])
    state.answer(GroupRequest(beta=np.array([0.0, 0.5, 0.1, 0.1])))
    assert_refuses(state, GroupRequest(beta=lone), "one_split")
    whole = GridRequest(edges=np.array([7290.0]), group="low")
    assert_refuses(state, dataclasses.replace(whole, group="all"), "order")
    state.answer(whole)
    assert_refuses(state, KmRequest(group="high"), "times")
    state.answer(KmRequest(group="low"))
    state.answer(CalibrationRequest(group="low"))
    assert_refuses(state, whole, "times")
    state.answer(dataclasses.replace(whole, group="high"))
    for message in (PhRequest(beta=lone), PairedRequest(beta=lone)):
        state.answer(message)
        assert_refuses(state, message, "max_evaluations")


def test_a_risk_group_of_a_few_patients_is_refused():
    site = cohort(60, codes=4)
    columns = site.C.copy()
    columns[:, 0] = np.where(np.arange(60) < 4, 9.0, np.linspace(-0.1, 0.1, 60))
    state = state_of(dataclasses.replace(site, C=columns))
    opened(state)
    assert_refuses(state, GroupRequest(beta=np.array([0.0, 1.0, 0.0, 0.0])), "min_class")


def test_a_result_for_other_codes_than_those_of_the_analysis_is_refused():
    state = state_of()
    opened(state)
    result = ResultMessage(np.array([1]), *(np.ones(4) for _ in range(5)))
    assert_refuses(state, result, "shape")


def test_requests_out_of_order_or_of_another_shape_are_refused():
    state = state_of()
    for message in (MomentsRequest(), request(state), KmRequest()):
        assert_refuses(state, message, "order")
    state.answer(ONE_FIT)
    assert_refuses(state, request(state), "order")
    scale = scale_from_moments(state.answer(MomentsRequest()), rounded=True)
    state.answer(scale)
    assert_refuses(state, request(state, columns=4), "shape")
    twice = CoxRequest(np.zeros(2, dtype=np.int64), np.ones((2, 5), dtype=bool), np.zeros((10, 4)))
    assert_refuses(state, twice, "shape")
    far = CoxRequest(np.array([201]), np.ones((1, 5), dtype=bool), np.zeros((5, 4)))
    assert_refuses(state, far, "max_permutations")


def test_correlations_are_asked_once_and_for_few_codes():
    state = state_of(cohort(60, codes=12))
    opened(state)
    assert_refuses(state, CorrelationRequest(codes=np.arange(11)), "max_evaluations")
    state.answer(CorrelationRequest(codes=np.arange(3)))
    assert_refuses(state, CorrelationRequest(codes=np.arange(3)), "max_evaluations")


def test_folds_with_few_pairs_contribute_zeros_to_concordance():
    site = with_folds(cohort(40, codes=4), 10)  # validation folds of 4 patients
    hello = HelloRequest(folds=-1, run="r1")
    beta = np.full((50, 4), 0.2)
    counts = []
    for policy in (Policy(), Policy(min_pairs=1, min_pair_deaths=1)):
        state = state_of(site, policy)
        opened(state, hello)
        counts.append(state.answer(PairRequest(ZERO, np.ones((10, 5), dtype=bool), beta)))
    strict, loose = counts
    assert not strict.pairs.any()
    assert not strict.concordant.any()
    assert loose.pairs.any()


def test_too_few_events_over_all_sites_are_a_status_and_no_estimate():
    site = with_outcome(60, 11)  # 12 needed for four parameters
    run = ModelRun(ONE_FIT, Settings.under(Policy()))
    fitted = drive(run, [state_of(site)])
    assert (fitted.fits.status == "too_few_events").all()
    assert np.isnan(fitted.fits.beta).all()


def test_refusal_of_one_site_stops_the_selection_and_names_the_rule():
    sites = [cohort(60, codes=4, name="a"), dataclasses.replace(with_outcome(30, 4), name="b")]
    with pytest.raises(Refused) as caught:
        select_biomarkers(sites, key=KEY, permutations=0)
    assert caught.value.where == "min_events"


def test_a_site_lost_in_round_three_stops_the_run_and_a_new_one_starts_without_it():
    states = [state_of(s) for s in cohorts([60, 60, 60], codes=6)]
    share_masks(states, run="r1")
    run: Any = SelectionRun(HelloRequest(run="r1", sites=3), Settings.under(Policy()), permutations=0)
    while (message := run.request()) is not None and run.messages < 5:
        run.update(unmask_total([s.send(message) for s in states]))
    answers = [s.send(run.request()) for s in states]
    with pytest.raises(WireError, match="missing"):
        unmask_total(answers[:2])
    rest = [CoxSiteState(s.site, Policy(), KEY) for s in states[:2]]
    again = SelectionRun(HelloRequest(run="r2", sites=2), Settings.under(Policy()), permutations=0)
    drive(again, rest)
    assert again.finished([s.card() for s in rest]).folds_digest
    assert {line.run for state in rest for line in state.audit if line.kind != "HelloRequest"} == {"r2"}


def test_audit_lines_hold_shapes_and_digests_and_no_values():
    state = state_of()
    opened(state)
    state.answer(request(state, 0.25))
    state.answer(ResultMessage(np.zeros(0, dtype=np.int64), *(np.ones(3) for _ in range(5))))
    assert [line.rule for line in state.audit] == [""] * 5
    assert len({line.digest for line in state.audit}) == 5
    assert "0.25" not in str(state.audit)
    assert "beta[5, 4]" in state.audit[3].shapes


def test_the_card_has_digests_that_change_with_cohort_folds_and_policy_and_no_counts():
    one, two = state_of(), state_of(policy=Policy(min_patients=25))
    one.answer(HelloRequest(run="r"))
    assert one.card().cohort == two.card().cohort
    assert one.card().policy != two.card().policy
    assert one.card().folds != two.card().folds
    assert state_of(cohort(61, codes=4)).card().cohort != one.card().cohort


@pytest.mark.parametrize("broken", [{"min_patients": 0}, {"max_dominance": 0.0}, {"max_abs_beta": 0.0}])
def test_a_policy_without_meaning_is_refused(broken):
    with pytest.raises(ValueError, match="must be"):
        Policy(**broken)


def test_small_counts_are_shown_as_less_than_five():
    assert [small_count(n) for n in (0, 1, 4, 5, 17)] == ["0", "<5", "<5", "5", "17"]
