"""Real processes: the door and the clients start, end as asked, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import federation_parts as parts
from fourdvq.config import to_plain
from fourdvq.wire.invitation import load_request
from fourdvq_client.enrol import take_invitation
from fourdvq_client.keys import lock_holder
from fourdvq_client.node import NodeTimes
from fourdvq_client.site_folder import SiteSettings, create_site
from fourdvq_server.control import Control
from fourdvq_server.coordinator import find_door
from fourdvq_server.fab import build_bundle
from fourdvq_server.loopback import bind, free_port
from fourdvq_server.membership import approve, certificate_files, invite
from fourdvq_server.settings import ServerSettings
from fourdvq_server.setup import create_project
from fourdvq_server.superexec import SuperExec, SuperExecSettings

SERVER = "from fourdvq_server.cli import main; main()"
CLIENT = "from fourdvq_client.cli import main; main()"


def wait_for(happened: Callable[[], Any], seconds: float = 40.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := happened()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return value


def alive(pid: int) -> bool:
    """Whether a process of this id runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def session_of(leader: int) -> list[int]:
    """All living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                if os.getsid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


@contextmanager
def process(program: str, *words: str, root: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, ended by its id whatever happens."""
    child = subprocess.Popen(
        [sys.executable, "-c", program, *words, "--workdir", str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def make_site(root: Path, project: Path, settings: ServerSettings, *, admitted: bool = True) -> Path:
    """A site folder as `init` makes it, with the invitation taken and the request approved."""
    folder = SiteSettings(site="leuven", role="train", scans=root, clinical=root / "clinical.csv")
    create_site(root, folder, template="demo", profile=_profile())
    invitation = invite(project, settings, "leuven", "train", _profile(), parts.NOW)
    request = load_request(json.dumps(take_invitation(root, to_plain(invitation))))
    if admitted:
        approve(project, settings, request, parts.NOW)
    return root


def _profile() -> dict[str, Any]:
    from importlib.util import find_spec

    from fourdvq.preprocessing.profile import load_profile, profile_to_plain

    spec = find_spec("fourdvq_configs")
    assert spec is not None
    assert spec.origin is not None
    return profile_to_plain(load_profile(Path(spec.origin).parent / "preprocessing" / "tiny.yaml"))


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, ServerSettings]:
    settings, _ = create_project(
        tmp_path / "coordinator",
        parts.FEDERATION,
        f"localhost:{free_port()}",
        gate_host="127.0.0.1",
        private_port=free_port(),
    )
    return tmp_path / "coordinator", settings


def test_serve_opens_the_door_and_a_site_joins_and_leaves(project: tuple[Path, ServerSettings], tmp_path: Path) -> None:
    """The story of a quiet evening: open, join, look, leave, close. Every exit code is the documented one."""
    root, settings = project
    site = make_site(tmp_path / "leuven", root, settings)
    key = site / "keys" / "site.key"
    with process(SERVER, "serve", "--json", root=root) as server:
        door = wait_for(lambda: find_door(root))
        with process(CLIENT, "join", "--json", root=site) as client:
            with Control(door.private_address, certificate_files(root).ca) as control:
                wait_for(lambda: [n.name for n in control.nodes() if n.status == "online"] == ["leuven"])
            holder = lock_holder(key)
            assert holder is not None
            assert holder["pid"] == client.pid
            with process(CLIENT, "join", root=site) as second:
                assert second.wait(30) in (5, 75)
            with process(CLIENT, "leave", "--json", root=site) as leaving:
                assert json.loads(leaving.communicate(timeout=30)[0])["left"] is True
            assert client.wait(10) == 0
            assert json.loads(client.communicate()[0])["ended_by"] == "SIGUSR1"
        with process(CLIENT, "join", root=site) as again:  # accepted at once after a goodbye
            wait_for(lambda: "connected" in _connection(site))
            again.send_signal(signal.SIGTERM)
            assert again.wait(15) == 75
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        assert session_of(server.pid) == []
    assert find_door(root) is None
    assert lock_holder(key) is None


def _connection(site: Path) -> str:
    path = site / "state" / "connection.json"
    return path.read_text() if path.is_file() else ""


def test_join_keeps_to_the_policys_rule_and_serve_says_that_the_port_is_taken(
    project: tuple[Path, ServerSettings], tmp_path: Path
) -> None:
    root, settings = project
    port = int(settings.address.rpartition(":")[2])
    with bind("127.0.0.1", port), process(SERVER, "serve", "--json", root=root) as server:
        assert json.loads(server.communicate(timeout=40)[0])["code"] == "E_PORT"
    site = make_site(tmp_path / "leuven", root, settings)
    with process(CLIENT, "join", "--json", "--coordinator", "fl.example.org:8443", root=site) as client:
        answer = json.loads(client.communicate(timeout=40)[0])
        assert answer["code"] == "E_POLICY"  # the demo's policy allows this machine only
        assert client.returncode == 5


def test_a_superexec_that_dies_is_started_again_and_stopped_with_all_it_started(tmp_path: Path) -> None:
    """Without a SuperLink at its address it only waits: what is looked at is the supervision."""
    (tmp_path / "ca").mkdir()
    files = certificate_files(tmp_path)
    parts.make_project(tmp_path)
    (tmp_path / "secret").write_bytes(b"x" * 32)
    settings = SuperExecSettings(
        f"127.0.0.1:{free_port()}", files.ca, tmp_path / "secret", tmp_path / "home", tmp_path / "log", tmp_path / "pid"
    )
    with SuperExec(settings) as superexec:
        first = superexec.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        second = wait_for(lambda: superexec.pid if superexec.pid != first else None)
        assert alive(second)
    assert not alive(first)
    assert session_of(second) == []


@pytest.fixture
def ends_what_survives(project: tuple[Path, ServerSettings]) -> Iterator[None]:
    """If the test fails half way, the process that is meant to outlive a crash must not outlive the test."""
    yield
    path = project[0] / "state" / "superexec.json"
    if path.is_file():
        os.killpg(json.loads(path.read_text())["pid"], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("ends_what_survives")
def test_a_run_goes_on_after_the_superlink_was_killed(
    project: tuple[Path, ServerSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the process with the SuperLink while a site works; ServerApp and site reconnect to its successor."""
    root, settings = project
    key = tmp_path / "leuven" / "site.key"
    parts.admit(root, settings, "leuven", key.parent)
    modules = tmp_path / "modules"
    body = 'print("answers", ask(grid, nodes(grid, 1), seconds=120.0))'
    bundle = build_bundle(parts.write_server_app(modules, "echo_restart", body))
    environment = {"PYTHONPATH": str(modules)}
    slow = parts.echo_app(lambda message, context: time.sleep(8))
    ca_file = certificate_files(root).ca
    with parts.site_running(
        slow,
        address=settings.address,
        ca_file=ca_file,
        key_file=key,
        name="leuven",
        times=NodeTimes(poll=0.05, first_contact=60),
    ) as site:
        with process(SERVER, "serve", root=root, **environment) as host:
            door = wait_for(lambda: find_door(root))
            with Control(door.private_address, ca_file) as control:
                run = control.start_run(bundle, {"project": "p", "run": "r"})
                wait_for(lambda: "message" in site.kinds())
            record = (root / "state" / "superexec.json").read_text()
            os.kill(host.pid, signal.SIGKILL)
        with process(SERVER, "serve", root=root, **environment) as successor:
            door = wait_for(lambda: find_door(root))
            with Control(door.private_address, ca_file) as control:
                assert (root / "state" / "superexec.json").read_text() == record  # taken over, not started anew
                text = "\n".join(control.logs(run))
                assert control.run_state(run).is_completed
            successor.send_signal(signal.SIGTERM)
            assert successor.wait(20) == 0
        assert session_of(json.loads(record)["pid"]) == []
    assert "'site': 'leuven'" in text
