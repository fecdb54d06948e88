"""Prepare patients side by side, each in a process of its own pool, so that one bad file takes down nothing else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from fourdvq.errors import TemporaryStop
from fourdvq.preprocessing.pipeline import PatientResult, ScanInput, ScanResult, prepare_patient
from fourdvq.preprocessing.profile import Profile

_THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
_TASKS_A_PROCESS = 20  # a fresh process now and then: image libraries keep what they once took


@dataclass(frozen=True)
class PatientJob:
    """One patient's scans, and the indices a person rejected."""

    pseudonym: str
    scans: tuple[ScanInput, ...]
    excluded: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Answer:
    """A result, or the code of what stops the whole run: errors of ours do not survive being sent between processes."""

    result: PatientResult | None
    stop: str = ""
    where: str = ""


def prepare_all(
    jobs: Sequence[PatientJob],
    profile: Profile,
    prep: Path,
    *,
    workers: int,
    retry_failed: bool,
    progress: Callable[[int, int], None] | None = None,
) -> list[PatientResult]:
    """Results in the order of the jobs. One worker works in this process.

    A worker that dies (memory, a broken decoder) costs its patient only: who was not done is tried again alone, and
    who dies alone becomes a failed result. Raises TemporaryStop DISK_FULL.
    """
    done: dict[str, PatientResult] = {}

    def note(result: PatientResult) -> None:
        done[result.pseudonym] = result
        if progress is not None:
            progress(len(done), len(jobs))

    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            note(_unpacked(_prepare(job, profile, prep, retry_failed)))
    else:
        _side_by_side(jobs, profile, prep, workers, retry_failed, note)
        for job in (j for j in jobs if j.pseudonym not in done):
            note(_alone(job, profile, prep, retry_failed))
    return [done[job.pseudonym] for job in jobs]


def _side_by_side(
    jobs: Sequence[PatientJob],
    profile: Profile,
    prep: Path,
    workers: int,
    retry_failed: bool,
    note: Callable[[PatientResult], None],
) -> None:
    with _one_thread_each(), _pool(min(workers, len(jobs))) as pool:
        waiting = [pool.submit(_prepare, job, profile, prep, retry_failed) for job in jobs]
        try:
            for future in as_completed(waiting):
                note(_unpacked(future.result()))
        except BrokenProcessPool:
            return
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _alone(job: PatientJob, profile: Profile, prep: Path, retry_failed: bool) -> PatientResult:
    with _one_thread_each(), _pool(1) as pool:
        try:
            return _unpacked(pool.submit(_prepare, job, profile, prep, retry_failed).result())
        except BrokenProcessPool:
            rows = tuple(
                ScanResult(s.index, s.days, "failed", "OUT_OF_MEMORY", "", detail="the worker died on this patient")
                for s in job.scans
            )
            return PatientResult(job.pseudonym, rows)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: the caller may hold threads that a fork would copy in an undefined state.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=_TASKS_A_PROCESS)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started meanwhile use one thread each: patients side by side are faster than threads inside one."""
    before = {name: os.environ.get(name) for name in _THREAD_LIMITS}
    os.environ.update(dict.fromkeys(_THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _prepare(job: PatientJob, profile: Profile, prep: Path, retry_failed: bool) -> _Answer:
    try:
        result = prepare_patient(
            job.scans,
            profile,
            prep,
            pseudonym=job.pseudonym,
            excluded=job.excluded,
            retry_failed=retry_failed,
        )
    except TemporaryStop as stop:
        return _Answer(None, stop.code, stop.where)
    return _Answer(result)


def _unpacked(answer: _Answer) -> PatientResult:
    if answer.result is None:
        raise TemporaryStop(answer.stop, where=answer.where)
    return answer.result
