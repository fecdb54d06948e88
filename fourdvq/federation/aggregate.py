"""From the sites' updates to the next global weights: checks, shares, means, robust alternatives, server optimisers.

An update is a set of named tensors, the change of the weights over a round. Nothing here trusts it: a stock mean takes
NaN, broadcasts a wrong shape and lets a site that claims 10^12 scans own the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourdvq.errors import ConfigError, WireError
from fourdvq.tensors import Weights, first_nonfinite, form_difference

ROBUST_MIN_SITES = 4  # below, a median or trimmed mean gives one site half of the say or trims nobody
TRIM_SHARE = 0.2  # cut from either end
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

State = dict[str, Tensor]


def check_update(name: str, delta: Weights, reference: Weights, *, wire_dtype: str | None = None) -> None:
    """Raise WireError E_MESSAGE unless `delta` has exactly the names, shapes and dtypes of `reference`, all finite.

    `name` is the site, for the message; with `wire_dtype` every tensor must have that dtype instead. Broadcastable is
    not equal: a (1,) for a (4,) is refused.
    """
    difference = form_difference(delta, reference, dtype=FLOAT_DTYPES[wire_dtype] if wire_dtype else None)
    if difference:
        tensor, found, wanted = difference
        raise WireError("E_MESSAGE", where=f"update of {name}, tensor {tensor}", found=found, wanted=wanted)
    integers = [key for key, tensor in delta.items() if not tensor.is_floating_point()]
    if integers:
        where = f"update of {name}, tensor {integers[0]}"
        raise WireError("E_MESSAGE", where=where, found=str(delta[integers[0]].dtype), wanted="a floating dtype")
    broken = first_nonfinite(delta)
    if broken:
        where = f"update of {name}, tensor {broken}"
        raise WireError("E_MESSAGE", where=where, found="NaN or infinity", wanted="finite values")


def site_shares(
    scans: Mapping[str, float],
    registered: Mapping[str, float],
    *,
    cap_two: float = 0.7,
    cap_many: float = 0.5,
    capped: bool = True,
) -> dict[str, float]:
    """Each site's share of the mean, summing to 1: min(scans used, registered scans), then no site above the cap.

    The cap is `cap_two` for two sites and `cap_many` for more; what is cut off goes to the others in proportion.
    Raises WireError E_MESSAGE for a site that is not registered and for counts that are not finite and above 0.
    """
    believed = {}
    for site, used in scans.items():
        if site not in registered:
            raise WireError("E_MESSAGE", where=f"site {site}", found="not registered", wanted="a registered site")
        if not (math.isfinite(used) and used > 0 and math.isfinite(registered[site]) and registered[site] > 0):
            where, found = f"site {site}, scans used", f"{used} of {registered[site]} registered"
            raise WireError("E_MESSAGE", where=where, found=found, wanted="finite counts above 0")
        believed[site] = float(min(used, registered[site]))
    total = math.fsum(believed.values())
    shares = {site: weight / total for site, weight in believed.items()}
    if not capped or len(shares) < 2:
        return shares
    return _cap(shares, cap_two if len(shares) == 2 else cap_many)


def weighted_mean(updates: Iterable[tuple[float, Weights]]) -> State:
    """sum w_i x_i / sum w_i, tensor by tensor, in float64; the result is float32. One update in memory at a time.

    Raises WireError E_MESSAGE for a weight that is not finite and above 0, an update of another form than the first,
    a non-finite value, or no update at all.
    """
    sums: State = {}
    form: State = {}
    total = 0.0
    for position, (weight, update) in enumerate(updates):
        check_weight(position, weight)
        form = form or {name: torch.empty_like(tensor, device="meta") for name, tensor in update.items()}
        check_update(f"reply {position}", update, form)
        for name, tensor in update.items():
            scaled = tensor.to("cpu", torch.float64) * weight
            sums[name] = sums[name] + scaled if name in sums else scaled
        total += weight
    if not sums:
        raise WireError("E_MESSAGE", where="aggregation", found="no update", wanted="at least one")
    return {name: (value / total).float() for name, value in sums.items()}


def coordinate_median(updates: Sequence[tuple[float, Weights]]) -> State:
    """The median of each coordinate over sites, float32; site weights are left out. Needs at least 4 sites."""
    return _robust(updates, "median", _median)


def trimmed_mean(updates: Sequence[tuple[float, Weights]], *, share: float = TRIM_SHARE) -> State:
    """Mean of each coordinate without the int(share n) smallest and largest values, float32; weights are left out.

    Raises ConfigError E_UNSUPPORTED below 4 sites and where int(share n) = 0, which would trim nobody.
    """
    cut = int(share * len(updates))
    if len(updates) >= ROBUST_MIN_SITES and (cut == 0 or 2 * cut >= len(updates)):
        found = f"{len(updates)} sites and share {share}: {cut} cut from either end"
        raise ConfigError("E_UNSUPPORTED", where="federation.aggregator=trimmed_mean", found=found)
    return _robust(updates, "trimmed_mean", lambda ordered: ordered[cut : len(ordered) - cut].mean(dim=0))


AGGREGATORS: dict[str, Callable[[Sequence[tuple[float, Weights]]], State]] = {
    "mean": weighted_mean,
    "median": coordinate_median,
    "trimmed_mean": trimmed_mean,
}


@dataclass(frozen=True)
class PlainServer:
    """weights + lr * delta: FedAvg."""

    lr: float = 1.0

    def apply(self, weights: Weights, delta: Weights, state: State) -> tuple[State, State]:
        """The next global weights and optimiser state; `delta` is the aggregated update, `state` starts as {}."""
        check_update("the aggregate", delta, weights)
        return {n: (w.double() + self.lr * delta[n].double()).to(w.dtype) for n, w in weights.items()}, state


@dataclass(frozen=True)
class MomentumServer:
    """v <- momentum v + delta; weights + lr v: FedAvgM, Hsu et al. 2019, arXiv 1909.06335."""

    lr: float = 1.0
    momentum: float = 0.9

    def apply(self, weights: Weights, delta: Weights, state: State) -> tuple[State, State]:
        """As `PlainServer.apply`; the state holds `velocity.<name>` in float64."""
        check_update("the aggregate", delta, weights)
        following, kept = {}, {}
        for name, weight in weights.items():
            velocity = self.momentum * state.get(f"velocity.{name}", 0.0) + delta[name].double()
            kept[f"velocity.{name}"] = velocity
            following[name] = (weight.double() + self.lr * velocity).to(weight.dtype)
        return following, kept


@dataclass(frozen=True)
class AdamServer:
    """FedAdam, Reddi et al. 2021, arXiv 2003.00295, algorithm 2: no bias correction, tau instead of epsilon."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def apply(self, weights: Weights, delta: Weights, state: State) -> tuple[State, State]:
        """As `PlainServer.apply`; the state holds `first.<name>` and `second.<name>` in float64."""
        check_update("the aggregate", delta, weights)
        following, kept = {}, {}
        for name, weight in weights.items():
            change = delta[name].double()
            first = self.beta1 * state.get(f"first.{name}", 0.0) + (1 - self.beta1) * change
            second = self.beta2 * state.get(f"second.{name}", 0.0) + (1 - self.beta2) * change.square()
            kept[f"first.{name}"], kept[f"second.{name}"] = first, second
            following[name] = (weight.double() + self.lr * first / (second.sqrt() + self.tau)).to(weight.dtype)
        return following, kept


