"""The federation's certificate authority and the coordinator's TLS certificate.

Elliptic curve prime256v1. The authority signs nothing but the coordinator's certificate; sites trust it alone, not the
authorities of their operating system, so a proxy that opens encrypted connections is noticed. Private keys are files
with mode 0600 in `ca/`. The clock comes in as an argument.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fourdvq.errors import ConfigError

CA_DAYS = 3650
SERVER_DAYS = 397  # the longest that common TLS libraries accept for a server certificate
_EARLY = datetime.timedelta(hours=1)  # a site whose clock is a little behind must not find a certificate of the future
# Always valid too: the coordinator's own processes connect over loopback, with the same certificate.
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class CertificateFiles:
    """Where the authority and the server certificate lie."""

    folder: Path

    @property
    def ca_key(self) -> Path:
        return self.folder / "ca.key"

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def server_key(self) -> Path:
        return self.folder / "server.key"

    @property
    def server(self) -> Path:
        return self.folder / "server.pem"


def create_authority(files: CertificateFiles, federation: str, now: datetime.datetime) -> None:
    """Make a new certificate authority. Raises ConfigError E_EXISTS rather than replace one that sites trust."""
    if files.ca_key.exists() or files.ca.exists():
        raise ConfigError("E_EXISTS", where=str(files.ca), found="a certificate authority")
    files.folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"fourdvq {federation} CA")
    builder = _builder(name, name, key.public_key(), now, CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = builder.add_extension(identifier, critical=False).sign(key, hashes.SHA256())
    write_private(files.ca_key, _key_pem(key))
    files.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def create_server_certificate(files: CertificateFiles, names: Sequence[str], now: datetime.datetime) -> None:
    """Make (or replace) the server's key and certificate for `names`: host names and IP addresses, first one named."""
    ca_key = _load_key(files.ca_key)
    ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    wanted = list(dict.fromkeys([*names, *LOOPBACK_NAMES]))
    builder = _builder(_name(wanted[0]), ca.subject, key.public_key(), now, SERVER_DAYS)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.SubjectAlternativeName([_general_name(name) for name in wanted]), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
    ]
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    certificate = builder.sign(ca_key, hashes.SHA256())
    write_private(files.server_key, _key_pem(key))
    files.server.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def certificate_fingerprint(pem: str | bytes) -> str:
    """SHA-256 of a certificate, as 32 hex pairs with colons: the form that people compare aloud."""
    certificate = x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)
    return certificate.fingerprint(hashes.SHA256()).hex(":")


def days_left(path: Path, now: datetime.datetime) -> int:
    """Whole days until a certificate ends; negative after its end."""
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return (certificate.not_valid_after_utc - now).days


def write_private(path: Path, data: bytes) -> None:
    """Write a secret: the file has mode 0600 from its first byte, and appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if not path.is_file():
        raise ConfigError("E_FILE", where=str(path), found="no key of the certificate authority")
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("E_KEY_FILE", where=str(path), found=type(key).__name__)
    return key
