"""The process that prepares patients for the pool: one at a time, each step announced before it begins."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path

from fourdvq.data.limits import ReaderLimits
from fourdvq.errors import FourdvqError
from fourdvq.os_errors import reading
from fourdvq.preprocessing.pipeline import PatientResult, ScanInput, StepInHand, prepare_patient
from fourdvq.preprocessing.profile import Profile

THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)


@dataclass(frozen=True)
class PatientJob:
    """One patient's scans, the recipes a person rejected, and the indices whose refusal or failure is tried again."""

    pseudonym: str
    scans: tuple[ScanInput, ...]
    rejected: frozenset[str] = frozenset()
    retry: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Means:
    """What a site works with; nothing of it changes a voxel."""

    profile: Profile
    prep: Path
    device: str = "cpu"
    weights: Path | None = None
    readers: ReaderLimits | None = None


@dataclass(frozen=True)
class Ready:
    """The process has started and imported what it needs to take a job."""


@dataclass(frozen=True)
class Stop:
    """An error that ends the whole run: errors of ours do not survive being sent between processes."""

    kind: str
    code: str
    where: str
    found: str
    wanted: str
    fix: str


Message = Ready | StepInHand | PatientResult | Stop


def prepare_job(job: PatientJob, means: Means, say: Callable[[StepInHand], None] | None = None) -> PatientResult:
    """One patient, in this process."""
    return prepare_patient(
        job.scans,
        means.profile,
        means.prep,
        pseudonym=job.pseudonym,
        rejected=job.rejected,
        retry=job.retry,
        device=means.device,
        weights=means.weights,
        readers=means.readers,
        on_step=say,
    )


def worker_main(pipe: Connection, means: Means) -> None:
    """Take jobs from `pipe` until None comes; the pool stops this process, not Ctrl-C at the terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _one_thread()
    pipe.send(Ready())
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if job is None:
            return
        pipe.send(_answer(job, means, pipe))


def _answer(job: PatientJob, means: Means, pipe: Connection) -> PatientResult | Stop:
    try:
        with reading(job.pseudonym):
            return prepare_job(job, means, pipe.send)
    except FourdvqError as error:
        kind = type(error).__name__
        return Stop(kind, error.code, error.where, error.found, error.wanted, error.fix)


def _die_with_parent() -> None:
    """A run that was killed must not go on in its workers: the next run may have the folder by then."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _one_thread() -> None:
    """torch and ITK read their limits in different ways; patients side by side are faster than threads inside one."""
    import SimpleITK as sitk
    import torch

    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
