"""The parts of CorrField against brute force, SciPy and their defining formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.interpolate import RBFInterpolator
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist

from fourdvq.errors import RegistrationError
from fourdvq.preprocessing.registration.cost import Search, displacement_cost, with_energy
from fourdvq.preprocessing.registration.keypoints import distinctiveness, keypoints
from fourdvq.preprocessing.registration.refine import Refinement, correction, spline_matrix
from fourdvq.preprocessing.registration.spline import fit_spline
from fourdvq.preprocessing.registration.tree import Tree, lowered, marginals, rooted, spanning_tree
from fourdvq.preprocessing.registration.warp import (
    composed,
    interpolation_matrix,
    separably,
    voxel_centres,
    warped_image,
)

SHAPE = (14, 15, 16)


def random_tree(nodes: int, seed: int) -> Tree:
    """Every node hangs on a random earlier one, with random weights."""
    rng = np.random.default_rng(seed)
    parents = [int(rng.integers(0, i)) for i in range(1, nodes)]
    weights = rng.uniform(0.5, 8.0, nodes - 1)
    return rooted(csr_array((weights, (np.arange(1, nodes), parents)), shape=(nodes, nodes)))


def brute_marginals(costs: np.ndarray, tree: Tree, places: np.ndarray) -> np.ndarray:
    """Least total of every joint choice of displacements, by trying them all; costs (N, labels)."""
    nodes, labels = costs.shape
    apart = cdist(places, places, "sqeuclidean")
    least = np.full(costs.shape, np.inf)
    for choice in itertools.product(range(labels), repeat=nodes):
        total = sum(costs[i, choice[i]] for i in range(nodes))
        total += sum(
            apart[choice[i], choice[tree.parent[i]]] / tree.weight[i] for i in range(nodes) if tree.parent[i] >= 0
        )
        for i, label in enumerate(choice):
            least[i, label] = min(least[i, label], total)
    return least


@pytest.mark.parametrize("seed", range(3))
def test_belief_propagation_on_six_nodes_equals_trying_every_combination(seed):
    """Displacements {-1, 0, 1} along one axis of the cube: 3^6 combinations; elsewhere the cost is out of reach."""
    tree = random_tree(6, seed)
    costs = np.random.default_rng(seed).uniform(0, 3, (6, 3))
    cube = np.full((6, 3, 3, 3), 1e6, dtype=np.float32)
    cube[:, :, 1, 1] = costs
    found = marginals(torch.from_numpy(cube), tree)[:, :, 1, 1].numpy()
    expected = brute_marginals(costs, tree, np.arange(3.0)[:, None])
    for axis_free in (found - found.min(axis=1, keepdims=True), expected - expected.min(axis=1, keepdims=True)):
        assert axis_free.min() == 0.0
    np.testing.assert_allclose(
        found - found.min(axis=1, keepdims=True), expected - expected.min(axis=1, keepdims=True), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("nodes", "seed"), [(2, 0), (3, 1), (3, 2), (3, 3)])
def test_belief_propagation_in_the_whole_cube_equals_trying_every_combination(nodes, seed):
    tree = random_tree(nodes, seed)
    costs = np.random.default_rng(seed).uniform(0, 3, (nodes, 3, 3, 3)).astype(np.float32)
    found = marginals(torch.from_numpy(costs.copy()), tree).numpy().reshape(nodes, -1)
    places = np.stack(np.meshgrid(*[np.arange(3.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    expected = brute_marginals(costs.reshape(nodes, -1).astype(float), tree, places)
    np.testing.assert_allclose(
        found - found.min(axis=1, keepdims=True), expected - expected.min(axis=1, keepdims=True), atol=2e-5
    )


@pytest.mark.parametrize("steepness", [0.01, 0.2, 3.0])
def test_the_min_convolution_equals_the_minimum_over_all_pairs(steepness):
    values = torch.from_numpy(np.random.default_rng(1).uniform(0, 20, (4, 6, 6, 6)))
    slopes = steepness * torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    places = np.stack(np.meshgrid(*[np.arange(6.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    apart = cdist(places, places, "sqeuclidean")
    found = lowered(values, slopes).numpy().reshape(4, -1)
    for row, value, slope in zip(found, values.numpy().reshape(4, -1), slopes.numpy(), strict=True):
        np.testing.assert_allclose(row, (value[None] + slope * apart).min(axis=1) - value.min(), atol=1e-12)


def test_the_spanning_tree_is_the_lightest_and_joins_clusters_far_apart():
    """Two clusters of 40 points: no near neighbour links them, so the graph must grow until it hangs together."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(0, 10, (40, 3)), rng.uniform(500, 510, (40, 3))])
    grey = rng.uniform(-900, 0, 80)
    tree = spanning_tree(points, grey, beta=150.0)
    full = np.maximum(cdist(points, points), 0.1) + np.abs(grey[:, None] - grey[None]) / 150.0
    joined, total = {0}, 0.0  # Prim, written out
    while len(joined) < 80:
        inside = sorted(joined)
        outside = [i for i in range(80) if i not in joined]
        part = full[np.ix_(inside, outside)]
        total += part.min()
        joined.add(outside[int(part.min(axis=0).argmin())])
    assert (tree.parent >= 0).sum() == 79
    assert tree.weight.sum() == pytest.approx(total)
    assert sorted(np.concatenate(tree.levels)) == list(range(80))
    for depth, nodes in enumerate(tree.levels[1:]):
        assert set(tree.parent[nodes]) <= set(tree.levels[depth])


