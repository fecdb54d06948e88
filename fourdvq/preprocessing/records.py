"""Step records: what was made from what, under which key, and whether it is still there and undamaged.

    prep/<pseudonym>/<index>/hu.npy  mask.npy  qc.png  qc.jpg  qc.json  step.json
    prep/<pseudonym>/<index>/lung.bin  lung.json       the lung mask on the scan's own grid, kept for the next step
    prep/<pseudonym>/<index>/damaged                   there if a check found other bytes than were written

`step.json` is written last and removed first, so a folder with one is complete; it holds size and sha256 of every other
file, and its own. A scan that could not be made has a record too, without files. No clock, path, date or id is in it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fourdvq import __version__
from fourdvq.config import sha256_of, to_plain
from fourdvq.data.files import file_sha256, json_bytes, write_atomic
from fourdvq.preprocessing.plugged_in import backend_version
from fourdvq.preprocessing.profile import Profile, profile_to_plain

if TYPE_CHECKING:
    import numpy as np

FORMAT = 3
PICTURE, SMALL_PICTURE = "qc.png", "qc.jpg"
Status = Literal["ok", "review", "refused", "failed"]
DAMAGED = "damaged"
NUMBERS = "qc.json"
_SELF = "record_sha256"
_OUTPUTS = ("hu.npy", "mask.npy", PICTURE, SMALL_PICTURE)


@dataclass(frozen=True)
class Keys:
    """What a scan's folder is made from: all of it (`output`), and the same whatever the baseline (`recipe`).

    Empty keys never fit, so that a scan recorded under them is tried again by itself.
    """

    output: str = ""
    recipe: str = ""


@dataclass(frozen=True)
class ScanResult:
    """What became of one scan. `detail` is for people at the site; it names no path."""

    index: int
    days: int
    status: Status
    code: str
    grade: str
    qc: dict[str, Any] = field(default_factory=dict)
    content_sha256: str = ""
    baseline: int | None = None
    codes: tuple[str, ...] = ()
    reused: bool = False
    detail: str = ""


@dataclass(frozen=True)
class PatientResult:
    """What became of a patient's scans, in time order."""

    pseudonym: str
    scans: tuple[ScanResult, ...]


def segment_key(source_sha256: str, profile: Profile) -> str:
    """Identity of a scan's lung mask: of what is read, how gaps and tilt are mended, and how the lung is found."""
    versions, limits = profile.step_versions, profile.limits
    mended = [limits.fill_single_gap, limits.tilt]
    parts = [source_sha256, "segment", versions.intake, versions.segment, mended, profile.segmentation]
    return sha256_of([to_plain(p) for p in parts])


def read_key(source_sha256: str, profile: Profile) -> str:
    """Identity of a scan as read, segmented and checked."""
    return sha256_of([segment_key(source_sha256, profile), "read", to_plain(profile.limits)])


def output_key(scan_key: str, profile: Profile, baseline_key: str | None) -> str:
    """Identity of a scan on the target grid: of a baseline (`baseline_key` None), or of a follow-up on its baseline."""
    versions = profile.step_versions
    parts: list[Any] = [scan_key, "resample", versions.resample, profile.grid, profile.fov, profile.resample]
    if baseline_key is not None:
        parts += [baseline_key, "register", *_registered_by(profile), profile.outside_lung]
    return sha256_of([to_plain(p) for p in parts])


def recipe_key(scan_key: str, profile: Profile) -> str:
    """Identity of a scan and of everything in the profile that makes its voxels, whatever its baseline.

    A person who leaves a scan out means this: it holds when another baseline takes over, and lapses with a new export.
    """
    making = [profile.grid, profile.fov, profile.resample, *_registered_by(profile), profile.outside_lung]
    parts = [scan_key, "recipe", profile.step_versions.resample, *making]
    return sha256_of([to_plain(p) for p in parts])


def _registered_by(profile: Profile) -> list[Any]:
    """What makes the alignment: its version, its numbers, and which package it is of if it is none of ours."""
    plugin = backend_version(profile.registration.backend)
    return [profile.step_versions.register, profile.registration, *([plugin] if plugin else [])]


