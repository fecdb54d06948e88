"""What this site has accepted and answered, on disk: no task is answered twice, no old round is taken for a new one.

state/accepted.json                 per run: last round and its parent, whether a reply left, task ids, rounds trained
state/accepted/<run>.<stage>/       the last global model of a stage, against which the next one is held
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fourdvq.config import build
from fourdvq.errors import ConfigError, ModelError, Refused
from fourdvq.tensors import Weights
from fourdvq.training.checkpoint import TrainState, load_state, save_state, write_atomic
from fourdvq.wire.messages import Task, TaskEnvelope
from fourdvq_client.policy import BEFORE_APPROVAL

_KEPT_TASK_IDS = 4096
TRAINING = "train."  # what counts as a round of training; a survival analysis has hundreds of steps


@dataclass(frozen=True)
class RunRecord:
    """One run as this site knows it."""

    round: int = -1
    parent: str = ""
    released: bool = False
    trained: int = 0  # training tasks answered
    task_ids: tuple[str, ...] = field(default_factory=tuple)


class AcceptedRounds:
    """The record of all runs. A file that cannot be read is an error: forgetting would allow a replay."""

    def __init__(self, state: Path) -> None:
        self._path = state / "accepted.json"
        self._models = state / "accepted"
        self._cache: dict[str, Weights] = {}
        self._runs = self._read()

    def record(self, run: str) -> RunRecord:
        return self._runs.get(run, RunRecord())

    def check(self, envelope: TaskEnvelope, kind: str) -> None:
        """Raise Refused REPLAY for a task id that was used, STALE_ROUND for a round that is not new.

        A round is new above the last answered one, or equal to it with the same parent while no reply left the site.
        """
        record = self.record(envelope.run)
        if envelope.task_id in record.task_ids:
            raise Refused("REPLAY", where=kind, found="a task id that was used")
        if kind in BEFORE_APPROVAL:
            return
        repeated = envelope.round == record.round and envelope.parent == record.parent and not record.released
        if envelope.round <= record.round and not repeated:
            raise Refused("STALE_ROUND", where=kind, found=f"round {envelope.round}", wanted=f"above {record.round}")

    def accept(self, envelope: TaskEnvelope, task: Task) -> None:
        """Remember that the task was taken on."""
        record = self.record(envelope.run)
        ids = (*record.task_ids, envelope.task_id)[-_KEPT_TASK_IDS:]
        if task.kind in BEFORE_APPROVAL:
            self._store(envelope.run, RunRecord(**{**vars(record), "task_ids": ids}))
            return
        trained = record.trained + int(task.kind.startswith(TRAINING))
        self._store(envelope.run, RunRecord(envelope.round, envelope.parent, False, trained, ids))

    def release(self, envelope: TaskEnvelope, kind: str) -> None:
        """Remember that an answer to the round is about to leave."""
        record = self.record(envelope.run)
        if kind not in BEFORE_APPROVAL and record.round == envelope.round:
            self._store(envelope.run, RunRecord(**{**vars(record), "released": True}))

    def last_model(self, run: str, stage: str) -> Weights | None:
        """The last global model of a stage that was accepted, or None. A damaged copy counts as none."""
        key = f"{run}.{stage}"
        if key not in self._cache and (self._models / key).is_dir():
            try:
                self._cache[key] = load_state(self._models / key).tensors
            except ModelError:
                return None
        return self._cache.get(key)

    def keep_model(self, run: str, stage: str, weights: Mapping[str, Tensor]) -> None:
        """Keep a copy of the accepted model, on disk too: a restart must not forget what it is held against."""
        key = f"{run}.{stage}"
        self._cache[key] = dict(weights)
        save_state(self._models / key, TrainState(dict(weights), {"stage": stage}))

    def _read(self) -> dict[str, RunRecord]:
        if not self._path.is_file():
            return {}
        try:
            data: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            return {run: build(RunRecord, record, where=run) for run, record in data.items()}
        except (ValueError, AttributeError, OSError, ConfigError) as error:
            raise Refused(
                "E_STATE", where=str(self._path), found=type(error).__name__, wanted="the record of answered rounds"
            ) from None

    def _store(self, run: str, record: RunRecord) -> None:
        self._runs = {**self._runs, run: record}
        data = json.dumps({name: asdict(r) for name, r in self._runs.items()}, sort_keys=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, data.encode())
