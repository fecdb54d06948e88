"""Where the work on patients' scans happens: in this process, or in warm processes of its own, one for each device.

All have one interface: a job goes in (a task that the guard accepted, its plan, the site's seed), an `Outcome` comes
out. Stage 1 is trained by all processes together, the rest is done by the first. If one dies, all are started again for
the next job; the training state is on disk after every round.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from fourdvq.errors import CODES, ConfigError, FourdvqError
from fourdvq.plan import Plan, plan_from
from fourdvq.training.distributed import ALONE, Ranks, device_of, joined, processes_for
from fourdvq.training.hardware import DEFAULT, Hardware
from fourdvq.training.memory import keep_freed_memory
from fourdvq.wire.messages import REPLIES, TASKS, Task, TaskEnvelope
from fourdvq_client.egress import Outcome
from fourdvq_client.guard import error_code
from fourdvq_client.transfer import from_parcel, to_parcel
from fourdvq_client.workspace import Workspace

SHARED_JOBS = ("train_vqgan",)  # done by all processes together
GRACE_S = 30.0  # for the others, after one process failed
_SIGKILL = -9


@dataclass(frozen=True)
class Job:
    """An accepted task with what is needed to do it. `seed` is the site's own."""

    task: Task
    envelope: TaskEnvelope
    plan: Plan
    seed: int


class Worker(Protocol):
    """What the handlers call; raises FourdvqError, or anything else for the unforeseen."""

    def train_vqgan(self, job: Job) -> Outcome: ...

    def codebook_init(self, job: Job) -> Outcome: ...

    def encode(self, job: Job) -> Outcome: ...

    def train_ode(self, job: Job) -> Outcome: ...

    def evaluate_reconstruction(self, job: Job) -> Outcome: ...

    def evaluate_trajectory(self, job: Job) -> Outcome: ...

    def evaluate_conformal(self, job: Job) -> Outcome: ...

    def future_codes(self, job: Job) -> Outcome: ...

    def close(self) -> None: ...


def make_worker(kind: str, workspace: Workspace, device: str, hardware: Hardware = DEFAULT) -> Worker:
    """`inline` or `process`. ConfigError E_UNSUPPORTED for several devices without processes of their own."""
    if kind == "inline":
        from fourdvq_client.future_codes import FutureBench

        if hardware.devices not in ("auto", 1):
            where, found = "site.yaml: train.devices", f"{hardware.devices} with worker inline"
            raise ConfigError("E_UNSUPPORTED", where=where, found=found, fix="set worker: process")
        return FutureBench(workspace, device, hardware)
    return ProcessWorker(workspace, device, hardware)


