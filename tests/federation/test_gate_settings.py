"""A SuperLink that would be open, forgetful or would install code does not start; the gate judges by whole paths."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import federation_parts as parts
from fourdvq.errors import FourdvqError, Refused
from fourdvq_server.fab import build_bundle
from fourdvq_server.gate import MAX_BODY_BYTES, SITE_ROUTES, FleetGate, verdict
from fourdvq_server.loopback import bind, free_port
from fourdvq_server.membership import certificate_files
from fourdvq_server.superlink import LinkSettings, SuperLink, check_flower_version, compact, link_config, refuse_unsafe


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> LinkSettings:
    root = tmp_path_factory.mktemp("coordinator")
    parts.make_project(root)
    return LinkSettings(root / "state", certificate_files(root), root / "logs" / "superlink.log")


@pytest.fixture(autouse=True)
def quiet_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")


def test_the_settings_we_start_with_are_safe(settings: LinkSettings) -> None:
    config = link_config(settings, 8000)
    refuse_unsafe(config)
    assert settings.secret_file.stat().st_mode & 0o777 == 0o600
    assert len(settings.secret_file.read_bytes()) == 32
    assert link_config(settings, 8000).superexec_auth_secret == config.superexec_auth_secret


@pytest.mark.parametrize(
    "change",
    [
        {"host": "0.0.0.0"},
        {"host": "coordinator.example.org"},
        {"insecure": True},
        {"certificates": None},
        {"enable_supernode_auth": False},
        {"isolation": "subprocess"},
        {"runtime_dependency_install": True},
        {"superexec_auth_secret": None},
        {"database": ":flwr-in-memory:"},
        {"simulation": True},
    ],
)
def test_each_unsafe_setting_is_refused(settings: LinkSettings, change: dict[str, Any]) -> None:
    with pytest.raises(FourdvqError, match="E_UNSUPPORTED"):
        refuse_unsafe(dataclasses.replace(link_config(settings, 8000), **change))


@pytest.mark.parametrize("name", ["FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"])
def test_a_coordinator_that_would_phone_home_is_refused(
    settings: LinkSettings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name)
    with pytest.raises(FourdvqError, match=name):
        refuse_unsafe(link_config(settings, 8000))


def test_another_version_of_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_flower_version()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.42.0")
    with pytest.raises(Refused, match=r"E_FLOWER.*1\.42\.0"):
        check_flower_version()


def test_a_port_in_use_is_named_and_nothing_stays_open(settings: LinkSettings) -> None:
    port, private = free_port(), free_port()
    taken = dataclasses.replace(settings, gate_port=port, private_port=private)
    with bind("127.0.0.1", port), pytest.raises(FourdvqError) as caught:
        SuperLink(taken).start()
    assert (caught.value.code, caught.value.where) == ("E_PORT", f"127.0.0.1:{port}")
    bind("127.0.0.1", private).close()


def test_equal_bundles_are_equal_bytes_and_hold_no_code() -> None:
    import io
    import zipfile

    bundle = build_bundle()
    assert build_bundle().content == bundle.content
    names = zipfile.ZipFile(io.BytesIO(bundle.content)).namelist()
    assert sorted(names) == [".info/CONTENT", "LICENSE", "pyproject.toml"]


def test_compacting_gives_deleted_space_back(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "link.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x BLOB)")
        connection.executemany("INSERT INTO t VALUES (?)", [(b"x" * 100_000,)] * 30)
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM t")
    before = path.stat().st_size
    compact(path)
    assert path.stat().st_size < before / 50
    compact(tmp_path / "absent.db")
    assert not (tmp_path / "absent.db").exists()


Headers = tuple[tuple[bytes, bytes], ...]


def scope(path: str, headers: Headers = ((b"content-length", b"0"),)) -> Any:
    return {"type": "http", "method": "POST", "path": path, "headers": list(headers)}


ALLOWED = {f"/v1/fleet/{route}" for route in SITE_ROUTES}


NEARLY = st.tuples(st.sampled_from(sorted(ALLOWED)), st.text()).map("".join)


@given(st.one_of(st.text(), NEARLY))
@example("/v1/fleet/pull-messages/..")
@example("/v1/fleet/pull-messages\x00")
def test_no_path_but_the_nine_passes(path: str) -> None:
    assert (verdict(scope(path)) == 200) == (path in ALLOWED)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((), 411),
        (((b"content-length", b"-1"),), 411),
        (((b"content-length", b"1e3"),), 411),
        (((b"content-length", b"5"), (b"content-length", b"6")), 411),
        (((b"content-length", str(MAX_BODY_BYTES).encode()),), 200),
        (((b"content-length", str(MAX_BODY_BYTES + 1).encode()),), 413),
    ],
)
def test_the_stated_length_decides(headers: Headers, status: int) -> None:
    assert verdict(scope("/v1/fleet/push-object", headers=headers)) == status


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_what_the_gate_refuses_never_reaches_flower(kind: str) -> None:
    sent: list[Any] = []

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it was called")

    async def send(message: Any) -> None:
        sent.append(message)

    async def nothing() -> Any:
        return {}

    asyncio.run(FleetGate(flower)({**scope("/v1/control/list-nodes"), "type": kind}, nothing, send))
    assert sent[0].get("status") == (404 if kind == "http" else None)
    assert sent[0]["type"] == ("http.response.start" if kind == "http" else "websocket.close")