def test_the_cost_is_the_sum_of_squared_differences_of_the_patches():
    rng = np.random.default_rng(0)
    fixed, moving = (torch.from_numpy(rng.random((12, *SHAPE), dtype=np.float32)) for _ in range(2))
    points = torch.tensor([[7, 7, 7], [0, 3, 15], [13, 14, 1]])  # the last two look over the border
    for search in (Search(2, 2, 3), Search(2, 1, 2), Search(3, 2, 1)):
        costs = displacement_cost(with_energy(fixed), with_energy(moving), SHAPE, points, search, 2.5)
        patch = np.arange(-search.radius, search.radius + 1, search.step)
        steps = np.arange(-search.reach, search.reach + 1)
        assert costs.shape == (3, *[len(steps)] * 3)
        for i, d in itertools.product(range(3), itertools.product(range(len(steps)), repeat=3)):
            if sum(d) % 3:
                continue
            total = 0.0
            for p in itertools.product(patch, repeat=3):
                a = np.clip(points[i].numpy() + p, 0, np.array(SHAPE) - 1)
                b = np.clip(points[i].numpy() + p + search.step * steps[list(d)], 0, np.array(SHAPE) - 1)
                total += float(((fixed[(slice(None), *a)] - moving[(slice(None), *b)]) ** 2).sum())
            assert float(costs[(i, *d)]) == pytest.approx(2.5 * total / len(patch) ** 3, abs=2e-4)


def test_the_spline_equals_scipys_with_and_without_smoothing():
    rng = np.random.default_rng(0)
    points, at = rng.uniform(0, 200, (150, 3)), rng.uniform(-20, 220, (400, 3))
    values = 10 * np.sin(points / 60) + rng.normal(0, 1, (150, 3))
    for ridge in (0.0, 50.0, 5000.0):
        ours = fit_spline(torch.from_numpy(points), torch.from_numpy(values), ridge=ridge)
        theirs = RBFInterpolator(points, values, kernel="thin_plate_spline", smoothing=ridge)
        np.testing.assert_allclose(ours(torch.from_numpy(at)).numpy(), theirs(at), atol=0.01)
        if ridge == 0.0:
            np.testing.assert_allclose(ours(torch.from_numpy(points)).numpy(), values, atol=0.01)


def test_keypoints_are_corners_and_not_edges_or_planes():
    image = torch.full((40, 40, 40), -900.0)
    image[10:30, 10:30, 10:30] = -300.0  # a cube: 8 corners
    distinct = distinctiveness(image, 1.4)
    assert distinct[12, 12, 12] > 10 * distinct[20, 12, 12]  # corner against edge
    assert distinct[20, 20, 10] == distinct[0, 0, 0] == 0.0  # face and emptiness
    assert torch.isfinite(distinct).all()


