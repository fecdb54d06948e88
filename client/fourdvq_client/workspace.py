"""The site's folder: where everything lies, what `site.yaml` says, and the lock that keeps two clients out of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from fourdvq.config import build
from fourdvq.errors import ConfigError, FourdvqError, TemporaryStop
from fourdvq.training.hardware import Hardware
from fourdvq_client.yaml_file import read_yaml

if TYPE_CHECKING:
    from fourdvq.preprocessing.profile import Profile

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700


class Holder(TypedDict):
    """A process that has the folder, or a shard of it."""

    pid: int
    host: str


@dataclass(frozen=True)
class Workspace:
    """Names of the files and folders of a site; nothing is created by asking for a name."""

    root: Path

    @property
    def site_yaml(self) -> Path:
        return self.root / "site.yaml"

    @property
    def policy_yaml(self) -> Path:
        return self.root / "policy.yaml"

    @property
    def profile_json(self) -> Path:
        """The federation's preprocessing profile, from the invitation."""
        return self.root / "profile.json"

    @property
    def invitation(self) -> Path:
        return self.root / "invitation.json"

    @property
    def findings(self) -> Path:
        return self.root / "findings.csv"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def private(self) -> Path:
        return self.root / "private"

    @property
    def secret(self) -> Path:
        """32 bytes: pseudonyms and splits are keyed with it; it never leaves."""
        return self.private / "secret"

    @property
    def patients(self) -> Path:
        """The table real id to pseudonym."""
        return self.private / "patients.csv"

    @property
    def headers(self) -> Path:
        """What the headers of the hospital's DICOM files said when they were last read."""
        return self.private / "headers"

    @property
    def prep(self) -> Path:
        return self.root / "prep"

    @property
    def latents(self) -> Path:
        """The encode cache: latents/<tokenizer>/<pseudonym>/."""
        return self.root / "latents"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def generated(self) -> Path:
        return self.root / "generated"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def plans(self) -> Path:
        """Plans the coordinator sent, by hash."""
        return self.state / "plans"

    @property
    def shards(self) -> Path:
        """Lock files of the shards at work, and of the tables that they share."""
        return self.state / "shards"

    def shard_locks(self) -> Iterator[Path]:
        """One file a shard: 3-of-8.lock."""
        return self.shards.glob("*-of-*.lock")

    @property
    def outbox(self) -> Path:
        """What a person put there with `submit`; answers `query.report`."""
        return self.state / "outbox"

    @property
    def audit_file(self) -> Path:
        return self.root / "audit.jsonl"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def folders(self) -> tuple[tuple[Path, int], ...]:
        """Folders that `init` makes, with their modes; keys and the id table are for the owner alone."""
        closed = (self.keys, self.private)
        opened = (self.prep, self.runs, self.models, self.reports, self.generated, self.state, self.logs)
        return tuple((f, PRIVATE_FOLDER) for f in closed) + tuple((f, 0o750) for f in opened)

    def make_folders(self) -> None:
        """Create what is missing, with the right modes."""
        self.root.mkdir(parents=True, exist_ok=True)
        for folder, mode in self.folders():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(mode)


@dataclass(frozen=True)
class SiteConfig:
    """`site.yaml`: what a person at the site edits. Relative paths count from the site folder."""

    site: str
    coordinator: str = ""  # host:port
    scans: Path = Path("scans")
    clinical: Path = Path("clinical.csv")
    scans_csv: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # our name: theirs
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # column: their word: ours
    weights: Path = Path("weights/unet_r231.pth")  # of the lung segmentation, where the profile's method needs them
    device: str = "cpu"
    workers: int = 1
    worker: str = "process"  # where training runs: process or inline
    train: Hardware = field(default_factory=Hardware)  # how this machine trains

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers {self.workers} is below 1")
        if self.worker not in ("process", "inline"):
            raise ValueError(f"worker {self.worker!r} is neither process nor inline")
        if self.device != "cpu" and not self.device.startswith("cuda"):
            raise ValueError(f"device {self.device!r} is neither cpu nor cuda:N")


def open_workspace(root: Path) -> tuple[Workspace, SiteConfig]:
    """The site in folder `root`. Raises ConfigError E_NOT_A_SITE, or what is wrong in site.yaml."""
    workspace = Workspace(root.resolve())
    if not workspace.site_yaml.is_file():
        raise ConfigError("E_NOT_A_SITE", where=str(root), found="no site.yaml")
    return workspace, read_site_config(workspace)


