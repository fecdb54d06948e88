"""The site's key: made here, kept here. What leaves is its public half, in a request that the private half signs.

Elliptic curve P-384 in OpenSSH format, mode 0600. One process per key: two would fight for the same messages, so the
process that uses a key holds a lock file beside it, which names the process.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fourdvq.errors import FourdvqError, Refused
from fourdvq.wire.invitation import SiteRequest

_FORGET_AFTER_S = 900.0  # refusals further apart than this belong to different stories


@dataclass(frozen=True)
class SiteKey:
    """A key pair. `public_pem` is the form Flower registers, `public_line` the OpenSSH line people send."""

    private: ec.EllipticCurvePrivateKey

    @property
    def public_pem(self) -> bytes:
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        return self.private.public_key().public_bytes(encoding, form)

    @property
    def public_line(self) -> str:
        encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        return self.private.public_key().public_bytes(encoding, form).decode()

    @property
    def fingerprint(self) -> str:
        """SHA256:... as `ssh-keygen -l` prints it."""
        return line_fingerprint(self.public_line)


def create_site_key(path: Path) -> SiteKey:
    """Make a key pair: `path` (mode 0600) and `path` with suffix .pub. Refused E_EXISTS rather than replace a key."""
    if path.exists():
        raise Refused(
            "E_EXISTS",
            where=str(path),
            found="a key",
            fix="use it, or make another site folder with `fourdvq-client init`",
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    made = SiteKey(key)
    path.with_suffix(".pub").write_text(made.public_line + "\n", encoding="ascii")
    return made


def load_site_key(path: Path) -> SiteKey:
    """Read the key. Refused E_KEY_FILE if it is missing, readable by others, damaged or not an elliptic-curve key."""
    if not path.is_file():
        raise Refused("E_KEY_FILE", where=str(path), found="no file")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise Refused("E_KEY_FILE", where=str(path), found=f"mode {mode:04o}", fix=f"chmod 600 {path}")
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Refused("E_KEY_FILE", where=str(path), found=type(error).__name__) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Refused("E_KEY_FILE", where=str(path), found=type(key).__name__)
    return SiteKey(key)


def make_request(key: SiteKey, *, federation: str, site: str) -> SiteRequest:
    """What the site sends back to the coordinator."""
    request = SiteRequest(federation, site, public_key=key.public_line, fingerprint=key.fingerprint)
    signature = key.private.sign(request.signed_bytes(), ec.ECDSA(hashes.SHA256()))
    return replace(request, signature=base64.b64encode(signature).decode())


def line_fingerprint(public_line: str) -> str:
    """The fingerprint of an OpenSSH public key line, as `ssh-keygen -l` prints it."""
    blob = base64.b64decode(public_line.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


class KeyLock:
    """Hold `<key>.lock` while a process uses the key. Refused E_BUSY names the process that has it."""

    def __init__(self, key_file: Path) -> None:
        self._path = lock_file(key_file)
        self._refused = key_file.with_name(key_file.name + ".refused")
        self._file: IO[str] | None = None

    def __enter__(self) -> KeyLock:
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise _busy(self._path) from None
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        self._file = file
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            # The file stays: removing it would let two processes lock two different files of this name.
            self._file.truncate(0)
            self._file.close()

    def note_refusal(self) -> float:
        """Remember, over restarts, since when the coordinator has refused this key; returns the seconds since then."""
        now = time.time()
        first, last = now, now
        with contextlib.suppress(OSError, ValueError, KeyError):
            before = json.loads(self._refused.read_text())
            if 0 <= now - before["last"] < _FORGET_AFTER_S:
                first = before["first"]
        self._refused.write_text(json.dumps({"first": first, "last": last}))
        return max(0.0, now - first)

    def forget_refusal(self) -> None:
        self._refused.unlink(missing_ok=True)


def lock_file(key_file: Path) -> Path:
    return key_file.with_name(key_file.name + ".lock")


def lock_holder(key_file: Path) -> dict[str, Any] | None:
    """Host and pid of the process that uses the key at this moment, or None."""
    path = lock_file(key_file)
    try:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return _holder(path)
    except OSError:
        return None
    return None


def _holder(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"host": str(found["host"]), "pid": int(found["pid"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"host": "?", "pid": 0}


def _busy(path: Path) -> FourdvqError:
    holder = _holder(path)
    return Refused("E_BUSY", where=str(path), found=f"process {holder['pid']} on {holder['host']}")
