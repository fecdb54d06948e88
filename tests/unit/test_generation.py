"""Generated scans: where they start, what stays, what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fourdvq.data.datasets import latent_mask
from fourdvq.errors import DataError, ModelError
from fourdvq.generation import code_histogram, generate, times_every
from temporal_cases import SIZE, lung_box, scan_at, small_world

GIVEN = (0.0, 1.0)


def scans(*years: float) -> torch.Tensor:
    return torch.stack([scan_at(y) for y in years or GIVEN])[:, None]


def through_decoder(world, scan: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return (world.vqgan(scan[None] - 0.5).recon[0, 0] + 0.5).clamp(0, 1)


def test_an_untrained_model_returns_the_last_given_scan_through_the_decoder():
    world = small_world(fresh=True)
    future = generate(world, scans(), GIVEN, [1.0, 2.0, 4.5])
    for volume in future.volumes:
        torch.testing.assert_close(volume, through_decoder(world, scans()[1]), atol=1e-6, rtol=0)


def test_an_untrained_model_with_residual_detail_returns_the_last_given_scan_itself():
    future = generate(small_world(fresh=True), scans(), GIVEN, [1.0, 2.0, 4.5], lung=lung_box(), detail="residual")
    assert all(torch.equal(volume, scans()[1, 0]) for volume in future.volumes)


def test_an_untrained_model_anchored_at_the_first_scan_returns_that_one_through_the_decoder():
    world = small_world(fresh=True, anchor="identity")
    future = generate(world, scans(), GIVEN, [0.0, 2.0])
    for volume in future.volumes:
        torch.testing.assert_close(volume, through_decoder(world, scans()[0]), atol=1e-6, rtol=0)


def test_volumes_at_common_times_agree_between_half_year_and_one_year_intervals():
    world = small_world()
    fine = generate(world, scans(), GIVEN, times_every(0.5, 3.0), lung=lung_box(), requantise=False)
    coarse = generate(world, scans(), GIVEN, times_every(1.0, 3.0), lung=lung_box(), requantise=False)
    assert (coarse.volumes[3] - coarse.volumes[1]).abs().max() > 1e-3
    for a, b in zip(fine.volumes[::2], coarse.volumes, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_outside_the_lung_the_codes_are_the_baselines():
    world, lung = small_world(), lung_box()
    future = generate(world, scans(), GIVEN, [3.0], lung=lung)
    outside = ~latent_mask(lung, 4)
    with torch.no_grad():
        baseline = world.vqgan(scans()[:1] - 0.5).indices[0]
    assert torch.equal(future.indices[0][outside], baseline[outside])
    assert not torch.equal(future.indices[0], baseline)


def test_residual_detail_leaves_everything_outside_the_lung_as_it_was():
    lung = lung_box()
    future = generate(small_world(), scans(), GIVEN, [3.0], lung=lung, detail="residual").volumes[0]
    assert torch.equal(future[~lung], scans()[1, 0][~lung])
    assert (future - scans()[1, 0])[lung].abs().max() > 1e-3


def test_residual_detail_between_given_scans_starts_from_the_one_before():
    world = small_world(fresh=True)
    future = generate(world, scans(0.0, 1.0, 2.0), (0.0, 1.0, 2.0), [0.5, 1.5], detail="residual")
    assert torch.equal(future.volumes[0], scan_at(0.0))
    assert torch.equal(future.volumes[1], scan_at(1.0))


def test_histograms_are_the_shares_of_the_codes_inside_the_lung():
    world, lung = small_world(), lung_box()
    future = generate(world, scans(), GIVEN, [0.0, 3.0], lung=lung)
    inside = future.indices[1][latent_mask(lung, 4)].numpy()
    expected = np.bincount(inside, minlength=32) / len(inside)
    np.testing.assert_allclose(future.histograms[1].numpy(), expected)
    assert future.histograms.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_an_empty_lung_has_no_histogram():
    with pytest.raises(DataError, match="E_MASK"):
        code_histogram(torch.zeros(2, 2, 2, dtype=torch.int64), torch.zeros(2, 2, 2, dtype=torch.bool), 4)


def test_times_come_back_in_the_order_asked_with_their_kind():
    future = generate(small_world(), scans(), GIVEN, [2.0, 0.5, 1.0])
    assert future.times == (2.0, 0.5, 1.0)
    assert future.kinds == ("extrapolated", "interpolated", "given")
    assert future.flags == ()


def test_a_time_beyond_the_training_window_is_flagged():
    assert generate(small_world(), scans(), GIVEN, [6.5]).flags == ("W_HORIZON",)


def test_a_time_that_no_patient_was_ever_seen_at_is_refused_unless_a_person_insists():
    with pytest.raises(DataError, match="E_HORIZON"):
        generate(small_world(), scans(), GIVEN, [1.0, 9.1])
    assert generate(small_world(), scans(), GIVEN, [9.0]).flags == ("W_HORIZON",)
    assert generate(small_world(), scans(), GIVEN, [9.1], beyond_horizon=True).flags == ("W_HORIZON",)
    with pytest.raises(DataError, match="E_HORIZON"):
        generate(small_world(t_scale_years=2.0), scans(), GIVEN, [3.1])


def test_a_patient_without_lung_is_refused():
    with pytest.raises(DataError, match="E_NOLUNG"):
        generate(small_world(), scans(), GIVEN, [2.0], lung=torch.zeros(SIZE, dtype=torch.bool))


@pytest.mark.parametrize(
    ("given", "times", "code"),
    [
        ((0.0,), [1.0], "E_GIVEN"),
        ((0.0, 0.0), [1.0], "E_TIMES"),
        ((1.0, 0.0), [2.0], "E_TIMES"),
        ((0.0, float("nan")), [2.0], "E_TIMES"),
        ((0.5, 1.0), [0.0], "E_TIMES"),
        ((0.0, 1.0), [], "E_TIMES"),
        ((0.0, 1.0), [float("inf")], "E_TIMES"),
    ],
    ids=["one scan", "one day", "unsorted", "no time", "before the first", "nothing asked", "infinite"],
)
def test_what_has_no_defined_future_is_refused(given, times, code):
    with pytest.raises(DataError, match=code):
        generate(small_world(), scans(*given) if len(given) == 2 else scans()[:1], given, times)


def test_scans_of_another_grid_or_with_damaged_values_are_refused():
    with pytest.raises(DataError, match="E_VALUE"):
        generate(small_world(), scans()[:, :, :8], GIVEN, [2.0])
    damaged = scans()
    damaged[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="E_NAN"):
        generate(small_world(), damaged, GIVEN, [2.0])


def test_samples_of_a_deterministic_model_are_refused():
    with pytest.raises(ModelError, match="E_UNSUPPORTED"):
        generate(small_world(), scans(), GIVEN, [2.0], samples=3)


def sampled(n: int = 5, seed: int = 7, **options: object):
    world = small_world(initial_state="variational")
    generator = torch.Generator().manual_seed(seed)
    return generate(world, scans(), GIVEN, [1.0, 2.0, 4.0], lung=lung_box(), samples=n, generator=generator, **options)


def test_samples_lie_apart_where_the_model_extrapolates_and_nowhere_else():
    spread = sampled(requantise=False).spread
    known, near, far = spread.sd
    lung = lung_box()
    assert float(known.max()) < 1e-6  # the last given scan is not in doubt
    assert 0 < float(near[lung].mean()) < float(far[lung].mean())
    assert tuple(spread.codes.shape) == (5, 3, 4, 4, 4)
    assert spread.histograms.sum(dim=2).numpy() == pytest.approx(np.ones((5, 3)))


def test_residual_samples_leave_everything_outside_the_lung_certain():
    spread = sampled(detail="residual").spread
    assert all(float(sd[~lung_box()].max()) == 0 for sd in spread.sd)
    assert float(spread.sd[2][lung_box()].max()) > 1e-4


def test_asking_for_samples_does_not_change_the_trajectory_and_a_seed_repeats_them():
    alone = generate(small_world(initial_state="variational"), scans(), GIVEN, [1.0, 2.0, 4.0], lung=lung_box())
    first, again, other = sampled(), sampled(), sampled(seed=8)
    assert alone.spread is None
    assert all(torch.equal(a, b) for a, b in zip(alone.volumes, first.volumes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.spread.mean, again.spread.mean, strict=True))
    assert not torch.equal(first.spread.mean[2], other.spread.mean[2])


def test_one_sample_has_no_spread_and_is_refused():
    with pytest.raises(DataError, match="E_VALUE"):
        sampled(1)


def test_bfloat16_changes_the_picture_by_its_rounding_and_not_more():
    world = small_world()
    rough = dataclasses.replace(world, precision="bf16")
    a = generate(world, scans(), GIVEN, [1.0, 3.0], detail="residual").volumes[1]
    b = generate(rough, scans(), GIVEN, [1.0, 3.0], detail="residual").volumes[1]
    assert float((a - b).abs().max()) > 0
    assert float((a - b).abs().mean()) < 0.02


def test_an_ode_trained_on_other_codes_is_refused():
    with pytest.raises(ModelError, match="E_TOKENIZER"):
        generate(dataclasses.replace(small_world(), tokenizer_sha256="f" * 64), scans(), GIVEN, [2.0])


def test_two_scans_in_one_half_year_are_refused_on_the_half_year_grid():
    world = small_world(grid="halfyear")
    with pytest.raises(DataError, match="E_TIMES"):
        generate(world, scans(0.0, 0.2), (0.0, 0.2), [2.0])


def test_generation_leaves_the_networks_in_the_mode_they_were_in():
    world = small_world()
    world.ode.train()
    generate(world, scans(), GIVEN, [2.0])
    assert world.ode.training
    assert not world.vqgan.training


def test_the_asked_times_of_the_paper():
    assert times_every(1.0, 3.0) == (0.0, 1.0, 2.0, 3.0)
    assert times_every(0.5, 5.5)[-1] == 5.5
    assert times_every(0.1, 0.3) == pytest.approx((0.0, 0.1, 0.2, 0.3))
    for interval, years in ((0.0, 3.0), (-1.0, 3.0), (1.0, 0.5), (float("nan"), 3.0)):
        with pytest.raises(DataError, match="E_TIMES"):
            times_every(interval, years, last_given=1.0)


def test_volumes_lie_between_zero_and_one_on_the_scans_grid():
    future = generate(small_world(), scans(), GIVEN, [0.0, 5.0], detail="residual")
    for volume in future.volumes:
        assert tuple(volume.shape) == SIZE
        assert 0 <= float(volume.min()) <= float(volume.max()) <= 1
