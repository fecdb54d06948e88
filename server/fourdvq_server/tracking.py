"""MLflow behind an outbox: every event is a line on disk first, a thread tells MLflow when it can.

A run never waits for MLflow and never fails with it. Events carry a key and their own time; what is told twice is the
same to MLflow as once, so a replay after a crash is harmless. Shape: one parent run, one nested run per stage with the
round as step, one nested run per site (tags site, role). MLflow writes straight to a SQLite file, not over HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourdvq.config import canonical_json
from fourdvq_server.store import read_json, read_lines, write_json

_log = logging.getLogger(__name__)
_BATCH = 100  # parameters in one call
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_KEY_TAG, _RUN_TAG = "fourdvq.key", "fourdvq.run"


@dataclass(frozen=True)
class MlflowStore:
    """The database and the artifact folder; the folder is stated, or MLflow would use ./mlruns of the moment."""

    database: Path
    artifacts: Path
    experiment: str = "fourdvq"

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.database.resolve()}"


class Outbox:
    """events.jsonl and how many of its lines MLflow has been told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "events.jsonl"
        self._lock = threading.Lock()
        self._lines = read_lines(self._path)
        self._keys = {line["key"] for line in self._lines}
        self.done = int(read_json(folder / "done.json", {}).get("done", 0))

    def add(self, event: Mapping[str, Any]) -> None:
        """Keep an event; one whose key is already there is dropped."""
        with self._lock:
            if event["key"] in self._keys:
                return
            self._keys.add(event["key"])
            self._lines.append(dict(event))
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(canonical_json(dict(event)) + "\n")

    def waiting(self) -> dict[str, Any] | None:
        """The oldest event that MLflow has not been told."""
        with self._lock:
            return self._lines[self.done] if self.done < len(self._lines) else None

    def confirm(self) -> None:
        with self._lock:
            self.done += 1
        write_json(self.folder / "done.json", {"done": self.done})

    def __len__(self) -> int:
        with self._lock:
            return len(self._lines) - self.done


