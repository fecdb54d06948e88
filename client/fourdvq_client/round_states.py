"""Training states of a stage over its rounds: where a round starts from, also when it is asked for a second time.

    runs/<run>/checkpoints/<stage>/<round>/    the state after the round was answered; its meta name the round's parent

A coordinator that lost our answer repeats the round from the same weights. Then the site must start from the state
before that round too, or the repeated round would give another update than the first.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fourdvq.errors import ModelError
from fourdvq.training.checkpoint import TrainState, load_state, save_state

_KEPT = 3


class RoundStates:
    """States of one stage in one run, newest last. A damaged one is passed over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start_of(self, parent: str) -> tuple[str, TrainState | None]:
        """Name and state to start from: the newest whose round had another parent; ("", None) for the first round."""
        for path in self._newest_first():
            try:
                state = load_state(path)
            except ModelError:
                continue
            if state.meta.get("parent") != parent:
                return path.name, state
        return "", None

    def save(self, number: int, parent: str, state: TrainState) -> str:
        """Keep the state after a round and return its name; the oldest beyond three are removed."""
        name = f"{number:06d}"
        save_state(
            self._folder / name, TrainState(state.tensors, {**state.meta, "parent": parent, "round_number": number})
        )
        for old in self._newest_first()[_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return name

    def _newest_first(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted((p for p in self._folder.iterdir() if p.name.isdigit()), reverse=True)
