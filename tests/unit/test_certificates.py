"""The certificate authority and the server's certificate, judged by OpenSSL through Python's ssl module."""

from __future__ import annotations

import datetime
import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fourdvq.errors import ConfigError
from fourdvq_server.certificates import (
    SERVER_DAYS,
    CertificateFiles,
    certificate_fingerprint,
    create_authority,
    create_server_certificate,
    days_left,
)

NOW = datetime.datetime.now(datetime.UTC)


def make(folder: Path, names: list[str], now: datetime.datetime = NOW) -> CertificateFiles:
    files = CertificateFiles(folder)
    create_authority(files, "test", now)
    create_server_certificate(files, names, now)
    return files


def handshake(server: CertificateFiles, trusted: Path, name: str) -> str:
    """The error of a TLS handshake over a socket pair, "" if it succeeds."""
    left, right = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.server, server.server_key)

    def serve() -> None:
        try:
            context.wrap_socket(left, server_side=True).close()
        except OSError:
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        ssl.create_default_context(cafile=trusted).wrap_socket(right, server_hostname=name).close()
        return ""
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        right.close()
        thread.join()


@pytest.mark.parametrize("name", ["fl.example.org", "10.1.2.3", "localhost", "127.0.0.1", "::1"])
def test_openssl_accepts_every_name_of_the_certificate(tmp_path: Path, name: str) -> None:
    files = make(tmp_path, ["fl.example.org", "10.1.2.3"])
    assert handshake(files, files.ca, name) == ""


def test_openssl_refuses_another_name_another_authority_and_an_ended_certificate(tmp_path: Path) -> None:
    files = make(tmp_path / "a", ["fl.example.org"])
    assert "mismatch" in handshake(files, files.ca, "other.example.org")
    assert handshake(files, make(tmp_path / "b", ["x"]).ca, "fl.example.org") != ""
    old = make(tmp_path / "c", ["fl.example.org"], NOW - datetime.timedelta(days=SERVER_DAYS + 1))
    assert "expired" in handshake(old, old.ca, "fl.example.org")


def test_a_renewed_certificate_has_the_same_authority(tmp_path: Path) -> None:
    files = make(tmp_path, ["fl.example.org"])
    before, ca = files.server.read_bytes(), files.ca.read_bytes()
    create_server_certificate(files, ["fl.example.org"], NOW)
    assert files.server.read_bytes() != before
    assert files.ca.read_bytes() == ca
    assert handshake(files, files.ca, "fl.example.org") == ""
    assert days_left(files.server, NOW) in (SERVER_DAYS - 1, SERVER_DAYS)


def test_an_authority_is_never_replaced(tmp_path: Path) -> None:
    files = make(tmp_path, ["x"])
    with pytest.raises(ConfigError) as caught:
        create_authority(files, "test", NOW)
    assert caught.value.code == "E_EXISTS"


def test_private_keys_are_for_the_owner_alone_and_on_the_stated_curve(tmp_path: Path) -> None:
    files = make(tmp_path, ["x"])
    assert [stat.S_IMODE(p.stat().st_mode) for p in (files.ca_key, files.server_key)] == [0o600, 0o600]
    for path in (files.ca, files.server):
        key = x509.load_pem_x509_certificate(path.read_bytes()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp256r1"


def test_the_fingerprint_is_the_one_openssl_prints(tmp_path: Path) -> None:
    files = make(tmp_path, ["x"])
    command = ["openssl", "x509", "-in", str(files.ca), "-noout", "-fingerprint", "-sha256"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip().partition("=")[2].lower() == certificate_fingerprint(files.ca.read_bytes())


def test_the_authority_may_sign_servers_but_no_further_authority(tmp_path: Path) -> None:
    files = make(tmp_path, ["x"])
    ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
    server = x509.load_pem_x509_certificate(files.server.read_bytes())
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
