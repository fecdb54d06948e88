"""Our node, gate and bundle against the real Flower 1.41: one SuperLink, one SuperExec, real TLS on loopback."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import federation_parts as parts
from fourdvq.errors import FourdvqError, Refused, TemporaryStop
from fourdvq.wire.messages import PROTOCOL
from fourdvq_client.keys import create_site_key
from fourdvq_server.coordinator import OpenDoor, find_door, open_door
from fourdvq_server.fab import build_bundle
from fourdvq_server.gate import MAX_BODY_BYTES, SITE_ROUTES
from fourdvq_server.membership import certificate_files, revoke
from fourdvq_server.settings import ServerSettings

SECRET_TEXT = "LEU-004217 /data/patients/LEU-004217"


@dataclass
class World:
    root: Path
    settings: ServerSettings
    running: OpenDoor
    said: list[str]
    modules: Path

    @property
    def ca(self) -> Path:
        return certificate_files(self.root).ca

    def site(self, name: str, app: ClientApp | None = None, **more: Any) -> AbstractContextManager[parts.RunningSite]:
        return parts.site_running(
            app or parts.echo_app(),
            address=self.running.door.gate_address,
            ca_file=self.ca,
            key_file=self.root / "sites" / name / "site.key",
            name=name,
            **more,
        )

    def start(self, name: str, body: str) -> int:
        return self.running.control.start_run(
            build_bundle(parts.write_server_app(self.modules, name, body)), {"project": "p", "run": name}
        )

    def run(self, name: str, body: str) -> list[str]:
        run = self.start(name, body)
        lines = list(self.running.control.logs(run))
        assert self.running.control.run_state(run).is_completed, lines
        return lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("coordinator")
    settings = parts.make_project(root)
    for site in ("leuven", "southampton", "external"):
        parts.admit(root, settings, site, root / "sites" / site)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("PYTHONPATH", str(root / "modules"))
        patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
        patch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")
        running = stack.enter_context(open_door(root, settings, said.append))
        yield World(root, settings, running, said, root / "modules")


def test_three_sites_answer_by_name_and_without_any_bundle(world: World) -> None:
    body = """
    print("config", dict(sorted(config.items())))
    print("answers", sorted(ask(grid, nodes(grid, 3)).items()))
    """
    with world.site("leuven") as a, world.site("southampton") as b, world.site("external") as c:
        lines = world.run("echo_three", body)
    text = "\n".join(lines)
    assert "config {'project': 'p', 'run': 'echo_three'}" in text
    for name in ("leuven", "southampton", "external"):
        assert f"('{name}', {{'number': 7, 'site': '{name}'}})" in text
    for site in (a, b, c):
        assert site.failure is None
        assert site.kinds()[:2] == ["connecting", "connected"]
        assert site.kinds()[-1] == "left"
    assert "GetFab" not in (world.root / "logs" / "superlink.log").read_text()
    assert all(node.status == "offline" for node in world.running.control.nodes())


def test_the_text_of_an_error_at_a_site_reaches_neither_log_nor_database(world: World) -> None:
    def fail(message: Message, context: Context) -> None:
        raise FileNotFoundError(SECRET_TEXT)

    with world.site("leuven", parts.echo_app(fail)) as site:
        lines = world.run("echo_error", 'print("answers", ask(grid, nodes(grid, 1)))')
    assert any("reason='INTERNAL'" in line for line in lines)
    assert any(SECRET_TEXT in str(e.facts) for e in site.events if e.kind == "app_failed")  # kept at the site
    needles = [b"LEU-004217", b"FileNotFoundError"]
    database = world.root / "state" / "link.db"
    with sqlite3.connect(database) as connection:
        dump = "\n".join(connection.iterdump()).encode()
    files = [p.read_bytes() for p in (world.root / "state").glob("link.db*")]
    files += [p.read_bytes() for p in (world.root / "logs").iterdir()]
    assert not [needle for needle in needles for data in [dump, *files, "\n".join(lines).encode()] if needle in data]


def test_a_stopped_run_cancels_the_work_at_the_site_and_the_site_stays(world: World) -> None:
    seen: list[bool] = []

    def wait_for_cancel(message: Message, context: Context) -> None:
        seen.append(site.cancel.wait(20))

    with world.site("leuven", parts.echo_app(wait_for_cancel)) as site:
        run = world.start("echo_stop", "ask(grid, nodes(grid, 1))")
        while "message" not in site.kinds():
            time.sleep(0.05)
        world.running.control.stop_run(run)
        while "run_ended" not in site.kinds() and site.failure is None:
            time.sleep(0.05)
        assert seen == [True]
        assert site.failure is None
        assert world.running.control.run_state(run).outcome == "stopped"


class Wire:
    """A TCP line to the gate that can be cut: open connections break, new ones are refused, until it is mended."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._far, self._listener = (host, int(port)), socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        self._is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._is_cut = True
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._is_cut = False

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._is_cut:
                    near.close()
                    continue
                far = socket.create_connection(self._far)
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_a_reply_survives_a_cut_line_and_arrives_once(world: World) -> None:
    calls: list[int] = []

    def cut_the_line(message: Message, context: Context) -> None:
        calls.append(1)
        wire.cut()
        threading.Timer(1.5, wire.mend).start()

    wire = Wire(world.running.door.gate_address)
    key = world.root / "sites" / "leuven" / "site.key"
    app = parts.echo_app(cut_the_line)
    with parts.site_running(app, address=wire.address, ca_file=world.ca, key_file=key, name="leuven") as site:
        lines = world.run("echo_cut", 'print("answers", ask(grid, nodes(grid, 1)))')
        kinds = site.kinds()
    wire.close()
    assert "answers {'leuven': {'number': 7, 'site': 'leuven'}}" in lines
    assert (calls, kinds.count("replied")) == ([1], 1)
    assert kinds.index("unreachable") < kinds.index("back") < kinds.index("replied")