# Called with lr alone: SERVER_OPTIMIZERS["adam"](lr=0.01).apply(weights, delta, state)
SERVER_OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "none": PlainServer,
    "momentum": MomentumServer,
    "adam": AdamServer,
}


def check_weight(position: int, weight: float) -> None:
    """WireError E_MESSAGE unless the weight of reply `position` is finite and above 0."""
    if not (math.isfinite(weight) and weight > 0):
        where = f"reply {position}, weight"
        raise WireError("E_MESSAGE", where=where, found=str(weight), wanted="finite and above 0")


def _cap(shares: dict[str, float], cap: float) -> dict[str, float]:
    """Cut shares to `cap` and hand the excess out in proportion, again until no share is above it."""
    if cap * len(shares) < 1.0:
        found = f"cap {cap} for {len(shares)} sites"
        raise ConfigError("E_VALUE", where="federation.weight_cap", found=found, wanted="shares that can sum to 1")
    fixed: set[str] = set()
    while True:
        free = math.fsum(share for site, share in shares.items() if site not in fixed)
        left = 1.0 - cap * len(fixed)
        current = {s: cap if s in fixed else share * (left / free) for s, share in shares.items()}
        over = {site for site, share in current.items() if site not in fixed and share > cap * (1 + 1e-12)}
        if not over:
            return current
        fixed |= over


def _robust(updates: Sequence[tuple[float, Weights]], name: str, reduce: Callable[[Tensor], Tensor]) -> State:
    if len(updates) < ROBUST_MIN_SITES:
        where, found = f"federation.aggregator={name}", f"{len(updates)} sites"
        raise ConfigError("E_UNSUPPORTED", where=where, found=found, wanted=f"at least {ROBUST_MIN_SITES} sites")
    reference = updates[0][1]
    for position, (weight, update) in enumerate(updates):
        check_weight(position, weight)
        check_update(f"reply {position}", update, reference)
    result = {}
    for key in reference:
        stacked = torch.stack([update[key].to("cpu", torch.float64) for _, update in updates])
        result[key] = reduce(stacked.sort(dim=0).values).float()
    return result


def _median(ordered: Tensor) -> Tensor:
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
