"""Laws of masks: they cancel in the sum of all sites, whoever is first, and of no smaller set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdvq.errors import WireError
from fourdvq.survival.masking import Masker, new_keys, unmask_total
from fourdvq.survival.messages import CoxSums, PairCounts, combine
from fourdvq.wire.masked import peers_sha256

few = settings(max_examples=25, deadline=None)


def parts(n_sites: int, seed: int) -> list[CoxSums]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n_sites):
        values = rng.normal(scale=10.0 ** rng.integers(-6, 5), size=(3, 10))
        refused = rng.integers(0, 2, 3).astype(np.uint8)
        made.append(CoxSums(values[:, 0].copy(), values[:, 1:4].copy(), values[:, 4:].copy(), refused))
    return made


def maskers(n_sites: int, run: str = "r/1") -> list[Masker]:
    keys = new_keys([f"site{k}" for k in range(n_sites)])
    return [
        Masker(name, private, {peer: public for peer, (_, public) in keys.items() if peer != name}, run=run)
        for name, (private, _) in keys.items()
    ]


@few
@given(n_sites=st.integers(2, 6), seed=st.integers(0, 10_000), data=st.data())
def test_masks_cancel_in_the_sum_of_all_sites_in_any_order_and_in_every_round(n_sites, seed, data):
    sites, hidden_by = parts(n_sites, seed), maskers(n_sites)
    for _ in range(2):
        hidden = [masker.mask(sums) for masker, sums in zip(hidden_by, sites, strict=True)]
        total = unmask_total(data.draw(st.permutations(hidden)))
        for name, wanted in combine(sites).arrays().items():
            # Each part is rounded to 2^-40 once.
            tolerance = n_sites * 2.0**-41 + 1e-15 * np.abs(wanted).max()
            np.testing.assert_allclose(total.arrays()[name], wanted, rtol=0, atol=tolerance)


@few
@given(n_sites=st.integers(3, 6), seed=st.integers(0, 10_000))
def test_a_missing_site_leaves_noise_and_an_error(n_sites, seed):
    hidden = [masker.mask(sums) for masker, sums in zip(maskers(n_sites), parts(n_sites, seed), strict=True)]
    with pytest.raises(WireError):
        unmask_total(hidden[1:])
    left = sum((h.arrays["gradient"] for h in hidden[2:]), hidden[1].arrays["gradient"].copy())
    assert np.abs(left.view(np.int64) * 2.0**-40).max() > 1e5


@few
@given(counts=st.lists(st.integers(0, 2**40), min_size=2, max_size=5))
def test_counts_come_back_exactly(counts):
    made = [PairCounts(np.full((2, 1), n), np.full((2, 1), n // 2), np.array([n])) for n in counts]
    hidden = [masker.mask(sums) for masker, sums in zip(maskers(len(counts)), made, strict=True)]
    assert int(unmask_total(hidden).pairs[0]) == sum(counts)


@few
@given(n_sites=st.integers(2, 5), place=st.integers(0, 4), byte=st.integers(0, 31))
def test_any_other_key_or_name_gives_another_list(n_sites, place, byte):
    names = [f"site{k}" for k in range(n_sites)]
    keys = np.random.default_rng(7).integers(0, 256, (n_sites, 32)).astype(np.uint8)
    seen = peers_sha256(names, keys)
    other = keys.copy()
    other[place % n_sites, byte] ^= 1
    assert peers_sha256(names, other) != seen
    assert peers_sha256([*names[:-1], "site9"], keys) != seen
    for broken in (names[::-1], names[:-1], [names[0]] * n_sites):
        with pytest.raises(WireError):
            peers_sha256(broken, keys)
