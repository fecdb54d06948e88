"""Prepare patients side by side, each in a process of its own, so that one bad file takes down nothing else.

A worker that dies costs the scan it had in hand and nothing more: that scan becomes a failed row, and its patient goes
on with the next one. Where memory was the reason, the patient is first tried once more with the machine for itself.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Protocol

from fourdvq import errors
from fourdvq.errors import FourdvqError
from fourdvq.preprocessing.pipeline import PatientResult, StepInHand, record_failure
from fourdvq_client.patient_worker import (
    THREAD_LIMITS,
    Means,
    Message,
    PatientJob,
    Ready,
    Stop,
    prepare_job,
    worker_main,
)
from fourdvq_client.worker_memory import resident

__all__ = ["Limits", "Means", "PatientJob", "Watcher", "prepare_all"]

_TICK_S = 0.25  # how often memory and time are looked at
_OUT_OF_MEMORY = "OUT_OF_MEMORY"


class Watcher(Protocol):
    """Is told what happens, for a person who waits."""

    def step(self, pseudonym: str, step: StepInHand) -> None:
        """A step begins."""

    def patient(self, result: PatientResult) -> None:
        """A patient is done."""


@dataclass(frozen=True)
class Limits:
    """What the workers may take. `memory` bytes for all of them together, 0 for no bound."""

    workers: int = 1
    memory: int = 0
    scan_seconds: float = 10_800.0
    read_seconds: float = math.inf  # of them, for reading and decoding its files
    jobs_a_process: int = 20  # a fresh process now and then: image libraries keep what they once took


def prepare_all(
    jobs: Sequence[PatientJob], means: Means, limits: Limits, watcher: Watcher | None = None
) -> list[PatientResult]:
    """Results in the order of the jobs, from `limits.workers` processes; 0 works in this process, without bounds.

    Raises TemporaryStop DISK_FULL, ConfigError E_UNSUPPORTED and ModelError E_WEIGHTS, which end the run, and whatever
    interrupts this process; in each case no worker is left behind.
    """
    if limits.workers == 0:
        results = []
        for job in jobs:
            results.append(prepare_job(job, means, _teller(watcher, job.pseudonym)))
            if watcher is not None:
                watcher.patient(results[-1])
        return results
    pool = _Pool(means, limits, watcher)
    try:
        with _one_thread_each():
            pool.run(jobs)
    finally:
        pool.close()
    return [pool.done[job.pseudonym] for job in jobs]


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    ready: bool = False
    job: PatientJob | None = None
    step: StepInHand | None = None
    since: float = 0.0  # when the scan in hand was begun
    step_since: float = 0.0
    jobs_taken: int = 0
    killed_for: str = ""  # the code with which the pool stopped it


@dataclass
class _Pool:
    means: Means
    limits: Limits
    watcher: Watcher | None
    done: dict[str, PatientResult] = field(default_factory=dict)
    workers: list[_Worker] = field(default_factory=list)
    queue: deque[PatientJob] = field(default_factory=deque)
    alone: deque[PatientJob] = field(default_factory=deque)
    tried_alone: set[tuple[str, int]] = field(default_factory=set)
    stillborn: int = 0

    def run(self, jobs: Sequence[PatientJob]) -> None:
        """Until every job has its result."""
        self.queue.extend(jobs)
        while len(self.done) < len(jobs):
            self._hand_out()
            watched: list[object] = [w.pipe for w in self.workers]
            watched += [w.process.sentinel for w in self.workers]
            wait(watched, timeout=_TICK_S)  # type: ignore[arg-type]
            for worker in list(self.workers):
                self._listen(worker)
            self._hold_to_limits()

    def close(self) -> None:
        """End all workers at once: what they had begun is made again by the next run."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
        self.workers.clear()

    def _hand_out(self) -> None:
        """Give jobs to idle workers; a patient that is tried alone waits until nobody else works."""
        busy = sum(w.job is not None for w in self.workers)
        if self.queue:
            wanted, source = min(self.limits.workers, busy + len(self.queue)), self.queue
        elif self.alone and not busy:
            wanted, source = 1, self.alone
            for idle in self.workers[1:]:
                self._retire(idle)
        else:
            return
        while len(self.workers) < wanted:
            self.workers.append(self._new_worker())
        for worker in [w for w in self.workers if w.ready and w.job is None]:
            if not source or (source is self.alone and any(w.job for w in self.workers)):
                return
            worker.job = source.popleft()
            worker.step, worker.since = None, time.monotonic()
            with contextlib.suppress(OSError):  # it died meanwhile; its sentinel tells
                worker.pipe.send(worker.job)

    def _new_worker(self) -> _Worker:
        context = multiprocessing.get_context("spawn")  # the caller may hold threads that a fork would copy
        ours, theirs = context.Pipe()
        process = context.Process(target=worker_main, args=(theirs, self.means), daemon=True)
        # Ctrl-C at the terminal reaches the whole group, also a process that cannot ignore it yet. The helper that
        # multiprocessing starts by itself goes first: its start would end the blocking.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return _Worker(process, ours)

    def _listen(self, worker: _Worker) -> None:
        try:
            while worker.pipe.poll():
                self._take(worker, worker.pipe.recv())
        except (EOFError, OSError):
            worker.process.join()
        if worker.process.exitcode is not None and worker in self.workers:
            self._bury(worker)

    def _take(self, worker: _Worker, message: Message) -> None:
        if isinstance(message, Ready):
            worker.ready, self.stillborn = True, 0
        elif isinstance(message, Stop):
            raise _raised(message)
        elif isinstance(message, StepInHand):
            if worker.step is None or worker.step.scan.index != message.scan.index:
                worker.since = time.monotonic()
            worker.step, worker.step_since = message, time.monotonic()
            if self.watcher is not None and worker.job is not None:
                self.watcher.step(worker.job.pseudonym, message)
        elif worker.job is not None:
            self._note(worker.job, message)
            worker.job, worker.step = None, None
            worker.jobs_taken += 1
            if worker.jobs_taken >= self.limits.jobs_a_process:
                self._retire(worker)

    def _note(self, job: PatientJob, result: PatientResult) -> None:
        """Keep a result; a scan for which memory was too little beside others gets one try alone."""
        short = {s.index for s in result.scans if s.code == _OUT_OF_MEMORY and not s.reused}
        again = {i for i in short if (job.pseudonym, i) not in self.tried_alone}
        if again and self.limits.workers > 1:
            self.tried_alone |= {(job.pseudonym, i) for i in again}
            self.alone.append(replace(job, retry=frozenset(again)))
            return
        self.done[job.pseudonym] = result
        if self.watcher is not None:
            self.watcher.patient(result)

    def _bury(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.pipe.close()
        if worker.job is None:
            self._count_stillborn(worker)
            return
        if worker.step is None:  # before its first step: nothing of the patient's was touched
            self._count_stillborn(worker)
            self.queue.appendleft(worker.job)
            return
        job, step = worker.job, worker.step
        died_of_memory = worker.process.exitcode == -signal.SIGKILL  # by the system, or by us
        code = worker.killed_for or (_OUT_OF_MEMORY if died_of_memory else "E_CRASH")
        if code == _OUT_OF_MEMORY and (job.pseudonym, step.scan.index) not in self.tried_alone:
            self.tried_alone.add((job.pseudonym, step.scan.index))
            self.alone.append(job)
            return
        record_failure(step, self.means.profile, self.means.prep / job.pseudonym, code)
        self.queue.appendleft(replace(job, retry=job.retry - {step.scan.index}))

    def _count_stillborn(self, worker: _Worker) -> None:
        """Workers that cannot even start would be started for ever."""
        self.stillborn += 1
        if self.stillborn > 3:
            raise FourdvqError("E_INTERNAL", where="a worker process", found=f"exit code {worker.process.exitcode}")

    def _retire(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        with contextlib.suppress(OSError):
            worker.pipe.send(None)
        worker.process.join(timeout=10)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()

    def _hold_to_limits(self) -> None:
        """Stop who takes too long, or the largest if all take too much; a scan must be in hand to answer for it."""
        now = time.monotonic()
        busy = [w for w in self.workers if w.job is not None and w.step is not None and not w.killed_for]
        for worker in busy:
            reading = worker.step is not None and worker.step.name == "read"
            too_long = reading and now - worker.step_since > self.limits.read_seconds
            if too_long or now - worker.since > self.limits.scan_seconds:
                self._stop(worker, "E_SLOW")
        if self.limits.memory:
            used = {w.process.pid: resident(w.process.pid or 0) for w in self.workers}
            if sum(used.values()) > self.limits.memory and busy:
                self._stop(max(busy, key=lambda w: used[w.process.pid]), _OUT_OF_MEMORY)

    @staticmethod
    def _stop(worker: _Worker, code: str) -> None:
        worker.killed_for = code
        worker.process.kill()


def _raised(stop: Stop) -> FourdvqError:
    kind = getattr(errors, stop.kind, FourdvqError)
    error: FourdvqError = kind(stop.code, where=stop.where, found=stop.found, wanted=stop.wanted, fix=stop.fix)
    return error


def _teller(watcher: Watcher | None, pseudonym: str) -> Callable[[StepInHand], None] | None:
    return None if watcher is None else lambda step: watcher.step(pseudonym, step)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started meanwhile use one thread each: patients side by side are faster than threads inside one."""
    before = {name: os.environ.get(name) for name in THREAD_LIMITS}
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