def test_an_unregistered_key_is_refused_first_for_now_then_for_good(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_site_key(world.root / "sites" / "rogue" / "site.key")
    with world.site("rogue") as site:
        site.join()
    assert isinstance(site.failure, TemporaryStop)
    assert (site.failure.code, site.failure.exit_code) == ("E_ACTIVATION", 75)
    monkeypatch.setattr("fourdvq_client.node.ONLINE_WINDOW_S", 0.0)
    with world.site("rogue") as site:
        site.join()
    assert isinstance(site.failure, Refused)
    assert site.failure.exit_code == 5


def test_a_revoked_site_is_shut_out_while_it_is_connected(world: World) -> None:
    parts.admit(world.root, world.settings, "gone", world.root / "sites" / "gone")
    while "registered gone" not in world.said:
        time.sleep(0.05)
    with world.site("gone") as site:
        while "connected" not in site.kinds():
            time.sleep(0.05)
        revoke(world.root, "gone", parts.NOW)
        site.join()
        assert isinstance(site.failure, FourdvqError)
        assert site.failure.code == "E_ACTIVATION"
    assert "shut out gone" in world.said


def test_two_processes_cannot_use_one_key(world: World) -> None:
    with world.site("leuven") as first:
        while "connected" not in first.kinds():
            time.sleep(0.05)
        with world.site("leuven") as second:
            second.join()
        assert isinstance(second.failure, Refused)
        assert second.failure.code == "E_BUSY"
        assert "process" in second.failure.found


@pytest.fixture
def gate(world: World) -> Iterator[httpx.Client]:
    context = ssl.create_default_context(cafile=world.ca)
    with httpx.Client(verify=context, trust_env=False, base_url=f"https://{world.running.door.gate_address}") as client:
        yield client


def _raw(world: World, target: str, method: str = "POST", headers: str = "content-length: 0\r\n") -> int:
    """The status for a request line sent exactly so: HTTP libraries tidy paths before they send them."""
    host, port = world.running.door.gate_address.split(":")
    context = ssl.create_default_context(cafile=world.ca)
    with socket.create_connection((host, int(port)), 5) as plain, context.wrap_socket(plain, server_hostname=host) as s:
        s.sendall(f"{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n".encode())
        return int(s.recv(4096).split()[1])


CONTROL_ROUTES = ("list-nodes", "start-run", "stop-run", "register-node", "unregister-node", "stream-logs", "list-runs")


HIDDEN = [
    *(f"/v1/control/{route}" for route in CONTROL_ROUTES),
    *("/v1/runtime/acquire-task", "/v1/runtime/pull-task-input", "/v1/runtime/push-messages"),
    *("/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/get-fab", "/v1/fleet", "/v1/fleet/"),
    *("/", "/docs", "/openapi.json", "/health", "/v1/fleet/pull-messages/", "/V1/fleet/pull-messages"),
]
TRICKS = [
    "/v1/fleet/../control/list-nodes",
    "/v1/fleet/%2e%2e/control/list-nodes",
    "/v1/fleet/%2E%2E%2Fcontrol/list-nodes",
    "/v1/fleet/..%2fcontrol%2flist-nodes",
    "//v1/control/list-nodes",
    "/v1//control/list-nodes",
    "/./v1/control/list-nodes",
    "/v1/fleet/pull-messages/../../control/list-nodes",
    "/v1/fleet/pull-messages;/../../control/list-nodes",
    "/v1/fleet/pull-messages%00",
    "https://127.0.0.1/v1/control/list-nodes",
    "/v1/control/list-nodes?/v1/fleet/get-run",
]


@pytest.mark.parametrize("target", HIDDEN + TRICKS)
def test_what_is_not_a_fleet_route_is_not_there(world: World, target: str) -> None:
    assert _raw(world, target) == 404


def test_every_route_that_flower_serves_is_hidden_except_the_nine(world: World) -> None:
    from flwr.superlink.main import create_app

    paths = {p for p in create_app().openapi()["paths"]} | {"/v1/fleet/get-fab"}
    allowed = {f"/v1/fleet/{route}" for route in SITE_ROUTES}
    assert allowed < paths
    assert len(paths) > 40
    assert {path for path in paths if _raw(world, path) != 404} == allowed


@pytest.mark.parametrize("route", SITE_ROUTES)
def test_a_site_route_reaches_flower_which_wants_a_signature(gate: httpx.Client, route: str) -> None:
    response = gate.post(f"/v1/fleet/{route}", content=b"", headers={"content-type": "application/protobuf"})
    assert response.status_code == 401
    assert response.headers["x-fourdvq-protocol"] == str(PROTOCOL)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"])
def test_only_post_is_answered(world: World, method: str) -> None:
    assert _raw(world, "/v1/fleet/pull-messages", method) == 404


def test_bodies_have_a_stated_and_bounded_length(world: World) -> None:
    target = "/v1/fleet/push-object"
    assert _raw(world, target, headers=f"content-length: {MAX_BODY_BYTES + 1}\r\n") == 413
    assert _raw(world, target, headers="transfer-encoding: chunked\r\n") == 411


def test_the_door_file_tells_other_commands_where_the_door_is(world: World) -> None:
    assert find_door(world.root) == world.running.door


NODE_PROCESS = """
import sys, time
from pathlib import Path
import federation_parts as parts
from fourdvq_client.node import run_node
address, ca, key, name = sys.argv[1:]
app = parts.echo_app(lambda message, context: (print("working", flush=True), time.sleep(120)))
run_node(app, address=address, ca_file=Path(ca), key_file=Path(key), site=name, times=parts.FAST)
"""


@pytest.mark.slow
def test_a_killed_site_is_reported_as_gone_and_the_others_go_on(world: World) -> None:
    """With a heartbeat of 10 s (the shortest Flower allows) the loss is known after at most 20 s; real sites use 30."""
    name, key = "southampton", world.root / "sites" / "southampton" / "site.key"
    command = [sys.executable, "-c", NODE_PROCESS, world.running.door.gate_address, str(world.ca), str(key), name]
    environment = {**os.environ, "PYTHONPATH": str(Path(parts.__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process, world.site("leuven"):
        run = world.start("echo_killed", 'print("answers", sorted(ask(grid, nodes(grid, 2)).items()))')
        assert process.stdout is not None
        assert process.stdout.readline() == b"working\n"
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        text = "\n".join(world.running.control.logs(run))
    assert "('leuven', {'number': 7, 'site': 'leuven'})" in text
    assert "('southampton', Error(code=5" in text
    assert time.monotonic() - killed < 45