class Tracker:
    """One experiment run's line to MLflow. Without a store events are dropped and everything else is the same."""

    def __init__(
        self,
        folder: Path,
        run: str,
        store: MlflowStore | None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._run = run
        self._store = store
        self._clock = clock
        self._outbox = Outbox(folder / "outbox") if store else None
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Tracker:
        """Begin telling MLflow. Early: the first use of a new database makes its schema, which takes 8 s."""
        if self._outbox is not None:
            self._thread = threading.Thread(target=self._replay, name="mlflow-outbox", daemon=True)
            self._thread.start()
        return self

    def begin(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """The parent run with the flattened plan."""
        self._add({"key": "begin", "type": "begin", "params": dict(params), "tags": dict(tags)})

    def site(self, site: str, role: str) -> None:
        """The nested run of a site."""
        self._add({"key": f"site/{site}", "type": "tags", "run": f"site/{site}", "tags": {"site": site, "role": role}})

    def log_metrics(self, stage: str, number: int, site: str, values: Mapping[str, float]) -> None:
        """One batch: the federation's figures go to the stage's run, a site's to the site's run."""
        if not values:
            return
        run = f"site/{site}" if site else f"stage/{stage}"
        named = {f"{stage}/{name}" if site else name: float(value) for name, value in values.items()}
        key = f"metrics/{stage}/{number}/{site}"
        self._add({"key": key, "type": "metrics", "run": run, "step": number, "values": named})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file of the run: the plan, a table, a report."""
        self._add({"key": f"artifact/{folder}/{path.name}", "type": "artifact", "path": str(path), "folder": folder})

    def end(self, status: str, values: Mapping[str, float]) -> None:
        """FINISHED, FAILED or KILLED, with the last figures on the parent run."""
        event = {"key": f"end/{status}/{len(values)}", "type": "end", "status": status, "values": dict(values)}
        self._add(event)

    def close(self, timeout_s: float = 60.0) -> int:
        """Wait for the outbox to empty, at most so long; returns how many events stay for the next start."""
        if self._thread is None or self._outbox is None:
            return 0
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        return len(self._outbox)

    def _add(self, event: dict[str, Any]) -> None:
        if self._outbox is not None:
            self._outbox.add({**event, "at": int(self._clock() * 1000)})
            self._wake.set()

    def _replay(self) -> None:
        store, outbox = self._store, self._outbox
        if store is None or outbox is None:
            return
        teller: _Teller | None = None
        pause = _FIRST_PAUSE_S
        while True:
            event = outbox.waiting()
            if event is None and self._closing.is_set():
                return
            try:
                teller = teller or _Teller(store, self._run, outbox.folder)
                if event is not None:
                    teller.tell(event)
                    outbox.confirm()
                    pause = _FIRST_PAUSE_S
                    continue
            except Exception as error:
                # Whatever MLflow raises, the experiment goes on; the event stays in the outbox.
                _log.warning("MLflow: %s; tried again in %.0f s", type(error).__name__, pause)
                if self._closing.is_set():
                    return
                self._closing.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            self._wake.wait(1.0)
            self._wake.clear()


class _Teller:
    """Tells MLflow one event at a time; knows the ids of the runs it made."""

    def __init__(self, store: MlflowStore, run: str, folder: Path) -> None:
        from mlflow.tracking import MlflowClient

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        store.database.parent.mkdir(parents=True, exist_ok=True)
        store.artifacts.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=store.uri)
        self._run = run
        self._file = folder / "runs.json"
        self._ids: dict[str, str] = read_json(self._file, {})
        found = self._client.get_experiment_by_name(store.experiment)
        self._experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(store.experiment, artifact_location=store.artifacts.resolve().as_uri())
        )

    def tell(self, event: Mapping[str, Any]) -> None:
        _TELL[event["type"]](self, event)

    def begin(self, event: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        run_id = self._run_id("")
        params = [Param(name, value) for name, value in event["params"].items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(run_id, params=params[start : start + _BATCH])
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in event["tags"].items()])

    def tags(self, event: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, value) for name, value in event["tags"].items()]
        self._client.log_batch(self._run_id(event["run"]), tags=tags)

    def metrics(self, event: Mapping[str, Any]) -> None:
        self._log(self._run_id(event["run"]), event["values"], event["at"], event["step"])

    def artifact(self, event: Mapping[str, Any]) -> None:
        if Path(event["path"]).is_file():
            self._client.log_artifact(self._run_id(""), event["path"], event["folder"] or None)

    def end(self, event: Mapping[str, Any]) -> None:
        self._log(self._run_id(""), event["values"], event["at"], 0)
        for run_id in self._ids.values():
            self._client.set_terminated(run_id, event["status"], event["at"])

    def _log(self, run_id: str, values: Mapping[str, float], at: int, step: int) -> None:
        from mlflow.entities import Metric

        # Its own time, not now: MLflow takes an equal metric of an equal time for the same one.
        metrics = [Metric(name, value, at, step) for name, value in values.items()]
        if metrics:
            self._client.log_batch(run_id, metrics=metrics)

    def _run_id(self, key: str) -> str:
        if key not in self._ids:
            self._ids[key] = self._find(key) or self._create(key)
            write_json(self._file, self._ids)
        return self._ids[key]

    def _find(self, key: str) -> str | None:
        query = f"tags.`{_RUN_TAG}` = '{self._run}' and tags.`{_KEY_TAG}` = '{key or 'parent'}'"
        found = self._client.search_runs([self._experiment], query, max_results=1)
        return found[0].info.run_id if found else None

    def _create(self, key: str) -> str:
        tags = {_RUN_TAG: self._run, _KEY_TAG: key or "parent"}
        if key:
            tags["mlflow.parentRunId"] = self._run_id("")
        name = f"{self._run} {key}".strip()
        return str(self._client.create_run(self._experiment, tags=tags, run_name=name).info.run_id)


_TELL: dict[str, Callable[[_Teller, Mapping[str, Any]], None]] = {
    "begin": _Teller.begin,
    "tags": _Teller.tags,
    "metrics": _Teller.metrics,
    "artifact": _Teller.artifact,
    "end": _Teller.end,
}