class ProcessWorker:
    """Spawned processes with a Bench in each. Arrays cross as safetensors bytes, so no shared memory is needed."""

    def __init__(self, workspace: Workspace, device: str, hardware: Hardware = DEFAULT) -> None:
        self._workspace = workspace
        self._device = device
        self._hardware = hardware
        self._team: list[_Member] = []
        self._meeting: tempfile.TemporaryDirectory[str] | None = None

    def train_vqgan(self, job: Job) -> Outcome:
        return self._do("train_vqgan", job)

    def codebook_init(self, job: Job) -> Outcome:
        return self._do("codebook_init", job)

    def encode(self, job: Job) -> Outcome:
        return self._do("encode", job)

    def train_ode(self, job: Job) -> Outcome:
        return self._do("train_ode", job)

    def evaluate_reconstruction(self, job: Job) -> Outcome:
        return self._do("evaluate_reconstruction", job)

    def evaluate_trajectory(self, job: Job) -> Outcome:
        return self._do("evaluate_trajectory", job)

    def evaluate_conformal(self, job: Job) -> Outcome:
        return self._do("evaluate_conformal", job)

    def future_codes(self, job: Job) -> Outcome:
        return self._do("future_codes", job)

    @property
    def pid(self) -> int | None:
        """The first process's id, None before the first job."""
        return self._team[0].process.pid if self._team else None

    def close(self) -> None:
        """Ask the processes to end, and end those that do not."""
        for member in self._team:
            with contextlib.suppress(OSError, ValueError):
                member.pipe.send(None)
        for member in self._team:
            member.process.join(timeout=10)
        self._end()

    def _do(self, name: str, job: Job) -> Outcome:
        team = self._started()
        request = {
            "job": name,
            "kind": type(job.task).kind,
            "task": to_parcel(job.task),
            "envelope": to_parcel(job.envelope),
            "plan": job.plan.to_json(),
            "seed": job.seed,
        }
        at_work = team if name in SHARED_JOBS else team[:1]
        try:
            for member in at_work:
                member.pipe.send(request)
            answer = self._answer_of(at_work)
        except (EOFError, OSError):
            raise self._died() from None
        if answer["code"]:
            raise _error_of(answer)
        reply = from_parcel(REPLIES[type(job.task).kind], answer["reply"])
        return Outcome(reply, answer["patients"], answer["scans"], answer["code_patients"])

    def _answer_of(self, at_work: Sequence[_Member]) -> dict[str, Any]:
        """The first process's answer, or the first failure of any; EOFError when a process is gone.

        After a failure the others get a little time: they may wait for the one that failed.
        """
        waiting = {member.pipe: member for member in at_work}
        failures: list[dict[str, Any]] = []
        answer: dict[str, Any] = {}
        while waiting:
            ready = wait(list(waiting), timeout=GRACE_S if failures else None)
            if not ready:
                self._end()
                break
            for pipe in ready:
                member = waiting.pop(pipe)  # type: ignore[call-overload]
                found: dict[str, Any] = member.pipe.recv()
                if found["code"]:
                    failures.append(found)
                elif member is at_work[0]:
                    answer = found
        if failures:
            # The first one that is more than the news that another one is gone.
            return next((f for f in failures if f["code"] != "E_PEER"), failures[0])
        return answer

    def _started(self) -> list[_Member]:
        if self._team and all(member.process.is_alive() for member in self._team):
            return self._team
        self._end()
        world = processes_for(self._hardware, self._device)
        context = multiprocessing.get_context("spawn")
        self._meeting = tempfile.TemporaryDirectory(prefix="fourdvq-")
        meeting = Path(self._meeting.name) / "meeting"
        for rank in range(world):
            ours, theirs = context.Pipe()
            place = _Place(self._workspace.root, self._device, self._hardware, rank, world, meeting)
            process = context.Process(target=_serve, args=(theirs, place), daemon=True)
            process.start()
            theirs.close()
            self._team.append(_Member(process, ours))
        return self._team

    def _died(self) -> FourdvqError:
        """The error for a process that is gone; the rest of the team goes with it."""
        gone = wait([member.process.sentinel for member in self._team], timeout=10)
        for member in self._team:
            if member.process.sentinel in gone:
                # The sentinel falls when the process lets go of its files, a moment before it can be reaped.
                member.process.join(timeout=10)
        codes = [member.process.exitcode for member in self._team]
        self._end()
        ended = [code for code in codes if code is not None]
        # A kill without a word is what the kernel does when memory runs out.
        code = "OUT_OF_MEMORY" if _SIGKILL in ended else "INTERNAL"
        return FourdvqError(code, where="worker", found=f"exit {ended}")

    def _end(self) -> None:
        """End what is left of the team, gently first."""
        for member in self._team:
            if member.process.is_alive():
                member.process.terminate()
        for member in self._team:
            member.process.join(timeout=10)
            if member.process.is_alive():
                member.process.kill()
            member.pipe.close()
        self._team = []
        if self._meeting is not None:
            self._meeting.cleanup()
            self._meeting = None


@dataclass(frozen=True)
class _Member:
    """One process of the team and our end of the pipe to it."""

    process: BaseProcess
    pipe: Connection


@dataclass(frozen=True)
class _Place:
    """What a process is told at its start."""

    root: Path
    device: str
    hardware: Hardware
    rank: int
    world: int
    meeting: Path


def _serve(pipe: Connection, place: _Place) -> None:
    from fourdvq_client.future_codes import FutureBench
    from fourdvq_client.site_log import site_logger, start_log

    keep_freed_memory()
    workspace = Workspace(place.root)
    # One writer to a log that is rotated; what fails elsewhere comes back through the pipe.
    log = site_logger(workspace) if place.rank else start_log(workspace)
    device = device_of(place.device, place.rank, place.world)
    # A closed pipe is how a client that died says goodbye.
    with contextlib.suppress(EOFError), _ranks(place, device) as ranks:
        bench = FutureBench(workspace, device, place.hardware, ranks)
        while (request := pipe.recv()) is not None:
            pipe.send(_answer(bench, request, log))


@contextlib.contextmanager
def _ranks(place: _Place, device: str) -> Iterator[Ranks]:
    if place.world == 1:
        yield ALONE
        return
    # The processes of one machine need no network but its own.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    with joined(place.meeting, place.rank, place.world, device=torch.device(device)) as ranks:
        yield ranks


def _answer(bench: Any, request: dict[str, Any], log: Any) -> dict[str, Any]:
    """Do one job; an error becomes its code and its words for the site's own log."""
    try:
        job = Job(
            task=from_parcel(TASKS[request["kind"]], request["task"]),
            envelope=from_parcel(TaskEnvelope, request["envelope"]),
            plan=plan_from(json.loads(request["plan"])),
            seed=request["seed"],
        )
        work: Callable[[Job], Outcome] = getattr(bench, request["job"])
        outcome = work(job)
    except Exception as error:
        log.exception("job %s failed", request["job"])
        if isinstance(error, FourdvqError):
            return {"code": error.code, "where": error.where, "found": error.found}
        return {"code": error_code(error), "where": "worker", "found": f"{type(error).__name__}: {error}"}
    return {
        "code": "",
        "reply": to_parcel(outcome.reply),
        "patients": outcome.patients,
        "scans": outcome.scans,
        "code_patients": outcome.code_patients,
    }


def _error_of(answer: dict[str, Any]) -> FourdvqError:
    code = answer["code"] if answer["code"] in CODES else "INTERNAL"
    return FourdvqError(code, where=answer["where"], found=answer["found"])
