"""fetch-weights over a real server and from files: the right bytes or none, and a broken download goes on."""

from __future__ import annotations

import hashlib
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from client_calls import call
from fourdvq.errors import ConfigError, ConnectionFailed, FourdvqError, ModelError, TemporaryStop
from fourdvq_client import weights as weights_module
from fourdvq_client.weights import Fetched, fetch_weights
from fourdvq_client.workspace import open_workspace
from site_cases import hospital, new_site, tiny_profile

CONTENT = bytes(range(256)) * 5000  # 1.28 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class WeightServer:
    """Serves `content` at /w.pth; breaks off after `stop_after` bytes of an answer, and may not know ranges."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.stop_after: int | None = None
        self.ranges = True
        self.asked: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name that http.server asks for
                server.answer(self)

            def log_message(self, *_: Any) -> None:
                """Silence."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/w.pth"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append(wanted)
        if request.path == "/moved.pth":
            request.send_response(302)
            request.send_header("Location", "/w.pth")
            request.end_headers()
            return
        if request.path != "/w.pth":
            request.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        total = len(self.content)
        if start >= total:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{total}")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(total - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        request.end_headers()
        end = total if self.stop_after is None else min(total, start + self.stop_after)
        request.wfile.write(self.content[start:end])

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch) -> Iterator[WeightServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = WeightServer()
    yield running
    running.close()


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "weights" / "unet_r231.pth"


def nothing_left(target: Path) -> bool:
    return not target.parent.exists() or list(target.parent.iterdir()) == []


def test_a_download_is_verified_whole_readable_and_not_made_twice(server, target):
    seen: list[tuple[int, int | None]] = []
    fetched = fetch_weights(target, sha256=SHA256, source=server.url, progress=lambda *at: seen.append(at))
    assert fetched == Fetched(target, SHA256, len(CONTENT))
    assert target.read_bytes() == CONTENT
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert fetch_weights(target, sha256=SHA256, source=server.url).reused
    assert len(server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False], ids=["server knows ranges", "server does not"])
def test_a_broken_download_goes_on_where_it_stopped_or_starts_again(server, target, ranges):
    server.stop_after, server.ranges = 300_000, ranges
    with pytest.raises(TemporaryStop, match=r"E_DOWNLOAD.*300000 of 1280000") as caught:
        fetch_weights(target, sha256=SHA256, source=server.url)
    assert caught.value.exit_code == 75
    assert not target.exists()
    server.stop_after = None
    fetched = fetch_weights(target, sha256=SHA256, source=server.url)
    assert fetched.resumed_from == (300_000 if ranges else 0)
    assert server.asked == [None, "bytes=300000-"]
    assert target.read_bytes() == CONTENT


def test_the_rest_of_another_file_is_thrown_away_and_asked_for_again(server, target):
    part = target.with_name(f".{target.name}.part")
    part.parent.mkdir()
    for old in (b"from elsewhere", b"as long as the file, " + bytes(len(CONTENT) - 21), bytes(len(CONTENT) + 5)):
        part.write_bytes(old)
        server.asked.clear()
        assert fetch_weights(target, sha256=SHA256, source=server.url).resumed_from == 0
        assert target.read_bytes() == CONTENT
        assert server.asked == [f"bytes={len(old)}-", None]
        target.unlink()


def test_a_download_that_ended_just_before_the_rename_needs_no_byte_more(server, target):
    part = target.with_name(f".{target.name}.part")
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    assert fetch_weights(target, sha256=SHA256, source=server.url).resumed_from == len(CONTENT)
    assert target.read_bytes() == CONTENT


def test_other_bytes_are_refused_and_leave_nothing_and_the_old_file_as_it_was(server, target, tmp_path):
    server.content = CONTENT[:-1] + b"!"
    local = tmp_path / "given.pth"
    local.write_bytes(server.content)
    for source in (server.url, str(local)):
        with pytest.raises(ModelError, match="E_WEIGHTS") as caught:
            fetch_weights(target, sha256=SHA256, source=source)
        assert hashlib.sha256(server.content).hexdigest() in caught.value.found
        assert nothing_left(target)
    target.write_bytes(b"old")
    with pytest.raises(ModelError, match="E_WEIGHTS"):
        fetch_weights(target, sha256=SHA256, source=str(local))
    assert target.read_bytes() == b"old"
    assert local.read_bytes() == server.content