def read_site_config(workspace: Workspace) -> SiteConfig:
    """Read and type `site.yaml`; paths come back absolute."""
    data = read_yaml(workspace.site_yaml)
    config = build(SiteConfig, _coded_values(data), where="site.yaml")
    located = {
        name: _located(workspace.root, getattr(config, name))
        for name in ("scans", "clinical", "scans_csv", "weights")
        if getattr(config, name) is not None
    }
    if "scans_csv" not in located and (workspace.root / "scans.csv").is_file():
        located["scans_csv"] = workspace.root / "scans.csv"
    return SiteConfig(**{**{f: getattr(config, f) for f in config.__dataclass_fields__}, **located})


def read_profile(workspace: Workspace) -> Profile:
    """The federation's profile. Raises ConfigError E_FILE if no invitation brought one, E_KEY or E_TYPE if damaged."""
    from fourdvq.preprocessing.profile import profile_from

    if not workspace.profile_json.is_file():
        raise ConfigError(
            "E_FILE",
            where=str(workspace.profile_json),
            wanted="the federation's preprocessing profile",
            fix="fourdvq-client init INVITATION brings it; or give one with `init --profile FILE`",
        )
    try:
        data = json.loads(workspace.profile_json.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("E_TYPE", where=str(workspace.profile_json), found=str(error), wanted="JSON") from None
    return profile_from(data)


@contextlib.contextmanager
def locked(workspace: Workspace) -> Iterator[None]:
    """Hold the folder for this process. Raises TemporaryStop E_BUSY that names the process which holds it.

    The kernel frees the lock when its holder dies, so a file left behind by a crash locks nobody out.
    """
    sharers = workspace.shard_locks()
    with flocked(workspace.state / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB, where=workspace.root, sharers=sharers):
        yield


@contextlib.contextmanager
def flocked(
    path: Path, how: int, *, where: Path | None = None, hint: str = "", sharers: Iterable[Path] = ()
) -> Iterator[None]:
    """Hold a lock file, `how` as flock takes it; who holds one alone has its pid and host in it for that time.

    Raises TemporaryStop E_BUSY that names the holder, at `where` (else the file), with `hint` added to the remedy.
    Those who share the lock are named by the lock files that each of them holds alone, `sharers`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
    alone = bool(how & fcntl.LOCK_EX)
    try:
        try:
            fcntl.flock(handle, how)
        except OSError:
            alone = False
            raise _busy(_holders(path, sharers), where or path, hint) from None
        if alone:
            _sign(handle)
        yield
    finally:
        if alone:
            # A pid left behind would be named to whoever meets the next, shared lock, and be another program's by then.
            os.ftruncate(handle, 0)
        os.close(handle)


def lock_holders(workspace: Workspace) -> tuple[Holder, ...]:
    """Who holds the folder now: one process all of it, or one for each shard at work; empty if nobody does."""
    return _holders(workspace.state / "lock", workspace.shard_locks())


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE_FILE)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(PRIVATE_FILE)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sign(handle: int) -> None:
    os.ftruncate(handle, 0)
    signature = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    with contextlib.suppress(OSError):  # a full disk costs others the name, not us the lock
        os.pwrite(handle, signature.encode(), 0)


def _busy(holders: Sequence[Holder], where: Path, hint: str) -> FourdvqError:
    who = " and ".join(f"process {h['pid']} on {h['host']}" for h in holders) or "another process"
    return TemporaryStop("E_BUSY", where=str(where), found=who, fix=f"stop {who}, or wait for the end{hint}")


def _holders(path: Path, sharers: Iterable[Path]) -> tuple[Holder, ...]:
    alone = _holder(path)
    return (alone,) if alone else tuple(h for h in map(_holder, sorted(sharers)) if h)


def _holder(path: Path) -> Holder | None:
    """Who holds a lock file alone at this moment; None if nobody does, or nobody that can be named."""
    try:
        with path.open(encoding="utf-8") as stream:
            signed = json.loads(stream.read())
            holder = Holder(pid=int(signed["pid"]), host=str(signed["host"]))
            # A holder that was killed could not take its name away; the kernel frees its lock all the same.
            if _is_free(stream.fileno()):
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return holder if _may_run(holder) else None


def _is_free(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _may_run(holder: Holder) -> bool:
    """False for a process of this host that is gone; of other hosts nothing is known."""
    if holder["host"] != socket.gethostname():
        return True
    try:
        with contextlib.suppress(PermissionError):  # it runs, under another account
            os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    return True


def _coded_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Codes of a table are text for us, whatever YAML made of them: `values: {smoking: {0: never, 1: ever}}`."""
    values = data.get("values")
    if not isinstance(values, Mapping):
        return dict(data)
    return {
        **data,
        "values": {
            column: {k: str(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in words.items()}
            if isinstance(words, Mapping)
            else words
            for column, words in values.items()
        },
    }


def _located(root: Path, path: Path) -> Path:
    return path if path.is_absolute() else root / path
