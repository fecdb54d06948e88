"""Runs of preparation: resume over 700 scans, verification against plain hashing, loader, encoder, killed runs.

`figures` is called by tests/benchmarks/preprocessing.py. A few scans are really prepared; the others are copies whose
source differs in a voxel, with keys and records of their own. CPU seconds are user and system time of all processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _common import REPOSITORY, clock, cpu_seconds, figure, quartiles  # type: ignore[import-not-found]

from fourdvq.data.datasets import ScanDataset, open_prepared
from fourdvq.data.review import decide
from fourdvq.data.volume import Volume, write_nifti
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.plan import ModelSpec
from fourdvq.preprocessing.inputs import ScanInput, source_key
from fourdvq.preprocessing.manifest import verify, write_manifest
from fourdvq.preprocessing.pipeline import prepare_patient
from fourdvq.preprocessing.profile import Profile, profile_from
from fourdvq.preprocessing.records import output_key, read_key, read_record, rewrite_record
from fourdvq_client import embedded
from fourdvq_client.site_secret import real_ids
from fourdvq_client.workspace import open_workspace
from site_cases import hospital, new_site, tiny_profile
from synthetic_lungs import chest

SCANS_A_PATIENT = 3
REPEATS = 7
KILL_TEST = "tests/unit/test_preparation_kill.py"


def figures(quick: bool) -> list[dict[str, Any]]:
    """All figures of this file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prep = real_grid(folder / "grid", 6 if quick else 24)
        found = [_resume(folder / "site", 20 if quick else 234), _verified(prep), *_loader(prep)]
    return [*found, _encoder("demo", (32, 48, 48)), _encoder("tiny", (16, 32, 32)), _killed(quick)]


def finished_site(folder: Path, patients: int) -> Path:
    """A site of so many patients of three scans each, all prepared: two of them really."""
    names = tuple(f"LEU-{n:06d}" for n in range(patients))
    data = hospital(folder / "data", patients=names[:2], scans=SCANS_A_PATIENT)
    _more_patients(data, names)
    root = new_site(folder / "site", data)
    tables = [data / "clinical.csv", data / "scans.csv"]
    full = [t.read_text() for t in tables]
    for table, text in zip(tables, full, strict=True):
        lines = text.splitlines()
        table.write_text("\n".join([lines[0], *(x for x in lines if x.startswith(names[:2]))]) + "\n")
    embedded.preprocess(root)
    for table, text in zip(tables, full, strict=True):
        table.write_text(text)
    _copied_records(root, data, names)
    return root


def _more_patients(data: Path, names: tuple[str, ...]) -> None:
    """Files and rows of the other patients: the first one's, with another voxel in each scan."""
    for table, per_patient in ((data / "clinical.csv", 1), (data / "scans.csv", SCANS_A_PATIENT)):
        lines = table.read_text().splitlines()
        rows = [row.replace(names[0], name) for name in names[2:] for row in lines[1 : 1 + per_patient]]
        table.write_text("\n".join([*lines, *rows]) + "\n")
    for p, name in enumerate(names[2:]):
        for s in range(SCANS_A_PATIENT):
            volume, mask = chest((20, 32, 32), seed=0, noise=10 + s)
            volume.hu.flat[p] = 3000 - s
            path = data / "scans" / name / f"{s}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_nifti(volume, path)
            write_nifti(mask, path.with_name(f"{s}_lung.nii.gz"))


def _copied_records(root: Path, data: Path, names: tuple[str, ...]) -> None:
    from fourdvq.data.cohort import pseudonym

    workspace, _ = open_workspace(root)
    profile, secret = profile_from(tiny_profile()), workspace.secret.read_bytes()
    first = workspace.prep / pseudonym(secret, names[0])
    for name in names[2:]:
        scans = data / "scans" / name
        inputs = [
            ScanInput(s, 200 * s, scans / f"{s}.nii.gz", scans / f"{s}_lung.nii.gz") for s in range(SCANS_A_PATIENT)
        ]
        copy_patient(first, workspace.prep / pseudonym(secret, name), inputs, profile)
    if len(real_ids(workspace)) != 2:
        raise RuntimeError("two patients should have been prepared")


def copy_patient(first: Path, copy: Path, inputs: list[ScanInput], profile: Profile) -> None:
    """A prepared patient's folder under another name, with the records that preparing `inputs` would have left."""
    shutil.copytree(first, copy)
    base = read_key(source_key(inputs[0]), profile)
    for scan in inputs:
        folder = copy / str(scan.index)
        record = read_record(folder)
        if record is None:
            raise RuntimeError("a record is missing")
        key = read_key(source_key(scan), profile)
        record |= {"pseudonym": copy.name, "key": output_key(key, profile, base if scan.index else None)}
        rewrite_record(folder, record)


def real_grid(folder: Path, scans: int) -> Path:
    """A prep folder of `scans` scans of 96 x 256 x 256 voxels, approved: one prepared, the others copies of it."""
    plain = tiny_profile() | {"grid": {"depth": 96, "height": 256, "width": 256}}
    folder.mkdir(parents=True)
    for name, volume in zip(("a", "a_lung"), chest((40, 48, 48)), strict=True):
        write_nifti(Volume(volume.hu, volume.spacing, volume.origin), folder / f"{name}.nii.gz")
    scan = ScanInput(0, 0, folder / "a.nii.gz", folder / "a_lung.nii.gz")
    prep = folder / "prep"
    prepare_patient([scan], profile_from(plain), prep, pseudonym=f"{0:012x}")
    for n in range(1, scans):
        copy_patient(prep / f"{0:012x}", prep / f"{n:012x}", [scan], profile_from(plain))
    write_manifest(prep)
    decide(prep, None, "demo", reviewer="benchmark", time="2026-01-01T00:00:00Z")
    lines = [f"{n:012x},train" for n in range(scans)]
    (prep / "splits.csv").write_text("\n".join(["pseudonym,split", *lines]) + "\n")
    return prep


