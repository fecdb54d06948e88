"""The site's file of segmentation weights: fetched once, or taken from a file, and kept only if its sha256 is right.

A download that broke goes on where it stopped: what came lies beside the target under a name of its own, and becomes
the target, by a rename, once its hash is that of the federation's profile. Any other file is deleted.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from fourdvq import __version__
from fourdvq.data.files import file_sha256
from fourdvq.errors import ConfigError, ConnectionFailed, ModelError, TemporaryStop

# Where the authors of lungmask published the network's weights.
PUBLISHED = {"lungmask_r231": "https://github.com/JoHof/lungmask/releases/download/v0.0/unet_r231-d5d2fc3d.pth"}
MAX_BYTES = 1 << 30
_BLOCK = 1 << 20
_TIMEOUT_S = 60.0

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all if known


@dataclass(frozen=True)
class Fetched:
    """The file that is there now; `resumed_from` bytes of it came in an earlier run."""

    path: Path
    sha256: str
    bytes: int
    resumed_from: int = 0
    reused: bool = False


def fetch_weights(target: Path, *, sha256: str, source: str, progress: Progress | None = None) -> Fetched:
    """Have `target` hold the bytes with this sha256, from `source`: an http(s) address or a file.

    Nothing is fetched if they are there already. Raises ModelError E_WEIGHTS for other bytes, which are not kept,
    ConfigError E_USAGE or E_FILE for a source that is none, ConnectionFailed E_DOWNLOAD if the server cannot be reached
    or says no, and TemporaryStop E_DOWNLOAD if the connection breaks: the same call goes on from there.
    """
    if target.is_file() and file_sha256(target) == sha256:
        return Fetched(target, sha256, target.stat().st_size, reused=True)
    report = progress or _silent
    target.parent.mkdir(parents=True, exist_ok=True)
    with _partial(target) as (partial, stream):
        if _is_address(source):
            resumed = _download(source, stream, sha256, report)
        else:
            resumed = _copy(Path(source), stream, report)
        stream.flush()
        os.fsync(stream.fileno())
        found = file_sha256(partial)
        if found != sha256:
            partial.unlink()
            fix = "nothing was kept; take the file that the profile names, or ask the coordinator which one it is"
            raise ModelError(
                "E_WEIGHTS", where=source, found=f"sha256 {found}", wanted=f"a file with sha256 {sha256}", fix=fix
            )
        partial.chmod(0o644)
        partial.replace(target)
    return Fetched(target, sha256, target.stat().st_size, resumed_from=resumed)


@contextmanager
def _partial(target: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """The file beside the target that takes the bytes, held by this process alone. Raises TemporaryStop E_BUSY."""
    partial = target.with_name(f".{target.name}.part")
    with partial.open("ab+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TemporaryStop("E_BUSY", where=str(partial), found="another process that fetches it") from None
        try:
            yield partial, stream
        finally:
            if partial.is_file() and partial.stat().st_size == 0:
                partial.unlink()


def _copy(source: Path, stream: IO[bytes], report: Progress) -> int:
    if not source.is_file():
        raise ConfigError("E_FILE", where=str(source), wanted="the weights file")
    stream.truncate(0)
    total = source.stat().st_size
    with source.open("rb") as given:
        while block := given.read(_BLOCK):
            stream.write(block)
            report(given.tell(), total)
    return 0


def _download(url: str, stream: IO[bytes], sha256: str, report: Progress) -> int:
    """Bring the stream to its full length; returns how many of its bytes were there before and could be kept."""
    resumed = _append(url, stream, report)
    if resumed and file_sha256(Path(stream.name)) != sha256:
        # What lay there may have come from another file; the next answer is then of this one alone.
        stream.truncate(0)
        resumed = _append(url, stream, report)
    return resumed


def _append(url: str, stream: IO[bytes], report: Progress) -> int:
    """Ask for what is missing and write it; returns from which byte on. Raises as `fetch_weights` does."""
    have = os.fstat(stream.fileno()).st_size
    headers = {"User-Agent": f"fourdvq-client/{__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as answer:
            if have and not (answer.status == 206 and _starts_at(answer, have)):
                have = 0
                stream.truncate(0)
            return _write(answer, stream, have, url, report)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing, or the file there is another one
            if _total(error.headers.get("Content-Range")) == have:
                return have
            stream.truncate(0)
            return _append(url, stream, report)
        raise ConnectionFailed("E_DOWNLOAD", where=url, found=f"HTTP {error.code}") from None
    except (urllib.error.URLError, ValueError) as error:
        raise ConnectionFailed("E_DOWNLOAD", where=url, found=str(getattr(error, "reason", error))) from None
    except (OSError, http.client.HTTPException) as error:
        stream.flush()
        raise TemporaryStop("E_DOWNLOAD", where=url, found=f"{type(error).__name__}: {error}") from None


def _write(answer: Any, stream: IO[bytes], have: int, url: str, report: Progress) -> int:
    length = answer.headers.get("Content-Length")
    total = have + int(length) if length and length.isdigit() else None
    done = have
    while block := answer.read(_BLOCK):
        done += len(block)
        if done > MAX_BYTES:
            stream.truncate(0)
            wanted = f"at most {MAX_BYTES >> 20} MiB"
            raise ConnectionFailed("E_DOWNLOAD", where=url, found=f"more than {MAX_BYTES >> 20} MiB", wanted=wanted)
        stream.write(block)
        report(done, total)
    stream.flush()
    if total is not None and done < total:
        raise TemporaryStop("E_DOWNLOAD", where=url, found=f"{done} of {total} bytes")
    return have


def _starts_at(answer: Any, have: int) -> bool:
    return str(answer.headers.get("Content-Range", "")).startswith(f"bytes {have}-")


def _total(content_range: str | None) -> int | None:
    """The length in `bytes */123`."""
    text = (content_range or "").rpartition("/")[2]
    return int(text) if text.isdigit() else None


def _is_address(source: str) -> bool:
    scheme = urlsplit(source).scheme
    if "://" in source and scheme not in ("http", "https"):
        raise ConfigError("E_USAGE", where="--from", found=source, wanted="an http or https address, or a file")
    return scheme in ("http", "https")


def _silent(done: int, total: int | None) -> None:
    del done, total
