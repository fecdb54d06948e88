"""How one machine runs stage 1: the site's own choices. They change no meaning, so they stand in no plan.

They are `train:` in site.yaml. This module imports nothing heavy, because a command line reads it. Channels last wins
only where the norms read it without a copy, which is compiled code on a GPU; on a CPU it changes a step by less than
3 % (measured at 16x64x64).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Hardware:
    """`devices` processes train one model together; the rest holds for each of them."""

    devices: Literal["auto"] | int = "auto"  # auto: every GPU that there is; on a CPU one process
    micro_batch: int = 1  # scans in one forward pass
    memory: Literal["auto", "low"] = "auto"  # low: residual blocks are computed again; auto: once memory ran out
    compile: Literal["auto", "always", "never"] = "auto"  # torch.compile of the generator; auto: on a GPU
    layout: Literal["auto", "contiguous", "channels_last"] = "auto"  # auto: channels last with compiled code on a GPU

    def __post_init__(self) -> None:
        if self.devices != "auto" and self.devices < 1:
            raise ValueError(f"devices {self.devices} is below 1")
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch {self.micro_batch} is below 1")


DEFAULT = Hardware()
