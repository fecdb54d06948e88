"""Neighbouring keypoints should move alike: a minimum spanning tree, and exact belief propagation on it.

On a tree the marginals of costs C_i(d) plus |d_i - d_j|^2 / w_ij over its edges are found exactly in one pass up and
one down, each step a min-convolution with a parabola, one axis after the other. Source of the messages: Felzenszwalb
and Huttenlocher 2006; of the tree and its weights: Heinrich et al. 2015.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csgraph, csr_array
from scipy.spatial import cKDTree
from torch import Tensor

_NEIGHBOURS = 32


@dataclass(frozen=True)
class Tree:
    """`parent[i]` and `weight[i]` belong to the edge above node i; those of the root, node 0, are -1 and 0.

    `levels` are the nodes at each depth, the root's first.
    """

    parent: np.ndarray
    weight: np.ndarray
    levels: tuple[np.ndarray, ...]


def spanning_tree(points: np.ndarray, grey: np.ndarray, beta: float) -> Tree:
    """The tree with the least sum of w_ij = max(|x_i - x_j|, 0.1) + |grey_i - grey_j| / beta; points (N, 3) in voxels.

    Candidates are the nearest neighbours, more of them until the graph hangs together.
    """
    count = min(_NEIGHBOURS, len(points) - 1)
    while True:
        graph = _neighbour_graph(points, grey, beta, count)
        if count >= len(points) - 1 or csgraph.connected_components(graph, directed=False)[0] == 1:
            break
        count = min(2 * count, len(points) - 1)
    return rooted(csgraph.minimum_spanning_tree(graph))


def rooted(edges: csr_array) -> Tree:
    """The tree of an N x N matrix of N - 1 edge weights, hung up at node 0."""
    one_way = edges.tocoo()
    ends, lengths = np.stack(one_way.coords), np.asarray(one_way.data)
    both = csr_array((np.tile(lengths, 2), np.hstack([ends, ends[::-1]])), shape=edges.shape)
    order, parent = csgraph.breadth_first_order(both, 0, directed=False)
    parent = np.where(parent < 0, -1, parent).astype(np.int64)
    weight, depth = np.zeros(len(parent)), np.zeros(len(parent), dtype=np.int64)
    child = np.where(parent[ends[1]] == ends[0], ends[1], ends[0])
    weight[child] = lengths
    for node in order[1:]:
        depth[node] = depth[parent[node]] + 1
    return Tree(parent, weight, tuple(np.flatnonzero(depth == level) for level in range(depth.max() + 1)))


def marginals(costs: Tensor, tree: Tree) -> Tensor:
    """Min-marginals (N, s, s, s) of costs of that shape: the least sum over the whole tree with node i at d.

    They are exact up to one constant per node. `costs` is overwritten.
    """
    messages = torch.empty_like(costs)
    steepness = torch.from_numpy(1.0 / np.maximum(tree.weight, 1e-6)).to(costs.device, costs.dtype)
    chunk = max(1, (1 << (16 if costs.device.type == "cpu" else 24)) // costs[0].numel())
    for nodes in reversed(tree.levels[1:]):
        for some in np.array_split(nodes, -(-len(nodes) // chunk)):
            at = torch.from_numpy(some).to(costs.device)
            sent = lowered(costs[at], steepness[at])
            messages[at] = sent
            for node, message in zip(some, sent, strict=True):  # one by one: a parent may have several children
                costs[int(tree.parent[node])] += message
    for nodes in tree.levels[1:]:
        for some in np.array_split(nodes, -(-len(nodes) // chunk)):
            at, above = (torch.from_numpy(i).to(costs.device) for i in (some, tree.parent[some]))
            costs[at] += lowered(costs[above] - messages[at], steepness[at])
    return costs


def lowered(values: Tensor, steepness: Tensor) -> Tensor:
    """min over d' of values(d') + steepness |d - d'|^2, minus its least; values (K, s, s, s), steepness (K,)."""
    side = values.shape[-1]
    values = values - values.amin(dim=(1, 2, 3), keepdim=True)
    # Further than this no detour can pay: it would cost more than the whole range of the values.
    worth = float((values.amax(dim=(1, 2, 3)) / steepness).amax()) ** 0.5
    reach = min(side - 1, int(worth))
    slope = steepness.view(-1, 1, 1, 1)
    for axis in (1, 2, 3):
        best = values.clone()
        for step in range(1, reach + 1):
            raised = values + slope * float(step * step)
            left, right = best.narrow(axis, 0, side - step), best.narrow(axis, step, side - step)
            torch.minimum(left, raised.narrow(axis, step, side - step), out=left)
            torch.minimum(right, raised.narrow(axis, 0, side - step), out=right)
        values = best
    return values


def _neighbour_graph(points: np.ndarray, grey: np.ndarray, beta: float, count: int) -> csr_array:
    distance, index = cKDTree(points).query(points, k=count + 1)
    here = np.repeat(np.arange(len(points)), count + 1)
    there, apart = index.ravel(), distance.ravel()
    weight = np.maximum(apart, 0.1) + np.abs(grey[here] - grey[there]) / beta
    other = here != there
    return csr_array((weight[other], (here[other], there[other])), shape=(len(points), len(points)))
