"""What a person at the site can follow: runs/<run>/rounds.jsonl and metrics.csv, and the step that runs right now."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from fourdvq.config import canonical_json
from fourdvq.plan import Plan
from fourdvq.training.checkpoint import write_atomic
from fourdvq.wire.messages import TaskEnvelope
from fourdvq_client.workspace import Workspace

_EVERY_S = 1.0  # a progress file more often than that tells nobody more


class Diary:
    """Writes for one task. Nothing here leaves the site."""

    def __init__(self, workspace: Workspace, envelope: TaskEnvelope, plan: Plan) -> None:
        self._state = workspace.state
        self._folder = workspace.runs / envelope.run
        self._envelope = envelope
        self._folder.mkdir(parents=True, exist_ok=True)
        self._state.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "plan.json").is_file():
            write_atomic(self._folder / "plan.json", plan.to_json().encode())
        self._started = time.monotonic()

    def step_reporter(self, stage: str, first: int, steps: int) -> Callable[[int, Mapping[str, float]], None]:
        """For a trainer's `on_step`: keeps state/progress.json fresh, with an estimate of the time left."""
        shown = [-_EVERY_S]

        def report(step: int, losses: Mapping[str, float]) -> None:
            now = time.monotonic()
            done = step - first + 1
            if now - shown[0] < _EVERY_S and done < steps:
                return
            shown[0] = now
            left = (now - self._started) / done * (steps - done)
            self._write_progress(
                {
                    "stage": stage,
                    "step": done,
                    "steps": steps,
                    "seconds_left": round(left, 1),
                    "losses": {n: float(f"{v:.4g}") for n, v in losses.items()},
                }
            )

        return report

    def round_done(self, stage: str, *, patients: int, scans: int, losses: Mapping[str, float]) -> None:
        """One line in rounds.jsonl, one row per loss in metrics.csv."""
        seconds = round(time.monotonic() - self._started, 3)
        line = {
            "stage": stage,
            "round": self._envelope.round,
            "patients": patients,
            "scans": scans,
            "seconds": seconds,
            "utc": _now(),
            "losses": dict(losses),
        }
        with (self._folder / "rounds.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(canonical_json(line) + "\n")
        self._append_metrics(stage, losses)

    def _append_metrics(self, stage: str, losses: Mapping[str, float]) -> None:
        path = self._folder / "metrics.csv"
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not path.is_file():
            writer.writerow(["stage", "round", "metric", "value"])
        for name, value in losses.items():
            writer.writerow([stage, self._envelope.round, name, repr(float(value))])
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text.getvalue())

    def _write_progress(self, facts: Mapping[str, object]) -> None:
        body = {"run": self._envelope.run, "round": self._envelope.round, "utc": _now(), **facts}
        write_atomic(self._state / "progress.json", json.dumps(body, sort_keys=True).encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
