"""Bands around predicted numbers: counts add up over sites, small groups stay small, and what is odd is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from fourdvq.errors import Refused, WireError
from fourdvq.evaluation.conformal import SCALARS, public_bins
from fourdvq.evaluation.scalars import DENSE_ABOVE_HU, bands, scalar_counts, scalar_errors
from fourdvq.evaluation.trajectory import LongitudinalPatient
from fourdvq.generation import generate
from fourdvq.plan import EvaluationSpec, Plan
from fourdvq.wire.messages import ConformalCounts, ConformalTask
from fourdvq_client.egress import Context, Outcome, clear
from fourdvq_client.policy import parse_policy
from fourdvq_server.reply_checks import check_body
from site_cases import IDS, SMALL, policy_text
from temporal_cases import lung_box, scan_at, small_world

SPEC = EvaluationSpec(conformal=True, conformal_bins=50)
PLAN = Plan(name="test", profile_sha256="", evaluation=SPEC)
ON = dataclasses.replace(SMALL, evaluation=SPEC)
TASK = ConformalTask(split="validation", model_sha256="", tokenizer_sha256="", weights={})


def patient(seed: int, years: tuple[float, ...] = (0.0, 0.6, 1.4)) -> LongitudinalPatient:
    return LongitudinalPatient(f"p{seed}", years, lambda i: scan_at(years[i], seed=seed)[None], lung_box())


def test_the_errors_are_those_of_the_generated_scan_against_the_real_one():
    world, one = small_world(), patient(3)
    (found,) = scalar_errors(world, [one, patient(4, (0.0, 1.0))], PLAN)
    scans = torch.stack([one.scan(0), one.scan(1)])
    made = generate(world, scans, one.years[:2], one.years[2:], lung=one.lung, detail="residual")
    ours, true = (v[one.lung].double() for v in (made.volumes[0], one.scan(2)[0]))
    dense = (DENSE_ABOVE_HU + 1000) / 1400
    assert found.ahead == pytest.approx(0.8)
    assert found.errors[0] == pytest.approx(abs(float(ours.mean() - true.mean())), abs=1e-12)
    assert found.errors[1] == pytest.approx(abs(float((ours > dense).double().mean() - (true > dense).double().mean())))
    true_shares = generate(world, torch.stack([one.scan(2), one.scan(2)]), (0.0, 1.0), [0.0], lung=one.lung).histograms
    assert found.errors[2] == pytest.approx(float((made.histograms - true_shares).abs().max()))


def test_the_counts_of_two_sites_are_those_of_their_union():
    world, everyone = small_world(), [patient(s, (0.0, 0.5, 0.5 + 0.4 * (s + 1))) for s in range(5)]
    parts = [scalar_counts(scalar_errors(world, group, PLAN), SPEC) for group in (everyone[:2], everyone[2:])]
    messages = [ConformalCounts(counts, int(counts[0].sum())) for counts in parts]
    whole = scalar_counts(scalar_errors(world, everyone, PLAN), SPEC)
    together = messages[0] + messages[1]
    np.testing.assert_array_equal(together.counts, whole)
    assert together.patients == 5
    np.testing.assert_array_equal((messages[1] + messages[0]).counts, whole)


def test_a_site_without_such_a_patient_adds_nothing():
    counts = scalar_counts([], SPEC)
    assert counts.shape == (len(SCALARS), 4, 51)
    assert counts.sum() == 0


def test_the_band_is_the_order_statistic_of_all_sites_and_infinite_with_too_few_patients():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 0.4, 40)
    edges = public_bins(SPEC.conformal_largest, SPEC.conformal_bins)
    counts = np.zeros((len(SCALARS), 4, 51), dtype=np.int64)
    for score in scores:
        counts[:, 1, np.searchsorted(edges, score)] += 1
    counts[:, 3, 0] = 5
    found = {(b.scalar, b.horizon, b.coverage): b for b in bands(counts, SPEC)}
    exact = np.sort(scores)[math.ceil(41 * 0.9) - 1]
    band = found["density", "0.5-1", 0.9]
    assert exact <= band.half_width <= exact + edges[0]
    assert band.patients == 40
    assert found["density", "2+", 0.9].half_width == math.inf  # 5 patients
    assert found["density", "all", 0.9].patients == 45


def leaves(counts: np.ndarray, patients: int, **policy: str) -> ConformalCounts:
    context = Context(TASK, ON, parse_policy(policy_text(**policy)), lambda: IDS)
    reply = clear(Outcome(ConformalCounts(counts, patients), patients, patients), context).reply
    assert isinstance(reply, ConformalCounts)
    return reply


def counts_of(*by_horizon: int) -> np.ndarray:
    counts = np.zeros((len(SCALARS), 4, 51), dtype=np.int64)
    for i, n in enumerate(by_horizon):
        counts[:, i, 3] = n
    return counts


def test_a_horizon_of_fewer_than_min_cell_patients_leaves_as_zeros():
    sent = leaves(counts_of(2, 30, 0, 8), 40, min_cell="5")
    assert sent.counts[0].sum(axis=1).tolist() == [0, 30, 0, 8]


@pytest.mark.parametrize(
    ("counts", "patients"),
    [
        (counts_of(40)[:, :2], 40),
        (counts_of(40).astype(np.float64), 40),
        (-counts_of(40), 40),
        (counts_of(39), 40),
    ],
    ids=["shape", "type", "negative", "one patient less"],
)
def test_counts_that_are_not_one_a_patient_over_the_plans_bins_do_not_leave(counts, patients):
    with pytest.raises(Refused, match="E_EGRESS"):
        leaves(counts, patients)


def test_too_few_patients_leave_no_counts():
    with pytest.raises(Refused, match="TOO_FEW_PATIENTS"):
        leaves(counts_of(1), 1, min_patients_per_summary="5")


@pytest.mark.parametrize("counts", [counts_of(4)[:, :2], -counts_of(4), counts_of(4).astype(np.float64)])
def test_the_coordinator_puts_aside_counts_of_another_form(counts):
    with pytest.raises(WireError, match="E_MESSAGE"):
        check_body("leuven", ON, TASK, ConformalCounts(counts, 4))
