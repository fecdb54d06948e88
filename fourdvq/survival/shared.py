"""One baseline hazard for all sites (opt-in): risk-set sums on a public time grid, and the likelihood at the server.

Another model than the default, and a heavier message: the sites send sums of the risk set at every grid point, so the
grid is public. Exact death times are possible with disclosure off alone; under a policy the grid has bins that every
site accepts, and times are rounded up to the end of their bin. Weights are not shifted by their maximum (the shift
would differ between sites), so a site withholds a model with |eta| above its bound.

Axes: G grid points, Q = 1 + p + p(p+1)/2 sums, m models, A analyses.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fourdvq.survival.cox import Prepared, chunks, likelihood
from fourdvq.survival.disclosure import Policy, accepted_bins, refuse
from fourdvq.survival.messages import F64, I64, Bool, CoxRequest, CoxSums, GridRequest, GridSums, RiskSums

HORIZON_DAYS = 7305.0  # 20 years; the last bin is open


def first_grid(bin_days: float) -> GridRequest:
    """The finest public grid: equal bins up to 20 years."""
    return GridRequest(edges=bin_days * np.arange(1.0, HORIZON_DAYS // bin_days + 1))


def merged_grid(request: GridRequest, total: GridSums) -> GridRequest | None:
    """The grid with every bin that some site did not accept joined to the next one (the last: to the one before).

    None when all bins are accepted. Ends, since each call has fewer bins; one bin alone holds everybody.
    """
    accepted = total.accepting == total.sites
    if accepted.all():
        return None
    if len(accepted) == 1:
        raise refuse("times")
    keep = np.ones(len(accepted), dtype=bool)
    g = 0
    while g < len(accepted) - 1:
        if accepted[g]:
            g += 1
        else:
            keep[g] = False  # its upper end goes: the bin now ends with its neighbour
            g += 2
    if keep.all():
        keep[-2] = False
    return replace(request, edges=request.edges[keep])


def grid_sums(request: GridRequest, t: F64, e: Bool, policy: Policy | None) -> GridSums:
    """Which bins this site accepts: one bit each."""
    fine = np.ones(len(request.edges), dtype=bool)
    if policy is not None:
        points = np.arange(len(fine))[:, None]
        # From a common start the bins overlap: bin g holds who leaves after the first edge and up to edge g.
        index = np.searchsorted(request.edges, t, side="left") if request.from_start else bin_index(request, t)
        inside = (index <= points) & (index > 0) if request.from_start else index == points
        fine = accepted_bins(policy, (inside & e).sum(axis=1), inside.sum(axis=1))
    return GridSums(sites=np.ones(1, dtype=np.int64), accepting=fine.astype(np.int64))


def bin_index(grid: GridRequest, t: F64) -> I64:
    """The last grid point (0 .. G-1) at which a patient who leaves at t (n,) is still at risk.

    Bins: the first upper end at or after t, since times are rounded up; the last bin is open. Exact times: the last one
    at or before t, -1 for who leaves before the first.
    """
    if grid.exact:
        return np.asarray(np.searchsorted(grid.edges, t, side="right") - 1, dtype=np.int64)
    return np.minimum(np.searchsorted(grid.edges, t, side="left"), len(grid.edges) - 1).astype(np.int64)


def risk_messages(
    prepared: Prepared, request: CoxRequest, grid: GridRequest, *, max_abs_eta: float, min_effective: float = 0.0
) -> RiskSums:
    """A site's risk-set and tied-death sums of every active model at every grid point.

    Withheld, as in `cox.evaluate`: a model below `min_effective`, or with |eta| above `max_abs_eta` on a training row.
    """
    (m, p), g = request.beta.shape, len(grid.edges)
    a, b = np.triu_indices(p)
    risk, tied = np.zeros((2, 1 + p + len(a), g, m))
    eta_sum, z_sum, refused = np.zeros(m), np.zeros((m, p)), np.zeros(m, dtype=np.uint8)
    index = bin_index(grid, prepared.t)
    at_point = index[None] == np.arange(g)[:, None]
    n_folds = len(request.active) // max(len(request.replicates), 1)
    folds = np.arange(len(request.active)) % n_folds
    deaths = (at_point[None] & (prepared.train[folds] & prepared.e)[:, None]).sum(axis=2).astype(np.int64)
    for replicate, fold, columns, models in chunks(request.replicates, request.active):
        Z, C = prepared.rows(replicate)
        train, beta = prepared.train[fold], request.beta[models]
        z = np.stack([Z[:, columns], *(np.broadcast_to(c[:, None], (len(c), len(columns))) for c in C.T)])
        eta = np.einsum("pnm,mp->nm", z, beta)
        low = (np.abs(eta[train]) > max_abs_eta).any(axis=0)
        eta = np.where(low, 0.0, eta)  # withheld below; exp stays finite
        basis = np.concatenate([np.ones((1, *eta.shape)), z, z[a] * z[b]]) * np.exp(eta)
        in_risk = (index[None] >= np.arange(g)[:, None]) & train
        died = prepared.e & train
        risk[:, :, models] = np.einsum("gn,qnm->qgm", in_risk.astype(float), basis, optimize=True)
        tied[:, :, models] = np.einsum("gn,qnm->qgm", (at_point & died).astype(float), basis, optimize=True)
        eta_sum[models], z_sum[models] = eta[died].sum(axis=0), z[:, died].sum(axis=1).T
        if min_effective > 0:
            low |= _effective(np.exp(eta), in_risk) < min_effective
        refused[models] = low
        risk[:, :, models] *= ~low
        tied[:, :, models] *= ~low
        eta_sum[models] *= ~low
        z_sum[models] *= ~low[:, None]
    return RiskSums(risk=risk, tied=tied, deaths=deaths, eta=eta_sum, z=z_sum, refused=refused)


def shared_likelihood(total: RiskSums, request: CoxRequest, *, ties: str) -> CoxSums:
    """The server's part: the partial likelihood of all sites together, from their summed risk sets."""
    m, p = request.beta.shape
    ll, g, info = np.zeros(m), np.zeros((m, p)), np.zeros((m, p * (p + 1) // 2))
    n_folds = len(request.active) // max(len(request.replicates), 1)
    numbers = {int(r): k for k, r in enumerate(request.replicates)}
    for replicate, fold, _, models in chunks(request.replicates, request.active):
        deaths = total.deaths[numbers[replicate] * n_folds + fold]
        point = np.repeat(np.arange(len(deaths)), deaths)
        number = np.arange(len(point)) - np.repeat(np.cumsum(deaths) - deaths, deaths)
        phi = number / deaths[point] if ties == "efron" else np.zeros(len(point))
        A = total.risk[:, point, models] - phi[None, :, None] * total.tied[:, point, models]
        ll[models], g[models], info[models] = likelihood(A, total.eta[models], total.z[models])
    return CoxSums(log_likelihood=ll, gradient=g, information=info, refused=total.refused)


def _effective(w: F64, in_risk: Bool) -> F64:
    """Median effective number of patients (m,) over risk sets of 10 or more; infinite without one."""
    sets = in_risk[in_risk.sum(axis=1) >= 10].astype(float)
    if not len(sets):
        return np.full(w.shape[1], np.inf)
    return np.asarray(np.median((sets @ w) ** 2 / (sets @ w**2), axis=0))
