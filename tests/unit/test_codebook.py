"""Nearest codes, sums, seeding, the FSQ grid."""

from __future__ import annotations

import pytest
import torch

from fourdvq.errors import ConfigError
from fourdvq.models.codebook import Codebook, assignment_sums, nearest_codes
from fourdvq.models.fsq import FSQ_LEVELS, fsq_grid, fsq_indices, fsq_levels


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_chunked_search_equals_brute_force_in_float64(chunk):
    vectors, codes = random(500, 5), random(37, 5, seed=1)
    distances = (vectors.double()[:, None] - codes.double()[None]).square().sum(-1)
    assert torch.equal(nearest_codes(vectors, codes, chunk=chunk), distances.argmin(dim=1))


def test_a_code_is_nearest_to_itself_so_indices_survive_embedding():
    book = Codebook(64, 8)
    indices = torch.randint(64, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    again = book.nearest(book.embed(indices).reshape(-1, 8)).view(indices.shape)
    assert torch.equal(again, indices)


def test_sums_equal_a_one_hot_product_in_float64():
    vectors, indices = random(300, 6), torch.randint(9, (300,), generator=torch.Generator().manual_seed(2))
    one_hot = torch.nn.functional.one_hot(indices, 9).double()
    counts, sums = assignment_sums(vectors, indices, 9)
    assert torch.equal(counts, one_hot.sum(0))
    torch.testing.assert_close(sums, one_hot.T @ vectors.double(), rtol=0, atol=1e-12)


def test_the_largest_tensor_of_the_search_is_one_block_of_distances():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    vectors, codes = random(4000, 2), random(64, 2, seed=1)
    with Largest() as seen:
        nearest_codes(vectors, codes, chunk=500)
    assert seen.elements <= 500 * 64


def test_seeding_takes_different_vectors_and_is_recorded_in_the_state():
    book = Codebook(8, 3)
    assert not bool(book.is_seeded)
    vectors = random(50, 3)
    book.seed_from(vectors, torch.Generator().manual_seed(0))
    assert bool(book.state_dict()["is_seeded"])
    matches = (book.codes[:, None] == vectors[None]).all(-1)
    assert matches.any(1).all()
    assert len(set(matches.float().argmax(1).tolist())) == 8
    torch.testing.assert_close(book.sums, book.codes.double() * book.counts[:, None])


def test_seeding_from_fewer_vectors_than_codes_repeats_some():
    book = Codebook(8, 3)
    book.seed_from(random(3, 3), torch.Generator().manual_seed(0))
    assert len({tuple(code) for code in book.codes.tolist()}) == 3


@pytest.mark.parametrize("n_codes", sorted(FSQ_LEVELS))
def test_fsq_codes_come_back_as_their_own_index(n_codes):
    levels = fsq_levels(n_codes, 3)
    grid = fsq_grid(levels)
    assert grid.shape == (n_codes, 3)
    assert torch.equal(fsq_indices(grid, levels), torch.arange(n_codes))


def test_fsq_rounds_to_the_nearest_code_and_clamps_what_is_outside():
    levels = fsq_levels(256, 3)
    vectors = random(200, 3) * 1.5
    grid = fsq_grid(levels).double()
    nearest = (vectors.double().clamp(-1, 1)[:, None] - grid[None]).square().sum(-1).argmin(1)
    assert torch.equal(fsq_indices(vectors, levels), nearest)


@pytest.mark.parametrize(("n_codes", "code_dim"), [(255, 3), (256, 16)])
def test_an_impossible_fsq_grid_is_a_configuration_error(n_codes, code_dim):
    with pytest.raises(ConfigError, match="fsq"):
        Codebook(n_codes, code_dim, "fsq")
