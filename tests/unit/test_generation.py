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
