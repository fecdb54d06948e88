"""The doctor's look at the way to the coordinator, one row for each thing that can be wrong: name, proxy, port, chain,
fingerprint, clock, protocol, key.

Nothing about the site is sent: up to the key, the only request is an empty one that Flower refuses. A row that fails
ends the list, because what follows would fail for the same reason.
"""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fourdvq.errors import FourdvqError, explain
from fourdvq.wire.messages import PROTOCOL
from fourdvq_client.keys import load_site_key, lock_holder
from fourdvq_client.link import CLOCK_AHEAD_S, CLOCK_BEHIND_S, RunEnded, call_once, is_tls_failure
from fourdvq_client.network import LOOPBACK, split_address

State = Literal["PASS", "WARN", "FAIL"]
PROTOCOL_HEADER: Final = "x-fourdvq-protocol"
_PROBE: Final = "/v1/fleet/pull-messages"
_WARN_AHEAD_S, _WARN_BEHIND_S = 2.0, 60.0
_HEARTBEAT_S: Final = 10.0  # the shortest that Flower allows


@dataclass(frozen=True)
class CheckRow:
    """One line of the doctor's table. `code` and `fix` are empty where there is nothing to do."""

    check: str
    state: State
    found: str
    code: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Target:
    """What is looked at. `ca_fingerprint` is the policy's or the invitation's, in hex with or without colons; without
    `key_file` the key's row is left out.
    """

    address: str
    ca_file: Path
    ca_fingerprint: str = ""
    key_file: Path | None = None
    timeout: float = 10.0


class _Failed(Exception):
    """A row that ends the list."""

    def __init__(self, check: str, code: str, found: str, fix: str = "") -> None:
        super().__init__(found)
        self.row = CheckRow(check, "FAIL", found, code, fix or explain(code).fix)


def network_checks(target: Target) -> list[CheckRow]:
    """Look at each step of the way to the coordinator, up to the first that fails."""
    rows: list[CheckRow] = []
    try:
        rows.extend(_steps(target))
    except _Failed as failed:
        rows.append(failed.row)
    return rows


def proxy_for(host: str) -> str:
    """The proxy URL that the connection to `host` would use by this machine's environment, or ""."""
    if host in LOOPBACK or urllib.request.proxy_bypass(host):
        return ""
    proxies = urllib.request.getproxies()
    return proxies.get("https") or proxies.get("all") or ""


def _steps(target: Target) -> Iterator[CheckRow]:
    host, port = split_address(target.address)
    yield _fingerprint(target)
    proxy = proxy_for(host)
    hop, hop_port = _proxy_address(proxy) if proxy else (host, port)
    yield _name(hop)
    plain = _connect(hop, hop_port, target.timeout)
    with plain:
        yield CheckRow("port", "PASS", f"{hop}:{hop_port} answers")
        if proxy:
            yield _tunnel(plain, proxy, host, port)
        else:
            yield CheckRow("proxy", "PASS", "none needed")
        with _encrypt(plain, host, target) as secure:
            yield CheckRow("certificate", "PASS", f"{secure.version()}, issued by the federation's authority")
            response = _probe(secure, host, port)
    yield _clock(response, time.time())
    yield _protocol(response)
    if target.key_file is not None:
        yield _key(target, target.key_file)


def _fingerprint(target: Target) -> CheckRow:
    try:
        certificate = x509.load_pem_x509_certificate(target.ca_file.read_bytes())
    except (OSError, ValueError) as error:
        raise _Failed("fingerprint", "E_TLS", f"{target.ca_file}: {type(error).__name__}") from None
    found = certificate.fingerprint(hashes.SHA256()).hex(":")
    if target.ca_fingerprint and found.replace(":", "") != target.ca_fingerprint.replace(":", "").lower():
        raise _Failed("fingerprint", "E_TLS", f"{found}, the invitation says {target.ca_fingerprint}")
    return CheckRow("fingerprint", "PASS", f"{found[:23]}... of the federation's authority")


def _name(host: str) -> CheckRow:
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise _Failed("name", "E_DNS", f"{host}: {error.strerror or error}") from None
    return CheckRow("name", "PASS", f"{host} is {', '.join(sorted(map(str, addresses)))}")


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout)
    except OSError as error:
        fix = f"ask IT to allow outbound TCP to {host} port {port}, or set HTTPS_PROXY if there is a proxy"
        raise _Failed("port", "E_UNREACHABLE", f"{host}:{port}: {error.strerror or error}", fix) from None


def _proxy_address(proxy: str) -> tuple[str, int]:
    parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    if not parts.hostname or parts.scheme not in ("http", ""):
        raise _Failed("proxy", "E_PROXY", f"{parts.scheme}://{parts.hostname}: only http:// proxies are supported")
    return parts.hostname, parts.port or 80


