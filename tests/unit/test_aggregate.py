"""What a mean of updates refuses, how shares are capped, robust means, server optimisers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

from fourdvq.errors import ConfigError, WireError
from fourdvq.federation.aggregate import (
    AGGREGATORS,
    SERVER_OPTIMIZERS,
    check_update,
    site_shares,
    trimmed_mean,
    weighted_mean,
)

REFERENCE = {"w": torch.zeros(4), "b": torch.zeros(2, 2)}


def update(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4,), value), "b": torch.full((2, 2), value)}


def random_updates(n: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
    g = torch.Generator().manual_seed(n)
    return [(float(i + 1), {"w": torch.randn(4, generator=g), "b": torch.randn(2, 2, generator=g)}) for i in range(n)]


BAD = {
    "NaN": {"w": torch.tensor([1.0, math.nan, 0, 0]), "b": torch.zeros(2, 2)},
    "infinity": {"w": torch.tensor([1.0, math.inf, 0, 0]), "b": torch.zeros(2, 2)},
    "broadcastable shape": {"w": torch.ones(1), "b": torch.zeros(2, 2)},
    "transposable shape": {"w": torch.ones(4), "b": torch.zeros(4)},
    "missing tensor": {"w": torch.ones(4)},
    "extra tensor": update() | {"more": torch.ones(1)},
    "another dtype": update() | {"w": torch.ones(4, dtype=torch.float64)},
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_update_is_refused(case):
    with pytest.raises(WireError, match="E_MESSAGE"):
        check_update("leuven", BAD[case], REFERENCE)


@pytest.mark.parametrize("aggregator", sorted(AGGREGATORS))
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("position", [0, 4])
def test_no_aggregator_lets_a_bad_update_in_wherever_it_stands(aggregator, case, position):
    updates = [(1.0, update()) for _ in range(5)]
    updates[position] = (1.0, BAD[case])
    with pytest.raises(WireError, match="E_MESSAGE"):
        AGGREGATORS[aggregator](updates)


@pytest.mark.parametrize("weight", [0.0, -9.0, math.nan, math.inf])
def test_a_weight_that_is_no_count_is_refused(weight):
    with pytest.raises(WireError, match="E_MESSAGE"):
        weighted_mean([(10.0, update()), (weight, update(910.0))])


def test_integers_and_nothing_at_all_have_no_mean():
    with pytest.raises(WireError, match="floating"):
        weighted_mean([(1.0, {"n": torch.ones(2, dtype=torch.int64)})])
    with pytest.raises(WireError, match="no update"):
        weighted_mean([])


def test_a_wire_dtype_is_checked_against_what_came():
    check_update("leuven", {n: t.bfloat16() for n, t in REFERENCE.items()}, REFERENCE, wire_dtype="bfloat16")
    with pytest.raises(WireError, match="bfloat16"):
        check_update("leuven", REFERENCE, REFERENCE, wire_dtype="bfloat16")


def test_the_mean_equals_numpy_in_float64_and_reads_one_update_at_a_time():
    updates = random_updates(5)
    ours = weighted_mean(iter(updates))
    wanted = np.average([u["w"].numpy() for _, u in updates], axis=0, weights=[w for w, _ in updates])
    np.testing.assert_allclose(ours["w"].numpy(), wanted, rtol=1e-6)
    assert ours["w"].dtype is torch.float32


def test_one_update_of_any_weight_is_its_own_mean():
    ((_, one),) = random_updates(1)
    for weight in (1.0, 3.0, 17.0):
        assert torch.equal(weighted_mean([(weight, one)])["w"], one["w"])


def test_a_lie_about_scans_is_cut_to_what_was_registered_and_then_to_the_cap():
    shares = site_shares({"a": 10, "liar": 1e12}, {"a": 10, "liar": 40}, cap_two=0.7, cap_many=0.5)
    assert shares == pytest.approx({"a": 0.3, "liar": 0.7})
    assert site_shares({"a": 10, "liar": 1e12}, {"a": 10, "liar": 40}, capped=False)["liar"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("scans", "wanted"),
    [
        ((60, 30, 10), (0.5, 0.375, 0.125)),  # the excess of 0.1 goes 3 : 1
        ((96, 2, 2), (0.5, 0.25, 0.25)),
        ((55, 44, 1), (0.5, 0.5 * 44 / 45, 0.5 / 45)),
        ((30, 30, 40), (0.3, 0.3, 0.4)),
        ((5,), (1.0,)),
    ],
)
def test_shares_of_several_sites(scans, wanted):
    counts = {f"site{i}": float(n) for i, n in enumerate(scans)}
    shares = site_shares(counts, counts, cap_two=0.7, cap_many=0.5)
    assert list(shares.values()) == pytest.approx(list(wanted))
    assert sum(shares.values()) == pytest.approx(1.0)


def test_what_is_handed_out_never_lifts_another_site_over_the_cap():
    counts = {"a": 60.0, "b": 35.0, "c": 3.0, "d": 2.0}
    shares = site_shares(counts, counts, cap_many=0.4)
    assert max(shares.values()) <= 0.4 + 1e-12
    assert shares["c"] / shares["d"] == pytest.approx(1.5)
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("used", [0.0, -1.0, math.nan])
def test_scan_counts_that_cannot_be_are_refused(used):
    with pytest.raises(WireError, match="E_MESSAGE"):
        site_shares({"a": used}, {"a": 5})
    with pytest.raises(WireError, match="registered"):
        site_shares({"stranger": 5}, {"a": 5})


@pytest.mark.parametrize("n", [5, 6, 9])
def test_median_and_trimmed_mean_equal_numpy_and_scipy(n):
    updates = random_updates(n)
    stacked = np.stack([u["b"].double().numpy() for _, u in updates])
    np.testing.assert_allclose(AGGREGATORS["median"](updates)["b"].numpy(), np.median(stacked, axis=0), rtol=1e-6)
    np.testing.assert_allclose(trimmed_mean(updates)["b"].numpy(), trim_mean(stacked, 0.2, axis=0), rtol=1e-6)


@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean"])
def test_a_site_at_1000_moves_a_robust_mean_of_five_by_less_than_a_spread(aggregator):
    values = [1.0, 1.1, 0.9, 1.2, 1000.0]
    result = AGGREGATORS[aggregator]([(1.0, update(v)) for v in values])
    assert 0.9 <= float(result["w"][0]) <= 1.2


@pytest.mark.parametrize(("aggregator", "n"), [("median", 3), ("trimmed_mean", 3), ("trimmed_mean", 4)])
def test_robust_means_that_protect_nobody_are_refused(aggregator, n):
    with pytest.raises(ConfigError, match="E_UNSUPPORTED"):
        AGGREGATORS[aggregator](random_updates(n))


def run(name: str, deltas: list[float], **settings: float) -> list[float]:
    optimiser = SERVER_OPTIMIZERS[name](**settings)
    weights, path = {"w": torch.zeros(1)}, []
    state: dict[str, torch.Tensor] = {}
    for d in deltas:
        weights, state = optimiser.apply(weights, {"w": torch.tensor([d])}, state)
        path.append(float(weights["w"]))
    return path


def test_no_server_optimiser_adds_the_update():
    assert run("none", [1.0, 2.0], lr=0.5) == pytest.approx([0.5, 1.5])


def test_server_momentum_is_torch_sgd_momentum_on_the_negative_update():
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=0.3, momentum=0.9)
    path = []
    for d in (1.0, -2.0, 0.5):
        parameter.grad = torch.tensor([-d])
        sgd.step()
        path.append(float(parameter.detach()))
    assert run("momentum", [1.0, -2.0, 0.5], lr=0.3) == pytest.approx(path, rel=1e-6)


def test_server_adam_by_hand():
    first, second, w, path = 0.0, 0.0, 0.0, []
    for d in (0.2, -0.1):
        first = 0.9 * first + 0.1 * d
        second = 0.99 * second + 0.01 * d * d
        w += 0.05 * first / (math.sqrt(second) + 1e-3)
        path.append(w)
    assert run("adam", [0.2, -0.1], lr=0.05) == pytest.approx(path, rel=1e-6)


@pytest.mark.parametrize("name", sorted(SERVER_OPTIMIZERS))
def test_a_server_optimiser_refuses_an_update_of_another_form(name):
    with pytest.raises(WireError, match="E_MESSAGE"):
        SERVER_OPTIMIZERS[name](lr=1.0).apply({"w": torch.zeros(4)}, {"w": torch.zeros(1)}, {})
