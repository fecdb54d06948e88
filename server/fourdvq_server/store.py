"""The run folder: what a run has reached, written so that a kill at any moment loses nothing that was finished.

    runs/<run>/plan.json profile.json run.json      what runs
               control.json                         pause, stop: written by a person's command, read between exchanges
               state.json status.json               wire round counter; what `status` and `watch` show
               metrics.jsonl events.jsonl           a line per round and site; a line per event
               stages/<stage>/round-0001/           weights.safetensors ..., round.json, complete
               stages/<stage>/replies/<exchange>/   replies as they arrived, until their round is complete
               stages/<stage>/result.json complete  what the stage handed on
               outbox/                              what MLflow has not been told yet

A round is filled under a temporary name and renamed; `complete` holds the sha256 of round.json, which holds the sha256
of every file. A round that does not fit is not read: the run goes on from the one before.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fourdvq.config import canonical_json
from fourdvq.data.files import file_sha256, write_atomic, write_with
from fourdvq.errors import ConfigError, ModelError, TemporaryStop
from fourdvq.plan import Plan, plan_from
from fourdvq.tensors import Weights

_COMPLETE = "complete"


@dataclass(frozen=True)
class Round:
    """A complete round: named tensor sets and plain facts (metrics, sites, counts)."""

    number: int
    tensors: dict[str, Weights]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Control:
    """What a person asked of a running experiment."""

    pause: bool = False
    stop: bool = False


class RunStore:
    """One run's folder. `open_store` and `create_store` make it; a second process is refused by `locked`."""

    def __init__(self, folder: Path, plan: Plan, profile: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.plan = plan
        self.profile = dict(profile)
        self.facts = dict(facts)
        self.name = folder.name
        self.metrics = MetricsLog(folder / "metrics.jsonl")

    def stage(self, name: str) -> StageStore:
        """The part of the folder that belongs to one stage."""
        return StageStore(self.folder / "stages" / name)

    @property
    def control(self) -> Control:
        """What was asked last; a missing file asks for nothing."""
        data = read_json(self.folder / "control.json", {})
        return Control(pause=bool(data.get("pause")), stop=bool(data.get("stop")))

    def set_control(self, control: Control) -> None:
        write_json(self.folder / "control.json", {"pause": control.pause, "stop": control.stop})

    def next_wire_round(self) -> int:
        """A round number that no message of this run has had; on disk before it is used, so a crash cannot reuse it."""
        path = self.folder / "state.json"
        number = int(read_json(path, {}).get("wire_round", 0)) + 1
        write_json(path, {"wire_round": number})
        return number

    @property
    def status(self) -> dict[str, Any]:
        found = read_json(self.folder / "status.json", {})
        return found if isinstance(found, dict) else {}

    def set_status(self, status: Mapping[str, Any]) -> None:
        write_json(self.folder / "status.json", status)

    def add_event(self, event: Mapping[str, Any]) -> None:
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(canonical_json(dict(event)) + "\n")

    @property
    def is_running(self) -> bool:
        """Whether a process holds the run at this moment."""
        try:
            with self.locked():
                return False
        except TemporaryStop:
            return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. Raises TemporaryStop E_BUSY if another process holds it."""
        with (self.folder / ".lock").open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                stream.seek(0)
                holder = stream.read().strip() or "unknown"
                raise TemporaryStop("E_BUSY", where=str(self.folder), found=f"process {holder} runs it") from None
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield


class StageStore:
    """Rounds, journaled replies and the result of one stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_round(self, number: int, tensors: Mapping[str, Weights], facts: Mapping[str, Any]) -> None:
        """Write one round completely or not at all; a damaged folder of the same number is replaced."""
        target = self._round_folder(number)
        temporary = self.folder / f".tmp-{target.name}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {}
        for name, group in tensors.items():
            path = temporary / f"{name}.safetensors"
            save_tensors(path, group)
            files[path.name] = file_sha256(path)
        record = canonical_json({"files": files, "facts": dict(facts)}).encode()
        write_atomic(temporary / "round.json", record)
        write_atomic(temporary / _COMPLETE, _sha(record).encode())
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)

    def round_numbers(self) -> list[int]:
        """Numbers of all round folders, damaged ones too."""
        return sorted(int(p.name.removeprefix("round-")) for p in self.folder.glob("round-[0-9]*"))

    def read_round(self, number: int) -> Round:
        """Raises ModelError E_CHECKPOINT if the round is incomplete or any of its bytes changed."""
        folder = self._round_folder(number)
        record = _checked_record(folder, "round.json")
        tensors: dict[str, Weights] = {}
        for name, sha256 in record["files"].items():
            path = folder / name
            if not path.is_file() or file_sha256(path) != sha256:
                raise ModelError("E_CHECKPOINT", where=str(path), found="missing or other bytes than were written")
            tensors[path.stem] = load_tensors(path)
        return Round(number, tensors, record["facts"])

    def last_round(self) -> tuple[Round | None, list[str]]:
        """The newest sound round (None if there is none) and the text of what was found damaged on the way."""
        damaged: list[str] = []
        for number in reversed(self.round_numbers()):
            try:
                return self.read_round(number), damaged
            except ModelError as error:
                damaged.append(str(error))
        return None, damaged

    def need_last_round(self) -> Round:
        """The newest sound round. Raises ModelError E_CHECKPOINT if there is none."""
        last, damaged = self.last_round()
        if last is None:
            raise ModelError("E_CHECKPOINT", where=str(self.folder), found=damaged[0] if damaged else "no round")
        return last

    def round_facts(self, number: int) -> dict[str, Any]:
        """The plain facts of a round without reading its tensors; empty if the round is damaged."""
        try:
            facts: dict[str, Any] = _checked_record(self._round_folder(number), "round.json")["facts"]
        except ModelError:
            return {}
        return facts

    @property
    def is_done(self) -> bool:
        """Whether the stage's result can be read, and the newest round, on which later stages rest."""
        try:
            numbers = self.round_numbers()
            if numbers:
                self.read_round(numbers[-1])
            return self.result is not None
        except ModelError:
            return False

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Record the stage's result; after this the stage is not run again."""
        record = canonical_json({"facts": dict(facts)}).encode()
        write_atomic(self.folder / "result.json", record)
        write_atomic(self.folder / _COMPLETE, _sha(record).encode())

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` recorded, or None if the stage is not finished. Raises ModelError E_CHECKPOINT if damaged."""
        if not (self.folder / _COMPLETE).is_file():
            return None
        facts: dict[str, Any] = _checked_record(self.folder, "result.json")["facts"]
        return facts

    def exchange_folder(self, exchange: str) -> Path:
        """Where the replies of one exchange are journaled."""
        return self.folder / "replies" / exchange

    def forget_replies(self) -> None:
        """Delete the journal: called when the round that used it is complete."""
        shutil.rmtree(self.folder / "replies", ignore_errors=True)

    def _round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}"


class MetricsLog:
    """metrics.jsonl: one line per (stage, round, site); a line that is already there is not written twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = {_metrics_key(line) for line in read_lines(path)}

    def append(self, stage: str, number: int, site: str, values: Mapping[str, float]) -> None:
        line = {"stage": stage, "round": number, "site": site, "values": dict(values)}
        if not values or _metrics_key(line) in self._seen:
            return
        self._seen.add(_metrics_key(line))
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(canonical_json(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.path)


def create_store(folder: Path, plan: Plan, profile: Mapping[str, Any], facts: Mapping[str, Any]) -> RunStore:
    """Make a run folder. Raises ConfigError E_EXISTS if it holds another plan."""
    if (folder / "plan.json").is_file():
        existing = open_store(folder)
        if existing.plan.hash != plan.hash:
            raise ConfigError(
                "E_EXISTS", where=str(folder), found=f"plan {existing.plan.hash[:12]}", wanted=f"plan {plan.hash[:12]}"
            )
        return existing
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "profile.json", profile)
    write_json(folder / "run.json", facts)
    # Last: a folder without plan.json is not a run, so a crash before this line leaves nothing half made.
    write_atomic(folder / "plan.json", plan.to_json().encode())
    return RunStore(folder, plan, profile, facts)


def open_store(folder: Path) -> RunStore:
    """An existing run folder. Raises ConfigError E_RUN without a plan, E_KEY, E_TYPE for a plan of another version."""
    path = folder / "plan.json"
    if not path.is_file():
        raise ConfigError("E_RUN", where=str(folder), found="no plan.json")
    plan = plan_from(json.loads(path.read_text(encoding="utf-8")))
    return RunStore(folder, plan, read_json(folder / "profile.json", {}), read_json(folder / "run.json", {}))


def save_tensors(path: Path, tensors: Weights) -> None:
    """Write named tensors as safetensors, atomically and synced."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_with(path, lambda temporary: save_file(plain, temporary))


def load_tensors(path: Path) -> dict[str, Any]:
    """Read named tensors. Raises ModelError E_CHECKPOINT if the file is not a safetensors file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        raise ModelError("E_CHECKPOINT", where=str(path), found="not a readable safetensors file") from None


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically."""
    write_atomic(path, canonical_json(value).encode())


def read_json(path: Path, default: Any) -> Any:
    """The parsed file, or `default` if it is missing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except ValueError:
        raise ModelError("E_CHECKPOINT", where=str(path), found="text that is not JSON") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _checked_record(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = (folder / name).read_bytes()
        wanted = (folder / _COMPLETE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ModelError("E_CHECKPOINT", where=str(folder), found="an incomplete folder") from None
    except UnicodeDecodeError:
        wanted = "unreadable"
    if _sha(data) != wanted:
        raise ModelError("E_CHECKPOINT", where=str(folder / name), found="other bytes than were written")
    record: dict[str, Any] = json.loads(data)
    return record


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _metrics_key(line: Mapping[str, Any]) -> tuple[str, int, str]:
    return str(line.get("stage")), int(line.get("round", 0)), str(line.get("site"))