def _tunnel(plain: socket.socket, proxy: str, host: str, port: int) -> CheckRow:
    """Ask the proxy for a tunnel. The address is shown without the user and password that it may hold."""
    parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    lines = [f"CONNECT {host}:{port} HTTP/1.1", f"Host: {host}:{port}"]
    if parts.username:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        lines.append("Proxy-Authorization: Basic " + base64.b64encode(user.encode()).decode())
    shown = f"{parts.hostname}:{parts.port or 80}"
    try:
        plain.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        status = _read_status(plain)
    except (OSError, ValueError) as error:
        raise _Failed("proxy", "E_PROXY", f"{shown}: {error}") from None
    if not 200 <= status < 300:
        raise _Failed("proxy", "E_PROXY", f"{shown} answers HTTP {status}")
    return CheckRow("proxy", "PASS", f"{shown} opens a tunnel")


def _read_status(plain: socket.socket) -> int:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        # Byte by byte: what follows the head belongs to the encrypted connection.
        byte = plain.recv(1)
        if not byte or len(head) > 65536:
            raise ValueError("no answer to CONNECT")
        head += byte
    return int(head.split(None, 2)[1])


def _encrypt(plain: socket.socket, host: str, target: Target) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(target.ca_file))
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except (OSError, ValueError) as error:
        reason = getattr(error, "verify_message", "") or str(error)
        found = f"{reason}; the other side shows {_shown_issuer(host, target)}" if is_tls_failure(error) else reason
        raise _Failed("certificate", "E_TLS", found) from None


def _shown_issuer(host: str, target: Target) -> str:
    """Who issued the certificate that is shown instead: the name of a proxy that opens connections, usually."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        hop, port = _proxy_address(proxy_for(host)) if proxy_for(host) else split_address(target.address)
        with socket.create_connection((hop, port), target.timeout) as plain:
            if proxy_for(host):
                _tunnel(plain, proxy_for(host), *split_address(target.address))
            with context.wrap_socket(plain, server_hostname=host) as secure:
                data = secure.getpeercert(binary_form=True) or b""
        return f"one issued by {x509.load_der_x509_certificate(data).issuer.rfc4514_string()}"
    except (OSError, ValueError, _Failed):
        return "none"


def _probe(secure: ssl.SSLSocket, host: str, port: int) -> http.client.HTTPResponse:
    request = f"POST {_PROBE} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    try:
        secure.sendall(request.encode())
        response = http.client.HTTPResponse(secure, method="POST")
        response.begin()
    except (OSError, http.client.HTTPException) as error:
        raise _Failed("protocol", "E_UNREACHABLE", f"no HTTP answer: {type(error).__name__}") from None
    return response


def _clock(response: http.client.HTTPResponse, now: float) -> CheckRow:
    try:
        ahead = now - parsedate_to_datetime(response.headers["date"]).timestamp()
    except (TypeError, ValueError):
        return CheckRow("clock", "WARN", "the other side does not tell its time")
    found = f"{ahead:+.0f} s against the coordinator"
    # The header has whole seconds: the true difference is up to a second less.
    if not -CLOCK_BEHIND_S < ahead < CLOCK_AHEAD_S + 1.0:
        raise _Failed("clock", "E_CLOCK", found)
    if not -_WARN_BEHIND_S < ahead < _WARN_AHEAD_S + 1.0:
        return CheckRow("clock", "WARN", found, "E_CLOCK", explain("E_CLOCK").fix)
    return CheckRow("clock", "PASS", found)


def _protocol(response: http.client.HTTPResponse) -> CheckRow:
    theirs = response.headers.get(PROTOCOL_HEADER)
    if theirs is None:
        found = f"HTTP {response.status} from something that is not a fourdvq coordinator"
        raise _Failed("protocol", "E_UNREACHABLE", found, "check the address with the coordinator")
    if theirs != str(PROTOCOL):
        raise _Failed("protocol", "E_PROTOCOL", f"the coordinator speaks {theirs}, this package {PROTOCOL}")
    return CheckRow("protocol", "PASS", f"both sides speak {theirs}")


def _key(target: Target, key_file: Path) -> CheckRow:
    """Say hello and goodbye with the site's key, unless a running client does so already."""
    from fourdvq_client.fleet import open_fleet

    holder = lock_holder(key_file)
    if holder is not None:
        return CheckRow("key", "PASS", f"in use by process {holder['pid']} on {holder['host']}")
    try:
        key = load_site_key(key_file)
        with open_fleet(target.address, target.ca_file, key, max_message_bytes=0) as fleet:
            fleet.activate(call_once, _HEARTBEAT_S)
            fleet.deactivate()
    except FourdvqError as error:
        raise _Failed("key", error.code, error.found, error.fix) from None
    except RunEnded:
        raise _Failed("key", "E_ACTIVATION", "no answer that a node could use") from None
    return CheckRow("key", "PASS", f"accepted: {key.fingerprint}")
