"""The way to the coordinator, wrong in one place at a time: what the doctor and the node say about it."""

from __future__ import annotations

import email.utils
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import federation_parts as parts
from fourdvq.errors import ConnectionFailed, FourdvqError, Refused
from fourdvq.wire.messages import PROTOCOL
from fourdvq_client.keys import create_site_key
from fourdvq_client.network import spare_loopback
from fourdvq_client.network_checks import CheckRow, Target, network_checks
from fourdvq_client.node import NodeEvent, NodeTimes, run_node
from fourdvq_server.certificates import CertificateFiles, certificate_fingerprint, create_authority
from fourdvq_server.loopback import free_port
from fourdvq_server.membership import certificate_files


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coordinator")
    parts.make_project(folder)
    create_site_key(folder / "site.key")
    return folder


@contextmanager
def https_server(
    files: CertificateFiles, status: int = 401, protocol: str | None = str(PROTOCOL), ahead_s: float = 0.0
) -> Iterator[str]:
    """A coordinator's edge: TLS with our certificate, one fixed answer to every POST, a clock that is off."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response_only(status)
            self.send_header("date", email.utils.formatdate(time.time() - ahead_s, usegmt=True))
            self.send_header("content-length", "0")
            if protocol is not None:
                self.send_header("x-fourdvq-protocol", protocol)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server, files.server_key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"localhost:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def proxy_server(answer: bytes = b"HTTP/1.1 200 ok\r\n\r\n") -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy that tunnels to the asked port of this machine, whatever the asked host is called."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen: list[str] = []

    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def serve(client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        seen.append(head.decode().splitlines()[0])
        client.sendall(answer)
        if b" 200 " not in answer:
            client.close()
            return
        with socket.create_connection(("127.0.0.1", int(head.split()[1].rpartition(b":")[2]))) as far:
            back = threading.Thread(target=copy, args=(far, client), daemon=True)
            back.start()
            copy(client, far)
            back.join(5)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        listener.close()


@pytest.fixture(autouse=True)
def no_proxy_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")


def failing(rows: list[CheckRow]) -> tuple[str, str]:
    assert [row.state for row in rows[:-1]] == ["PASS"] * (len(rows) - 1), rows
    assert rows[-1].state == "FAIL"
    assert rows[-1].fix
    return rows[-1].check, rows[-1].code


def test_a_sound_way_passes_every_row(root: Path) -> None:
    files = certificate_files(root)
    with https_server(files) as address:
        rows = network_checks(Target(address, files.ca, certificate_fingerprint(files.ca.read_bytes())))
    assert [(row.check, row.state) for row in rows] == [
        (name, "PASS") for name in ("fingerprint", "name", "port", "proxy", "certificate", "clock", "protocol")
    ]


def test_an_authority_other_than_the_invitations_is_noticed_before_anything_is_sent(root: Path) -> None:
    rows = network_checks(Target("localhost:1", certificate_files(root).ca, "00:11"))
    assert failing(rows) == ("fingerprint", "E_TLS")


def test_an_unknown_name(root: Path) -> None:
    rows = network_checks(Target("no-such-host.invalid:8443", certificate_files(root).ca))
    assert failing(rows) == ("name", "E_DNS")


def test_a_closed_port(root: Path) -> None:
    rows = network_checks(Target(f"localhost:{free_port()}", certificate_files(root).ca))
    assert failing(rows) == ("port", "E_UNREACHABLE")


def test_a_proxy_that_opens_encrypted_connections_is_named(root: Path, tmp_path: Path) -> None:
    other = CertificateFiles(tmp_path)
    create_authority(other, "hospital-inspection", parts.NOW)
    with https_server(certificate_files(root)) as address:
        rows = network_checks(Target(address, other.ca))
    assert failing(rows) == ("certificate", "E_TLS")
    assert parts.FEDERATION in rows[-1].found  # who issued the certificate that was shown


@pytest.mark.parametrize(("ahead_s", "state"), [(10, "FAIL"), (-400, "FAIL"), (4, "WARN"), (-100, "WARN"), (0, "PASS")])
def test_the_clock_is_compared_with_the_coordinators(root: Path, ahead_s: float, state: str) -> None:
    files = certificate_files(root)
    with https_server(files, ahead_s=ahead_s) as address:
        rows = network_checks(Target(address, files.ca))
    assert {row.check: row.state for row in rows}["clock"] == state


@pytest.mark.parametrize(("protocol", "code"), [("99", "E_PROTOCOL"), (None, "E_UNREACHABLE")])
def test_another_protocol_or_another_program_at_the_address(root: Path, protocol: str | None, code: str) -> None:
    files = certificate_files(root)
    with https_server(files, protocol=protocol) as address:
        assert failing(network_checks(Target(address, files.ca))) == ("protocol", code)


def test_the_way_leads_through_the_proxy_of_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = certificate_files(root)
    # A host name that only the proxy resolves; the certificate is for localhost, so the chain is refused after it.
    with https_server(files) as address, proxy_server() as (proxy, seen):
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        port = address.rpartition(":")[2]
        rows = network_checks(Target(f"coordinator.invalid:{port}", files.ca))
        assert [row.check for row in rows] == ["fingerprint", "name", "port", "proxy", "certificate"]
        assert seen[0] == f"CONNECT coordinator.invalid:{port} HTTP/1.1"
        assert failing(rows) == ("certificate", "E_TLS")


def test_a_proxy_that_wants_a_login_is_named_without_its_password(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy_server(b"HTTP/1.1 407 no\r\n\r\n") as (proxy, _):
        monkeypatch.setenv("HTTPS_PROXY", proxy.replace("//", "//user:hunter2@"))
        rows = network_checks(Target("coordinator.invalid:8443", certificate_files(root).ca))
    assert failing(rows) == ("proxy", "E_PROXY")
    assert "407" in rows[-1].found
    assert "hunter2" not in str(rows)


def test_loopback_is_appended_to_no_proxy_and_what_was_there_stays() -> None:
    environ = {"NO_PROXY": "intranet.example"}
    spare_loopback(environ)
    spare_loopback(environ)
    assert environ["NO_PROXY"] == "intranet.example,127.0.0.1,localhost,::1"
    assert environ["no_proxy"] == "127.0.0.1,localhost,::1"


def _node_failure(
    root: Path,
    address: str,
    ca_file: Path | None = None,
    key: str = "site.key",
    on_event: Callable[[NodeEvent], None] | None = None,
) -> FourdvqError:
    with pytest.raises(FourdvqError) as caught:
        run_node(
            parts.echo_app(),
            address=address,
            ca_file=ca_file or certificate_files(root).ca,
            key_file=root / key,
            site="leuven",
            on_event=on_event,
            times=NodeTimes(activation=0.0, first_contact=0.6, poll=0.05),
        )
    return caught.value


def test_the_node_gives_up_on_an_address_where_nobody_answers_with_exit_4(root: Path) -> None:
    failure = _node_failure(root, f"localhost:{free_port()}")
    assert isinstance(failure, ConnectionFailed)
    assert (failure.code, failure.exit_code) == ("E_UNREACHABLE", 4)


def test_the_node_does_not_try_again_after_a_wrong_certificate(root: Path, tmp_path: Path) -> None:
    other = CertificateFiles(tmp_path)
    create_authority(other, "other", parts.NOW)
    with https_server(certificate_files(root)) as address:
        tried: list[str] = []
        failure = _node_failure(root, address, other.ca, on_event=lambda event: tried.append(event.kind))
    assert failure.code == "E_TLS"
    assert tried == ["connecting"]


@pytest.mark.parametrize(("status", "ahead_s", "code"), [(401, 30, "E_CLOCK"), (401, 0, "E_ACTIVATION")])
def test_a_refused_signature_is_told_apart_from_a_wrong_clock(
    root: Path, status: int, ahead_s: float, code: str
) -> None:
    with https_server(certificate_files(root), status, ahead_s=ahead_s) as address:
        assert _node_failure(root, address).code == code


def test_a_firewall_that_answers_403_is_not_taken_for_a_run_that_ended(root: Path) -> None:
    with https_server(certificate_files(root), 403) as address:
        assert _node_failure(root, address).code == "E_PROXY"


def _spoil_mode(key: Path) -> None:
    key.chmod(0o644)


def _spoil_content(key: Path) -> None:
    key.write_text("not a key")
    key.chmod(0o600)


@pytest.mark.parametrize("spoil", [_spoil_mode, _spoil_content, Path.unlink])
def test_a_key_that_is_open_damaged_or_missing_is_refused(root: Path, spoil: Callable[[Path], None]) -> None:
    key = root / f"spoilt-{spoil.__name__}.key"
    create_site_key(key)
    spoil(key)
    failure = _node_failure(root, "localhost:1", key=key.name)
    assert isinstance(failure, Refused)
    assert failure.code == "E_KEY_FILE"
