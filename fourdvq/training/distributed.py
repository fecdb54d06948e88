"""Several devices of one site, one process each, training one model: what they share after every optimiser step.

Every process draws the same scans of a step and works on its own part of them; then gradients are added, codebook sums
are gathered, and all take the same step. Plain collectives instead of torch's DistributedDataParallel wrapper: with
accumulation there is one exchange a step, two networks share it, the parts may be unequal, and the codebook sums of
each scan can be put back into the order in which one process alone would have added them, so that they are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourdvq.errors import ConfigError, ModelError
from fourdvq.plan import Plan
from fourdvq.training.hardware import Hardware

T = TypeVar("T")

TIMEOUT_S = 600.0  # for one exchange; a process that died is noticed at once


class Ranks:
    """This process among `world` of them. With one process every method gives back what it got."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of what all have: every `world`-th item."""
        return list(items[self.rank :: self.world])

    def worst(self, level: int, device: torch.device) -> int:
        """The highest `level` of all processes, so that all of them decide alike."""
        if self.world == 1:
            return level
        value = torch.tensor(level, device=device)
        self._call(dist.all_reduce, value, op=dist.ReduceOp.MAX)
        return int(value)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over processes; one that is missing here counts as 0."""
        if self.world == 1:
            return
        kept = list(parameters)
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in kept])
        self._call(dist.all_reduce, flat)
        for parameter, part in zip(kept, flat.split([p.numel() for p in kept]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """Rows (n, m) of the items of `share` -> rows (total, m) of all items in their own order, exactly."""
        if self.world == 1:
            return rows
        most = -(-total // self.world)
        mine = rows.new_zeros(most, rows.shape[1])
        mine[: len(rows)] = rows
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        self._call(dist.all_gather, parts, mine)
        return torch.stack(parts, dim=1).flatten(0, 1)[:total]

    def _call(self, exchange: Callable[..., Any], *values: Any, **options: Any) -> None:
        try:
            exchange(*values, **options)
        except RuntimeError as error:
            where = f"exchange between {self.world} training processes, process {self.rank}"
            raise ModelError("E_PEER", where=where, found=str(error).splitlines()[0]) from None


ALONE = Ranks()


@contextmanager
def joined(
    meeting: Path, rank: int, world: int, *, device: torch.device, timeout_s: float = TIMEOUT_S
) -> Iterator[Ranks]:
    """Be process `rank` of `world`; all name the same file `meeting`, which must not exist before.

    NCCL between GPUs, gloo between CPUs. ModelError E_PEER if the others do not come.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        where = f"start of {world} training processes, process {rank}"
        raise ModelError("E_PEER", where=where, found=str(error).splitlines()[0]) from None
    try:
        yield Ranks(rank, world)
    finally:
        dist.destroy_process_group()


def processes_for(hardware: Hardware, device: str) -> int:
    """How many processes a site trains with. ConfigError E_VALUE for more GPUs than there are."""
    if not device.startswith("cuda"):
        return 1 if hardware.devices == "auto" else hardware.devices
    # "cuda:1" names one GPU on purpose; "cuda" means whatever is there.
    there = torch.cuda.device_count() if device == "cuda" else 1
    if hardware.devices == "auto":
        return max(1, there)
    if hardware.devices > there:
        where, found = "site.yaml: train.devices", f"{hardware.devices} with device {device}"
        raise ConfigError("E_VALUE", where=where, found=found, wanted=f"at most {there} here")
    return hardware.devices


def device_of(device: str, rank: int, world: int) -> str:
    """The device of process `rank`: the GPU of its number, or what the site named where one process trains."""
    return f"cuda:{rank}" if device == "cuda" and world > 1 else device


def check_divisible(plan: Plan, ranks: Ranks, *, drifting: bool) -> None:
    """ConfigError E_UNSUPPORTED for what has no equal on several devices: statistics that move scan by scan."""
    for found, wanted, bad in (
        ("model.norm=batch", "norm=group: batch statistics move with every forward pass", plan.model.norm == "batch"),
        ("codes that move within a step", "federation.codebook_sync=round_frozen", drifting),
    ):
        if bad and ranks.world > 1:
            where = f"train.devices={ranks.world}"
            raise ConfigError("E_UNSUPPORTED", where=where, found=found, wanted=wanted, fix="set train.devices=1")
