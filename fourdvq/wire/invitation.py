"""The two files by which a site joins: the coordinator's invitation and the site's answer, the request.

Both are plain JSON that people send by mail and can read. Neither holds a secret: an invitation names the coordinator
and its certificate authority, a request holds the public half of a key that was made at the site, and a signature with
the private half, which never leaves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fourdvq.config import build, canonical_json, to_plain
from fourdvq.errors import ConfigError, FourdvqError, Refused, WireError
from fourdvq.wire.forms import Form
from fourdvq.wire.messages import Role

T = TypeVar("T")

SCHEMA = 1
_SITE = Form("site name", r"[a-z][a-z0-9-]{0,31}", 32)
_FEDERATION = Form("federation name", r"[a-z][a-z0-9-]{0,47}", 48)
_ADDRESS = Form("host:port", r"[A-Za-z0-9._\[\]:-]{1,253}:[0-9]{1,5}", 260)
_LONGEST = 2_000_000  # characters of a file that somebody sent


@dataclass(frozen=True)
class Invitation:
    """What a site needs to know about the federation. `address` is host:port of the coordinator's only open door.

    `ca_fingerprint` is the SHA-256 of the certificate authority in hex: what two people compare over the telephone.
    `profile` is the whole preprocessing profile.
    """

    federation: str
    site: str
    role: Role
    address: str
    ca_pem: str
    ca_fingerprint: str
    protocol: int
    version: str
    profile: Mapping[str, Any]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_federation_name(self.federation)
        _checked(_SITE, self.site, "site")
        _checked(_ADDRESS, self.address, "address")
        _known_schema(self.schema)


@dataclass(frozen=True)
class SiteRequest:
    """A site's public key (one OpenSSH line), signed with the private half: nobody can register a key of others."""

    federation: str
    site: str
    public_key: str
    fingerprint: str
    signature: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_federation_name(self.federation)
        _checked(_SITE, self.site, "site")
        _known_schema(self.schema)

    def signed_bytes(self) -> bytes:
        """What the signature covers: everything but itself."""
        return canonical_json({k: v for k, v in to_plain(self).items() if k != "signature"}).encode()


def dump(value: Invitation | SiteRequest) -> str:
    """The text of the file."""
    return json.dumps(to_plain(value), indent=1, ensure_ascii=False) + "\n"


def load_invitation(text: str, where: str = "invitation") -> Invitation:
    """Read an invitation. Raises Refused E_INVITE if it is not one."""
    return _load(Invitation, text, where)


def load_request(text: str, where: str = "request") -> SiteRequest:
    """Read a request. Raises Refused E_INVITE if it is not one."""
    return _load(SiteRequest, text, where)


def check_federation_name(name: str, where: str = "federation") -> None:
    """Raise ConfigError E_VALUE unless `name` is small letters, digits and hyphens, beginning with a letter."""
    _checked(_FEDERATION, name, where)


def _load(cls: type[T], text: str, where: str) -> T:
    try:
        if len(text) > _LONGEST:
            raise ValueError("more than two million characters")
        return build(cls, json.loads(text))
    except FourdvqError as error:
        raise Refused("E_INVITE", where=f"{where}: {error.where}", found=error.found, wanted=error.wanted) from None
    except ValueError as error:
        raise Refused("E_INVITE", where=where, found=str(error)) from None


def _checked(form: Form, text: str, where: str) -> None:
    try:
        form.check(text, where)
    except WireError as error:
        raise ConfigError("E_VALUE", where=where, found=error.found, wanted=form.name) from None


def _known_schema(schema: int) -> None:
    if schema != SCHEMA:
        raise ConfigError("E_VALUE", where="schema", found=str(schema), wanted=str(SCHEMA))
