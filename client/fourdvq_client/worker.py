"""Where the work on patients' scans happens: in this process, or in one warm process of its own.

Both have one interface: a job goes in (a task that the guard accepted, its plan, the site's seed), an `Outcome` comes
out. A process that dies is started again for the next job; the training state is on disk after every round.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from fourdvq.errors import CODES, FourdvqError
from fourdvq.plan import Plan, plan_from
from fourdvq.wire.messages import REPLIES, TASKS, Task, TaskEnvelope
from fourdvq_client.egress import Outcome
from fourdvq_client.guard import error_code
from fourdvq_client.transfer import from_parcel, to_parcel
from fourdvq_client.workspace import Workspace

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


def make_worker(kind: str, workspace: Workspace, device: str) -> Worker:
    """`inline` or `process`."""
    if kind == "inline":
        from fourdvq_client.future_codes import FutureBench

        return FutureBench(workspace, device)
    return ProcessWorker(workspace.root, device)


class ProcessWorker:
    """A spawned process with a Bench in it. Arrays cross as safetensors bytes, so no shared memory is needed."""

    def __init__(self, root: Path, device: str) -> None:
        self._root = root
        self._device = device
        self._process: Any = None
        self._pipe: Connection | None = None

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
        """The process's id, None before the first job."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """Ask the process to end, and end it if it does not."""
        if self._process is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if self._pipe is not None:
                self._pipe.send(None)
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(timeout=10)
        self._process, self._pipe = None, None

    def _do(self, name: str, job: Job) -> Outcome:
        pipe = self._started()
        request = {
            "job": name,
            "kind": type(job.task).kind,
            "task": to_parcel(job.task),
            "envelope": to_parcel(job.envelope),
            "plan": job.plan.to_json(),
            "seed": job.seed,
        }
        try:
            pipe.send(request)
            answer = pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if answer["code"]:
            raise _error_of(answer)
        reply = from_parcel(REPLIES[type(job.task).kind], answer["reply"])
        return Outcome(reply, answer["patients"], answer["scans"], answer["code_patients"])

    def _started(self) -> Connection:
        if self._process is not None and self._process.is_alive() and self._pipe is not None:
            return self._pipe
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(self._root), self._device), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe = ours
        return ours

    def _died(self) -> FourdvqError:
        self._process.join(timeout=10)
        code = self._process.exitcode
        self._process, self._pipe = None, None
        # A kill without a word is what the kernel does when memory runs out.
        return FourdvqError("OUT_OF_MEMORY" if code == _SIGKILL else "INTERNAL", where="worker", found=f"exit {code}")


def _serve(pipe: Connection, root: str, device: str) -> None:
    from fourdvq_client.future_codes import FutureBench
    from fourdvq_client.site_log import start_log

    workspace = Workspace(Path(root))
    log = start_log(workspace)
    bench = FutureBench(workspace, device)
    # A closed pipe is how a client that died says goodbye.
    with contextlib.suppress(EOFError):
        while (request := pipe.recv()) is not None:
            pipe.send(_answer(bench, request, log))


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