def read_record(folder: Path) -> dict[str, Any] | None:
    """The step record of a scan folder, or None if there is none that can be trusted."""
    try:
        record = json.loads((folder / "step.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return None
    return record if record.pop(_SELF, "") == _digest(record) else None


def is_intact(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the files that a record promises are there with their sizes, and nobody found them damaged.

    The bytes of the large ones are looked at by `damaged`; those of the numbers, which every run reads, here.
    """
    if (folder / DAMAGED).exists():
        return False
    try:
        sizes = all((folder / name).stat().st_size == file["size"] for name, file in record["files"].items())
    except OSError:
        return False
    return sizes and _file_sha256(folder / NUMBERS) == record["files"][NUMBERS]["sha256"]


def damaged(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Names of the promised files whose bytes are not those that were written. Reads all of them."""
    return [name for name, file in record["files"].items() if _file_sha256(folder / name) != file["sha256"]]


def read_qc(folder: Path) -> dict[str, Any]:
    """The numbers of a scan; empty if there are none."""
    try:
        qc = json.loads((folder / NUMBERS).read_bytes())
    except (OSError, ValueError):
        return {}
    return qc if isinstance(qc, dict) else {}


def write_outputs(folder: Path, hu: np.ndarray, mask: np.ndarray, pictures: tuple[bytes, bytes]) -> dict[str, Any]:
    """Write the arrays and both pictures; returns the part of the record that describes them."""
    import numpy as np

    (folder / "step.json").unlink(missing_ok=True)
    packed = np.packbits(mask)
    contents = (_npy(hu), _npy(packed), *pictures)
    files = {}
    for name, data in zip(_OUTPUTS, contents, strict=True):
        write_atomic(folder / name, data)
        files[name] = _described(data)
    digest = hashlib.sha256(np.ascontiguousarray(hu).data)
    digest.update(packed.data)
    return {"content_sha256": digest.hexdigest(), "files": files}


def write_record(folder: Path, record: Mapping[str, Any], qc: Mapping[str, Any]) -> None:
    """Write qc.json, then step.json, which makes the folder complete."""
    numbers = json_bytes(qc)
    write_atomic(folder / NUMBERS, numbers)
    complete = {**record, "files": {**record.get("files", {}), NUMBERS: _described(numbers)}}
    rewrite_record(folder, complete)
    (folder / DAMAGED).unlink(missing_ok=True)


def rewrite_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write step.json alone, for what does not change a file."""
    write_atomic(folder / "step.json", json_bytes({**record, _SELF: _digest(record)}))


def new_record(
    profile: Profile, pseudonym: str, *, index: int, days: int, keys: Keys, baseline: int | None
) -> dict[str, Any]:
    """What every record says, whatever became of the scan."""
    return {
        "format": FORMAT,
        "key": keys.output,
        "recipe_sha256": keys.recipe,
        "pseudonym": pseudonym,
        "index": index,
        "days": days,
        "baseline": index if baseline is None else baseline,
        "profile_sha256": profile.sha256,
        "profile": profile_to_plain(profile),
        "versions": {"fourdvq": __version__},
    }


def write_without_outputs(
    folder: Path,
    record: Mapping[str, Any],
    status: Literal["refused", "failed"],
    codes: Sequence[str],
    *,
    facts: Mapping[str, Any] | None = None,
    detail: str = "",
) -> ScanResult:
    """Record a scan that gives nothing, so that the next run knows the answer; files of an earlier run would be stale.

    `facts` are the numbers that were measured on the scan before it was refused, if any; `detail` says what was found.
    """
    for name in ("step.json", *_OUTPUTS):
        (folder / name).unlink(missing_ok=True)
    qc = {"scan": facts, "pair": None, "grade": "", "codes": list(codes), "detail": detail}
    outcome = {"status": status, "code": shown_code(codes), "codes": list(codes), "grade": "", "content_sha256": ""}
    complete = {**record, **outcome, "files": {}}
    write_record(folder, complete, qc)
    return result_of(folder, complete, reused=False)


def forget(folder: Path, *, mask: bool = False) -> None:
    """Have a scan made again by the next run; its arrays stay until then. `mask`: find the lung again too."""
    (folder / "step.json").unlink(missing_ok=True)
    if mask:
        (folder / "lung.json").unlink(missing_ok=True)


def result_of(folder: Path, record: Mapping[str, Any], *, reused: bool) -> ScanResult:
    """The result that a record stands for."""
    qc = read_qc(folder)
    return ScanResult(
        index=record["index"],
        days=record["days"],
        status=record["status"],
        code=record["code"],
        grade=record["grade"],
        qc=qc,
        content_sha256=record["content_sha256"],
        baseline=record["baseline"],
        codes=tuple(record["codes"]),
        reused=reused,
        detail=qc.get("detail", ""),
    )


def records(prep: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and record of every scan whose files are there, by pseudonym and folder name."""
    for path in sorted(prep.glob("*/*/step.json")):
        record = read_record(path.parent)
        if record is not None and is_intact(path.parent, record):
            yield path.parent, record


def shown_code(codes: Sequence[str]) -> str:
    """The one code that a table shows: the gravest; a code of the wire such as OUT_OF_MEMORY stands alone."""
    return next((c for kind in ("E_", "V_", "W_", "") for c in codes if c.startswith(kind)), "")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a run that was killed; only for a folder that nobody else writes to."""
    for path in folder.glob(".tmp-*"):
        path.unlink(missing_ok=True)


def _file_sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return ""


def _described(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _npy(array: np.ndarray) -> bytes:
    """The .npy form in memory: numpy's own writing to a full disk loses the reason."""
    import numpy as np

    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