def test_a_file_is_taken_without_any_network_and_a_redirect_is_followed(server, target, tmp_path):
    local = tmp_path / "given.pth"
    local.write_bytes(CONTENT)
    assert fetch_weights(target, sha256=SHA256, source=str(local)).bytes == len(CONTENT)
    assert server.asked == []
    target.unlink()
    fetch_weights(target, sha256=SHA256, source=server.url.replace("/w.pth", "/moved.pth"))
    assert target.read_bytes() == CONTENT


def test_what_cannot_be_fetched_says_why_and_leaves_nothing(server, target, tmp_path, monkeypatch):
    closed = server.url.replace("/w.pth", "/none.pth")
    cases: list[tuple[str, type[FourdvqError], str]] = [
        (closed, ConnectionFailed, "E_DOWNLOAD.*404"),
        ("http://127.0.0.1:9/w.pth", ConnectionFailed, "E_DOWNLOAD"),
        (str(tmp_path / "none.pth"), ConfigError, "E_FILE"),
        ("ftp://127.0.0.1/w.pth", ConfigError, "E_USAGE"),
        ("file:///etc/hostname", ConfigError, "E_USAGE"),
    ]
    for source, kind, pattern in cases:
        with pytest.raises(kind, match=pattern):
            fetch_weights(target, sha256=SHA256, source=source)
        assert nothing_left(target)
    monkeypatch.setattr(weights_module, "MAX_BYTES", 1 << 20)
    with pytest.raises(ConnectionFailed, match="more than 1 MiB"):
        fetch_weights(target, sha256=SHA256, source=server.url)
    assert nothing_left(target)


def test_a_second_process_that_fetches_the_same_file_is_told_to_wait(server, target):
    from fourdvq_client.weights import _partial

    target.parent.mkdir()
    with _partial(target), pytest.raises(TemporaryStop, match="E_BUSY"):
        fetch_weights(target, sha256=SHA256, source=server.url)
    assert server.asked == []


# --- the verb ----------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path) -> Path:
    network = {"method": "lungmask_r231", "weights_sha256": SHA256}
    data = hospital(tmp_path / "data", patients=("LEU-1",), scans=1)
    return new_site(tmp_path / "site", data, profile={**tiny_profile(), "segmentation": network})


def test_the_verb_fetches_what_the_profile_names_and_the_doctor_sees_it(server, site):
    code, found, _ = call(site, "check")
    rows = {c["name"]: c for c in found["checks"]}
    assert (rows["weights"]["status"], rows["weights"]["code"]) == ("FAIL", "E_WEIGHTS")
    assert "fetch-weights" in rows["weights"]["fix"]
    code, found, _ = call(site, "fetch-weights", "--from", server.url)
    assert (code, found["sha256"], found["bytes"]) == (0, SHA256, len(CONTENT))
    assert Path(found["path"]) == site / "weights" / "unet_r231.pth"
    assert not found["reused"]
    assert call(site, "fetch-weights", "--from", server.url)[1]["reused"]
    _, found, _ = call(site, "check")
    assert {c["name"]: c["status"] for c in found["checks"]}["weights"] == "PASS"


def test_the_verb_refuses_another_file_with_both_hashes_and_the_next_step(server, site, tmp_path):
    (tmp_path / "other.pth").write_bytes(b"other")
    code, error, _ = call(site, "fetch-weights", "--from", str(tmp_path / "other.pth"))
    assert (code, error["code"]) == (1, "E_WEIGHTS")
    assert SHA256 in error["wanted"]
    assert hashlib.sha256(b"other").hexdigest() in error["found"]
    assert nothing_left(site / "weights" / "unet_r231.pth")


def test_a_site_may_keep_the_file_elsewhere_and_a_profile_without_a_network_needs_none(site, tmp_path):
    text = (site / "site.yaml").read_text()
    (site / "site.yaml").write_text(f"{text}\nweights: {tmp_path / 'shared' / 'r231.pth'}\n")
    assert open_workspace(site)[1].weights == tmp_path / "shared" / "r231.pth"
    (tmp_path / "given.pth").write_bytes(CONTENT)
    code, found, _ = call(site, "fetch-weights", "--from", str(tmp_path / "given.pth"))
    assert (code, found["path"]) == (0, str(tmp_path / "shared" / "r231.pth"))
    data = hospital(tmp_path / "data2", patients=("LEU-1",), scans=1)
    other = new_site(tmp_path / "other", data)
    code, found, _ = call(other, "fetch-weights")
    assert (code, found["needed"], found["method"]) == (0, False, "provided")