def _resume(folder: Path, patients: int) -> dict[str, Any]:
    started = clock()
    root = finished_site(folder, patients)
    program = Path(sys.executable).with_name("fourdvq-client")
    words = [program, "--workdir", root, "--json", "preprocess"]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    scans = patients * SCANS_A_PATIENT
    if (found["scans"], found["reused"]) != (scans, scans):
        raise RuntimeError(f"{found['reused']} of {found['scans']} scans were known, {scans} should be")
    walls: list[float] = []

    def run() -> None:
        before = clock()
        subprocess.run(words, capture_output=True, check=True)
        walls.append(clock() - before)

    low, middle, high = quartiles(cpu_seconds(run, REPEATS))
    note = f"{patients} patients, the command with its start; wall {quartiles(walls)[1]:.2f} s on a machine in use"
    if patients < 234:
        note += "; 700 scans in full mode"
    holds = high <= 5 if scans >= 700 else None
    return figure(
        f"resume over {scans} finished scans", middle, "CPU s", target="<= 5", holds=holds, n=REPEATS,
        spread=(low, high), seconds=clock() - started, note=note,
    )  # fmt: skip


def _verified(prep: Path) -> dict[str, Any]:
    """Speed of --verify over that of hashing the same files one after the other, interleaved."""
    started = clock()
    files = [p for p in sorted(prep.glob("*/*/*")) if p.name != "step.json"]
    names = sorted(p.name for p in prep.iterdir() if p.is_dir())
    megabytes = sum(p.stat().st_size for p in files) / 1e6

    def plain() -> None:
        for path in files:
            with path.open("rb") as stream:
                hashlib.file_digest(stream, "sha256")

    def verified() -> None:
        if any(damaged for damaged in verify(prep, names)):
            raise RuntimeError("nothing was damaged")

    plain()
    ratios, speeds = [], []
    for _ in range(REPEATS):
        reference, ours = _seconds(plain), _seconds(verified)
        ratios.append(reference / ours)
        speeds.append(megabytes / ours)
    low, middle, high = quartiles(ratios)
    return figure(
        "speed of --verify over plain sha256", middle, "ratio", target=">= 0.7", holds=low >= 0.7, n=REPEATS,
        spread=(low, high), seconds=clock() - started,
        note=f"{len(names)} scans of 96x256x256, {megabytes:.0f} MB, {quartiles(speeds)[1]:.0f} MB a CPU s",
    )  # fmt: skip


def _loader(prep: Path) -> list[dict[str, Any]]:
    scans = open_prepared(prep).scans("train")
    window = profile_from(tiny_profile()).window_hu
    kept = ScanDataset(scans, window)
    for i in range(len(kept)):
        kept[i]
    mapped = ScanDataset(scans, window, cache=False)
    named = (("from the files, memory-mapped", mapped), ("kept in memory", kept))
    return [_rate(f"loader, 96x256x256 as float32 in [0, 1], {name}", data, 10.0) for name, data in named]


def _rate(name: str, data: ScanDataset, target: float) -> dict[str, Any]:
    started = clock()

    def once() -> None:
        for i in range(len(data)):
            data[i]

    low, middle, high = quartiles([len(data) / _seconds(once) for _ in range(REPEATS)])
    return figure(
        name, middle, "volumes a CPU s", target=f">= {target:g}", holds=low >= target, n=REPEATS, spread=(low, high),
        seconds=clock() - started, note=f"{len(data)} scans, one thread, files in the system's cache",
    )  # fmt: skip


def _encoder(preset: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Scans a second from HU on disk's scale to code indices, one thread."""
    import yaml

    from fourdvq.config import build

    started = clock()
    text = (REPOSITORY / "configs" / "model" / f"{preset}.yaml").read_text(encoding="utf-8")
    spec = build(ModelSpec, yaml.safe_load(text))
    torch.manual_seed(0)
    model = VQGAN3d(spec).eval()
    x = torch.rand(1, 1, *size) - 0.5

    @torch.inference_mode()
    def encode() -> None:
        model.quantise(model.encode(x))

    encode()
    low, middle, high = quartiles([10 / _seconds(lambda: [encode() for _ in range(10)]) for _ in range(REPEATS)])
    shape = "x".join(map(str, size))
    return figure(
        f"encode, model preset {preset}, {shape}", middle, "scans a CPU s", n=REPEATS, spread=(low, high),
        seconds=clock() - started, note="no target given; untrained weights, one thread",
    )  # fmt: skip


def _seconds(fn: Callable[[], object]) -> float:
    """CPU seconds of this process: finer than what is counted with finished children."""
    before = time.process_time()
    fn()
    return time.process_time() - before


def _killed(quick: bool) -> dict[str, Any]:
    name, target = "run killed at ten random moments and started again: equal to one without", "equal"
    if quick:
        return figure(name, None, "equal", target=target, note=f"full mode only: pytest -m slow {KILL_TEST}")
    started = clock()
    words = [sys.executable, "-m", "pytest", "-q", "-m", "slow", KILL_TEST]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    holds = done.returncode == 0
    return figure(
        name, float(holds), "equal", target=target, holds=holds, n=10, seconds=clock() - started,
        note="bytes of all outputs, manifest, splits, decisions (without time) and contact sheet; SIGKILL to the group",
    )  # fmt: skip
