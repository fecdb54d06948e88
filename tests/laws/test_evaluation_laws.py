"""Known values that the evaluation must return, and that sites' sums add up to those of one site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fourdvq.data.datasets import Acquisition
from fourdvq.data.latents import LatentPatient
from fourdvq.evaluation.rows import population_rate
from fourdvq.evaluation.summary import RowSums, combine, verdict
from fourdvq.evaluation.trajectory import LongitudinalPatient, score_patient, score_trajectories
from fourdvq.generation import generate
from fourdvq.plan import EvaluationSpec, Plan
from temporal_cases import lung_box, scan_at, small_world

PLAN = Plan(name="test", profile_sha256="", evaluation=EvaluationSpec(times_per_patient=2))
MODE = "extrapolation"


def patient(
    seed: int = 0, *, speed: float = 0.03, years: Sequence[float] = (0.0, 0.6, 1.4, 2.2)
) -> LongitudinalPatient:
    return LongitudinalPatient(
        f"p{seed}", tuple(years), lambda i: scan_at(years[i], seed=seed, speed=speed)[None], lung_box()
    )


def blend(alpha: float, seed: int = 0) -> Callable[..., list[torch.Tensor]]:
    """A forecaster that knows the truth and moves alpha of the way to it: 0 copies, 1 is right, -1 is reversed."""

    def forecast(scans, years_given, years, lung):
        last = scans[-1, 0]
        return [last + alpha * (scan_at(y, seed=seed, speed=0.03) - last) for y in years]

    return forecast


def values(scores) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for score in scores:
        found.setdefault(score.row, {})[score.metric] = score.value
    return found


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, float]]:
    blends = {f"blend {a:g}": blend(a) for a in (0.0, 0.3, 0.5, 1.0, 2.0, -1.0)}
    return values(score_patient(small_world(fresh=True), patient(), PLAN, forecasters=blends))


def test_a_copy_has_skill_zero_and_knows_nothing_about_change(rows):
    for row in ("persistence", "blend 0"):
        assert rows[row][f"{MODE}/skill/lung"] == 0
        assert rows[row][f"{MODE}/psnr_gain/lung"] == 0
        assert rows[row][f"{MODE}/auroc_increase/lung"] == 0.5
        assert rows[row][f"{MODE}/auroc_decrease/lung"] == 0.5
        assert f"{MODE}/change_slope/lung" not in rows[row]
        assert f"{MODE}/change_correlation/lung" not in rows[row]


def test_the_truth_has_skill_one(rows):
    truth = rows["blend 1"]
    assert truth[f"{MODE}/skill/lung"] == pytest.approx(1, abs=1e-9)
    for name in ("change_correlation", "change_slope", "auroc_increase", "auroc_decrease"):
        assert truth[f"{MODE}/{name}/lung"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 2.0])
def test_a_blend_of_copy_and_truth_has_the_closed_form(rows, alpha):
    row = rows[f"blend {alpha:g}"]
    assert row[f"{MODE}/skill/lung"] == pytest.approx(1 - (1 - alpha) ** 2, abs=1e-5)
    assert row[f"{MODE}/change_slope/lung"] == pytest.approx(1 / alpha, abs=1e-4)


def test_a_reversed_change_has_negative_skill_and_finds_the_wrong_voxels(rows):
    row = rows["blend -1"]
    assert row[f"{MODE}/skill/lung"] == pytest.approx(-3, abs=1e-4)
    assert row[f"{MODE}/auroc_increase/lung"] < 0.01


def test_noise_of_the_right_size_has_skill_minus_one(rows):
    assert rows["noise_control"][f"{MODE}/skill/lung"] == pytest.approx(-1, abs=0.3)
    assert abs(rows["noise_control"][f"{MODE}/auroc_increase/lung"] - 0.5) < 0.15


def test_an_untrained_model_scores_as_the_copy_through_the_decoder_and_residual_detail_as_the_copy(rows):
    assert rows["model"] == rows["persistence_decoded"]
    assert rows["model_residual"] == rows["persistence"]


def test_an_untrained_model_anchored_at_the_first_scan_scores_as_that_scan_through_the_decoder():
    world = small_world(fresh=True, anchor="identity")

    def first_decoded(scans, years_given, years, lung):
        with torch.no_grad():
            drawn = (world.vqgan(scans[:1] - 0.5).recon[0, 0] + 0.5).clamp(0, 1)
        return [drawn] * len(years)

    whole_lung = LongitudinalPatient("p", (0.0, 0.6, 1.4), patient().scan, torch.ones_like(lung_box()))
    found = values(score_patient(world, whole_lung, PLAN, forecasters={"first": first_decoded}))
    for metric, value in found["first"].items():
        assert found["model"][metric] == pytest.approx(value, abs=1e-6)


def test_a_cohort_without_change_is_not_better_than_copying():
    still = [patient(seed, speed=0.0) for seed in range(3)]
    sums = {s.key: s for s in score_trajectories(small_world(), still, PLAN, modes=[MODE])}
    for row in ("model", "model_residual", "ceiling"):
        assert verdict(sums[f"{row}/{MODE}/skill/lung"]) == "not better than copying"


def test_predictions_are_scored_against_the_real_scan_not_its_autoencoded_version(rows):
    assert rows["ceiling"][f"{MODE}/mse/lung"] > 1e-3


def test_given_scans_enter_only_the_row_that_says_so(rows):
    row = rows["paper_pooled"]
    assert row[f"{MODE}/mse/lung"] != rows["model"][f"{MODE}/mse/lung"]
    assert f"{MODE}/skill/lung" not in row


def test_a_straight_line_in_the_codes_starts_at_the_last_given_scan():
    close = patient(years=(0.0, 1.0, 1.0 + 1e-9))
    found = values(score_patient(small_world(fresh=True), close, PLAN))
    assert found["linear_latent"][f"{MODE}/mse/lung"] == found["persistence_decoded"][f"{MODE}/mse/lung"]


def test_interpolation_gives_the_ends_and_asks_for_the_middle():
    found = values(score_patient(small_world(), patient(), PLAN, mode="interpolation"))
    assert found["cohort"]["interpolation/pairs"] == 2
    first = scan_at(0.0, speed=0.03)
    errors = [((scan_at(y, speed=0.03) - first)[lung_box()] ** 2).mean() for y in (0.6, 1.4)]
    assert found["persistence"]["interpolation/mse/lung"] == pytest.approx(float(np.mean(errors)), rel=1e-5)


def test_patients_with_two_scans_are_not_scored():
    assert score_patient(small_world(), patient(years=(0.0, 1.0)), PLAN) == []


def test_the_sums_of_two_sites_are_the_sums_of_their_union():
    world, everyone = small_world(), [patient(seed) for seed in range(3)]
    pooled = score_trajectories(world, everyone, PLAN, modes=[MODE])
    sites = [
        *score_trajectories(world, everyone[:1], PLAN, modes=[MODE]),
        *score_trajectories(world, everyone[1:], PLAN, modes=[MODE]),
    ]
    _equal(combine(sites), pooled)


def test_the_order_of_patients_is_irrelevant():
    world, everyone = small_world(), [patient(seed) for seed in range(3)]
    a = score_trajectories(world, everyone, PLAN, modes=[MODE])
    _equal(score_trajectories(world, everyone[::-1], PLAN, modes=[MODE]), a)


def _equal(ours: list[RowSums], theirs: list[RowSums]) -> None:
    assert [s.key for s in ours] == [s.key for s in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.n == b.n
        np.testing.assert_allclose([a.total, a.total_sq], [b.total, b.total_sq], rtol=1e-12)


def test_a_noisy_truth_has_the_skill_that_its_noise_leaves():
    """The perfect predictor of a scan with repeat noise of SD n against a true change of SD c gains c^2 / (c^2 + n^2)
    of the copy's error when the target's noise is all that is left."""
    noise, change = 0.02, 0.04
    rng = np.random.default_rng(0)
    lung = lung_box()
    still = torch.tensor(rng.uniform(0.3, 0.6, lung.shape), dtype=torch.float32)
    moved = still + torch.tensor(rng.normal(0, change, lung.shape), dtype=torch.float32)
    seen = moved + torch.tensor(rng.normal(0, noise, lung.shape), dtype=torch.float32)
    scans = [still, still, seen]
    one = LongitudinalPatient("p", (0.0, 0.5, 1.0), lambda i: scans[i][None], lung)
    found = values(score_patient(small_world(fresh=True), one, PLAN, forecasters={"truth": lambda *_: [moved]}))
    assert found["truth"][f"{MODE}/skill/lung"] == pytest.approx(change**2 / (change**2 + noise**2), abs=0.05)


def test_a_copy_has_no_code_change_and_the_error_of_the_true_change_of_shares():
    world, one = small_world(fresh=True), patient()
    found = values(score_patient(world, one, PLAN))
    given = torch.stack([one.scan(0), one.scan(1)])
    last = generate(world, given, one.years[:2], [one.years[1]], lung=one.lung).histograms[0]
    errors = []
    for i in (2, 3):
        seen = torch.stack([one.scan(i), one.scan(i)])
        true = generate(world, seen, (0.0, 1.0), [0.0], lung=one.lung).histograms[0]
        errors.append(0.5 * float((last - true).abs().sum()))
    assert found["persistence_decoded"][f"{MODE}/code_share_error/lung"] == pytest.approx(np.mean(errors))
    assert f"{MODE}/code_change_correlation/lung" not in found["persistence_decoded"]
    copied = found["persistence_decoded"]
    assert found["model"][f"{MODE}/code_share_error/lung"] == copied[f"{MODE}/code_share_error/lung"]


def test_the_density_error_of_a_blend_is_its_part_of_the_true_change(rows):
    copied = rows["blend 0"][f"{MODE}/density_error_hu/lung"]
    assert copied > 0
    assert rows["blend 0.5"][f"{MODE}/density_error_hu/lung"] == pytest.approx(copied / 2, rel=1e-3)
    assert rows["blend 1"][f"{MODE}/density_error_hu/lung"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("acquired", "strata"),
    [
        ([("ge", 1.0), ("ge", 1.5), ("ge", 1.25)], {"scanner-ge", "slices-thin"}),
        ([("ge", 1.0), ("united imaging", 1.0), ("united imaging", 2.0)], {"scanner-united-imaging", "slices-thick"}),
        ([("ge", 1.0), ("ge", 1.0), ("siemens", 1.0)], {"scanner-changed", "slices-thin"}),
        ([("ge", 1.0), ("ge", 1.0), ("", 1.0)], {"slices-thin"}),
        ([], set()),
    ],
)
def test_a_pair_counts_by_the_scanner_and_slices_of_the_target_and_of_the_scan_it_is_compared_with(acquired, strata):
    one = replace(patient(years=(0.0, 0.6, 1.4)), acquired=tuple(Acquisition(*a) for a in acquired))
    found = values(score_patient(small_world(fresh=True), one, PLAN))["model"]
    kinds = {metric.rpartition("/")[2] for metric in found}
    assert {kind for kind in kinds if kind.startswith(("scanner-", "slices-"))} == strata
    for stratum in strata:
        assert found[f"{MODE}/mse/lung/{stratum}"] == found[f"{MODE}/mse/lung"]


@pytest.mark.parametrize(("rise", "stratum"), [(0.05, "fast"), (0.001, "slow")])
def test_a_lung_whose_density_rises_fast_is_scored_among_the_fast_ones(rise, stratum):
    base = scan_at(0.0)
    one = LongitudinalPatient("p", (0.0, 1.0, 2.0), lambda i: (base + rise * i)[None], lung_box())
    found = values(score_patient(small_world(fresh=True), one, PLAN))["persistence"]
    assert f"{MODE}/mse/lung/{stratum}" in found
    assert found[f"{MODE}/mse/lung/{stratum}"] == pytest.approx(rise**2, rel=1e-3)
    assert f"{MODE}/mse/lung/{'slow' if stratum == 'fast' else 'fast'}" not in found


def test_the_populations_rate_is_the_mean_over_patients_of_the_change_of_the_mean_code_per_year():
    book = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    lung = torch.zeros(1, 2, 2, dtype=torch.bool)
    lung[0, 0] = True

    def codes(*cells):
        return torch.tensor([[[[a, b], [2, 2]]] for a, b in cells], dtype=torch.uint8)

    def patient(name, years, *cells):
        times = torch.tensor(years, dtype=torch.float64)
        return LatentPatient(name, codes(*cells), lung, times, torch.zeros(len(years), 2), "t")

    first = patient("a", [0.0, 2.0], (0, 0), (1, 0))
    second = patient("b", [0.0, 1.0], (0, 0), (2, 2))
    alone = patient("c", [0.0], (0, 0))
    torch.testing.assert_close(population_rate([first, second, alone], book), torch.tensor([0.125, 2.0]))
    assert population_rate([alone], book) is None
