"""A whole analysis in one process: the driver for local tables, the demo and tests.

All tables lie here, so nothing is hidden from anybody and no masks are needed; states that carry a masker use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

from fourdvq.survival.masking import MaskedSums, Masker, new_keys, unmask_total
from fourdvq.survival.messages import Sums, combine
from fourdvq.survival.run import CoxRun
from fourdvq.survival.state import CoxSiteState

R = TypeVar("R")


def drive(run: CoxRun[R], states: Sequence[CoxSiteState]) -> R:
    """Ask every site, add, and go on until the run is finished."""
    while (request := run.request()) is not None:
        answers = [state.send(request) for state in states]
        if isinstance(answers[0], MaskedSums):
            run.update(unmask_total([cast(MaskedSums, answer) for answer in answers]))
        else:
            run.update(combine([cast(Sums, answer) for answer in answers]))
    return run.result()


def share_masks(states: Sequence[CoxSiteState], *, run: str) -> None:
    """Give every site of a run in this process a masker with fresh keys; sites need different names."""
    keys = new_keys([state.site.name for state in states])
    for state in states:
        peers = {name: public for name, (_, public) in keys.items() if name != state.site.name}
        state.masker = Masker(state.site.name, keys[state.site.name][0], peers, run=run)