def test_keypoints_stay_in_the_eroded_mask_spread_out_and_below_the_limit():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(-800, 60, (62, 62, 62)).astype(np.float32))
    mask = torch.zeros((62, 62, 62), dtype=torch.bool)
    mask[5:57, 5:57, 5:57] = True
    found = keypoints(image, mask, sigma=1.4, window=1, most=5000)
    assert (found >= 6).all()
    assert (found <= 55).all()
    apart = torch.cdist(found.double(), found.double(), p=torch.inf).fill_diagonal_(99)
    assert apart.min() > 1
    assert 100 <= len(keypoints(image, mask, sigma=1.4, window=1, most=300)) <= 300


def test_too_few_keypoints_are_refused_and_a_constant_image_has_none():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(-800, 60, (20, 20, 20)).astype(np.float32))
    small = torch.zeros((20, 20, 20), dtype=torch.bool)
    small[5:11, 5:11, 5:11] = True
    for values, mask in ((image, small), (torch.full_like(image, -1000.0), torch.ones_like(small))):
        with pytest.raises(RegistrationError, match="E_REG"):
            keypoints(values, mask, sigma=1.4, window=1, most=5000)


def test_composed_fields_move_points_one_after_the_other():
    z, y, x = voxel_centres(SHAPE, torch.device("cpu"))
    first = torch.stack([0.1 * z, torch.zeros_like(z), torch.full_like(z, 0.5)])
    then = torch.stack([0.05 * z, 0.02 * y, torch.full_like(x, 1.0)])
    both = composed(first, then)
    inside = (slice(0, 12), slice(None), slice(0, 14))
    np.testing.assert_allclose(both[0][inside], (0.1 * z + 0.05 * 1.1 * z)[inside], atol=1e-4)
    np.testing.assert_allclose(both[1][inside], (0.02 * y)[inside], atol=1e-4)
    np.testing.assert_allclose(both[2][inside], 1.5, atol=1e-5)
    shifted = warped_image(x, torch.stack([0 * x, 0 * x, torch.full_like(x, 2.25)]))
    np.testing.assert_allclose(shifted[..., :13], (x + 2.25)[..., :13], atol=1e-4)


def test_linear_values_on_a_lattice_come_back_at_every_voxel():
    nodes = [torch.arange(0.0, n + 3, 4) for n in SHAPE]
    z, y, x = torch.meshgrid(*nodes, indexing="ij")
    dense = separably(
        (2 * z - y + 3 * x)[None], [interpolation_matrix(n, a) for n, a in zip(SHAPE, nodes, strict=True)]
    )
    vz, vy, vx = voxel_centres(SHAPE, torch.device("cpu"))
    np.testing.assert_allclose(dense[0], 2 * vz - vy + 3 * vx, atol=1e-3)


def test_the_splines_of_the_correction_add_up_to_one_everywhere():
    matrix = spline_matrix(torch.arange(30), torch.arange(-1, 8) * 6, 6)
    np.testing.assert_allclose(matrix.sum(dim=1), 1.0, atol=1e-6)


def test_the_correction_finds_a_fraction_of_a_voxel_and_is_none_where_all_fits():
    z, y, x = voxel_centres((24, 26, 28), torch.device("cpu"))
    features = torch.stack([torch.sin(0.5 * z + 0.3 * y), torch.cos(0.4 * x), torch.sin(0.3 * y + 0.2 * x)])
    moved = torch.stack(
        [torch.sin(0.5 * (z - 0.4) + 0.3 * y), torch.cos(0.4 * (x + 0.3)), torch.sin(0.3 * y + 0.2 * (x + 0.3))]
    )
    mask = torch.zeros(z.shape, dtype=torch.bool)
    mask[5:-5, 5:-5, 5:-5] = True
    how = Refinement(steps=60, stiffness=0.05)
    found = correction(features, moved, mask, how)[:, mask]
    np.testing.assert_allclose(found.mean(dim=1), [0.4, 0.0, -0.3], atol=0.05)
    np.testing.assert_allclose(correction(features, features, mask, how), 0.0, atol=0.01)
