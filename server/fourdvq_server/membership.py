"""Who belongs to the federation: sites.json, the file that decides, and keeping the SuperLink in step with it.

A site is invited (a file goes out), sends a request (its public key comes back), is approved by a person who compares
fingerprints, and may be revoked. The file is the truth; a running coordinator notices a change within seconds and
registers or shuts out keys accordingly, so that a new database after a loss gets the same sites again.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import fcntl
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fourdvq import __version__
from fourdvq.config import build, to_plain
from fourdvq.errors import ConfigError, FourdvqError, Refused
from fourdvq.training.checkpoint import write_atomic
from fourdvq.wire.invitation import Invitation, SiteRequest
from fourdvq.wire.messages import PROTOCOL, Role
from fourdvq_server.certificates import CertificateFiles, certificate_fingerprint
from fourdvq_server.control import Control
from fourdvq_server.settings import ServerSettings

SITES_FILE = "sites.json"
_SCHEMA = 1
_CURVE = "secp384r1"
Status = Literal["invited", "approved", "revoked"]


@dataclass(frozen=True)
class Member:
    """One site. `public_key` is its OpenSSH line, empty until it is approved; times are UTC, ISO 8601.

    `shut_out` keeps the fingerprints of revoked keys: Flower never registers a key a second time, so neither do we.
    """

    role: Role
    status: Status
    public_key: str = ""
    fingerprint: str = ""
    invited: str = ""
    approved: str = ""
    revoked: str = ""
    shut_out: tuple[str, ...] = ()


def certificate_files(root: Path) -> CertificateFiles:
    """The certificates of the coordinator folder `root`."""
    return CertificateFiles(root / "ca")


def load_members(root: Path) -> dict[str, Member]:
    """All sites ever invited, by name; empty without a file. ConfigError names a damaged entry."""
    path = root / SITES_FILE
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        sites = data["sites"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("E_TYPE", where=str(path), found=type(error).__name__, wanted="the JSON of sites") from None
    return {name: build(Member, entry, where=f"{SITES_FILE}: {name}") for name, entry in sites.items()}


def approved_roles(root: Path) -> dict[str, Role]:
    """Site to role of every approved member: whom a run may ask, and for what."""
    return {name: member.role for name, member in load_members(root).items() if member.status == "approved"}


def invite(
    root: Path,
    settings: ServerSettings,
    site: str,
    role: Role,
    profile: Mapping[str, Any],
    now: datetime.datetime,
) -> Invitation:
    """Put a site on the list and make its invitation. Asking again for a site that is not approved makes a new one.

    Raises Refused E_EXISTS for an approved site, ConfigError E_VALUE for a name of another form.
    """
    files = certificate_files(root)
    if not files.ca.is_file():
        raise ConfigError("E_NOT_A_PROJECT", where=str(root), found="no certificate authority")
    ca_pem = files.ca.read_text(encoding="ascii")
    invitation = Invitation(
        federation=settings.federation,
        site=site,
        role=role,
        address=settings.address,
        ca_pem=ca_pem,
        ca_fingerprint=certificate_fingerprint(ca_pem),
        protocol=PROTOCOL,
        version=__version__,
        profile=profile,
    )
    with _editing(root) as members:
        known = members.get(site)
        if known is not None and known.status == "approved":
            raise Refused("E_EXISTS", where=site, found="an approved site", fix=f"fourdvq-server revoke {site} first")
        shut_out = known.shut_out if known is not None else ()
        members[site] = Member(role=role, status="invited", invited=_iso(now), shut_out=shut_out)
    return invitation


def approve(root: Path, settings: ServerSettings, request: SiteRequest, now: datetime.datetime) -> Member:
    """Admit an invited site with the key of its request, after checking that the request is signed with that key.

    Raises Refused E_INVITE for another federation, a site that was not invited, a bad signature or another kind of key;
    Refused E_EXISTS if the key belongs to another site or was shut out before.
    """
    if request.federation != settings.federation:
        raise Refused("E_INVITE", where="request: federation", found=request.federation, wanted=settings.federation)
    fingerprint = check_request(request)
    with _editing(root) as members:
        known = members.get(request.site)
        if known is None:
            fix = f"fourdvq-server invite {request.site}"
            raise Refused("E_INVITE", where="request: site", found=request.site, wanted="an invited site", fix=fix)
        for name, member in members.items():
            if name != request.site and member.fingerprint == fingerprint:
                raise Refused("E_EXISTS", where=name, found="the same key", wanted="a key of its own for each site")
            if fingerprint in member.shut_out:
                fix = "a new site folder, made with `fourdvq-client init INVITATION`, has a new key"
                raise Refused("E_EXISTS", where=name, found="a key that was shut out", wanted="a new key", fix=fix)
        approved = replace(
            known,
            status="approved",
            public_key=request.public_key,
            fingerprint=fingerprint,
            approved=_iso(now),
            revoked="",
        )
        members[request.site] = approved
    return approved


def revoke(root: Path, site: str, now: datetime.datetime) -> Member:
    """Shut a site out. Its entry stays, as a record. ConfigError E_VALUE for a site that is not on the list."""
    with _editing(root) as members:
        if site not in members:
            raise ConfigError(
                "E_VALUE", where="site", found=site, wanted=", ".join(members) or "a site", fix="fourdvq-server sites"
            )
        known = members[site]
        keys = (known.fingerprint,) if known.fingerprint else ()
        members[site] = replace(
            known,
            status="revoked",
            revoked=_iso(now),
            public_key="",
            fingerprint="",
            shut_out=tuple(dict.fromkeys([*known.shut_out, *keys])),
        )
        return members[site]


def check_request(request: SiteRequest) -> str:
    """Check kind of key and signature; return the key's fingerprint as computed here (not as the request claims)."""
    key = _public_key(request.public_key)
    try:
        signature = base64.b64decode(request.signature, validate=True)
        key.verify(signature, request.signed_bytes(), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        raise Refused("E_INVITE", where="request: signature", found="one that does not fit the key") from None
    fingerprint = line_fingerprint(request.public_key)
    if fingerprint != request.fingerprint:
        raise Refused("E_INVITE", where="request: fingerprint", found=request.fingerprint, wanted=fingerprint)
    return fingerprint


def line_fingerprint(public_line: str) -> str:
    """The fingerprint of an OpenSSH public key line, as `ssh-keygen -l` prints it."""
    blob = base64.b64decode(public_line.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def pem_of(public_line: str) -> bytes:
    """The form in which Flower registers a key."""
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return _public_key(public_line).public_bytes(encoding, form)


def reconcile(root: Path, control: Control) -> list[str]:
    """Make the SuperLink's list of keys equal to the approved sites; returns what changed, in words."""
    wanted = {pem_of(m.public_key): name for name, m in load_members(root).items() if m.status == "approved"}
    present = {node.public_key: node for node in control.nodes()}
    changes = []
    for pem, node in present.items():
        if wanted.get(pem) != node.name:
            control.unregister(node.node_id)
            changes.append(f"shut out {node.name}")
    for pem, name in wanted.items():
        if pem not in present or present[pem].name != name:
            control.register(name, pem)
            changes.append(f"registered {name}")
    return changes


class Registrar:
    """Watch sites.json beside a running SuperLink and reconcile whenever it changes."""

    def __init__(self, root: Path, control: Control, notify: Callable[[str], None], poll_s: float = 1.0) -> None:
        self._root, self._control, self._notify, self._poll_s = root, control, notify, poll_s
        self._seen: tuple[int, int] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registrar", daemon=True)

    def start(self) -> None:
        """Reconcile once, here, then go on watching in a thread."""
        self._seen = self._stamp()
        self._tell(reconcile(self._root, self._control))
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._done.wait(self._poll_s):
            stamp = self._stamp()
            if stamp == self._seen:
                continue
            try:
                self._tell(reconcile(self._root, self._control))
                self._seen = stamp
            except FourdvqError as error:
                # A half-edited file, or a SuperLink that restarts: say so and look again.
                self._notify(str(error))

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = (self._root / SITES_FILE).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def _tell(self, changes: list[str]) -> None:
        for change in changes:
            self._notify(change)


@contextlib.contextmanager
def _editing(root: Path) -> Iterator[dict[str, Member]]:
    """Read, change and write sites.json as one step; two commands at once do not lose each other's change."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{SITES_FILE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        members = load_members(root)
        yield members
        body = {"schema": _SCHEMA, "sites": to_plain(members)}
        write_atomic(root / SITES_FILE, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())


def _public_key(line: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Refused("E_INVITE", where="request: public_key", found=type(error).__name__) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != _CURVE:
        found = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
        raise Refused("E_INVITE", where="request: public_key", found=found, wanted=f"an elliptic-curve key, {_CURVE}")
    return key


def _iso(now: datetime.datetime) -> str:
    return now.astimezone(datetime.UTC).isoformat(timespec="seconds")
