"""Parts of a small real federation for tests: certificates, a SuperLink with gate, keys, and tiny apps at the edge."""

from __future__ import annotations

import datetime
import os
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from fourdvq_client.keys import SiteKey, create_site_key, make_request
from fourdvq_client.node import NodeEvent, NodeTimes, run_node
from fourdvq_server.certificates import create_authority, create_server_certificate
from fourdvq_server.membership import approve, certificate_files, invite
from fourdvq_server.settings import GateSettings, ServerSettings

NOW = datetime.datetime.now(datetime.UTC)
FEDERATION = "test-federation"
FAST = NodeTimes(poll=0.05, heartbeat=10.0, watch=0.3, activation=0.0, activation_pause=0.1, first_contact=5.0)


def make_project(root: Path) -> ServerSettings:
    """A coordinator folder with certificates and free ports."""
    create_authority(certificate_files(root), FEDERATION, NOW)
    create_server_certificate(certificate_files(root), ["localhost"], NOW)
    return ServerSettings(FEDERATION, "localhost:8443", gate=GateSettings(host="127.0.0.1", port=0), private_port=0)


def admit(root: Path, settings: ServerSettings, site: str, folder: Path) -> SiteKey:
    """Make a site's key and take it through invitation, request and approval."""
    key = create_site_key(folder / "site.key")
    invite(root, settings, site, "train", {}, NOW)
    approve(root, settings, make_request(key, federation=FEDERATION, site=site), NOW)
    return key


@dataclass
class RunningSite:
    """A node in a thread, with what it told."""

    name: str
    stop: threading.Event = field(default_factory=threading.Event)
    cancel: threading.Event = field(default_factory=threading.Event)
    events: list[NodeEvent] = field(default_factory=list)
    failure: BaseException | None = None
    thread: threading.Thread | None = None

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def join(self, timeout: float = 20.0) -> None:
        if self.thread is not None:
            self.thread.join(timeout)

    def end(self) -> None:
        self.stop.set()
        self.join()


@contextmanager
def site_running(
    app: ClientApp, *, address: str, ca_file: Path, key_file: Path, name: str, **more: Any
) -> Iterator[RunningSite]:
    """Run a node in a thread for the length of the block."""
    site = RunningSite(name)

    def work() -> None:
        try:
            run_node(
                app,
                address=address,
                ca_file=ca_file,
                key_file=key_file,
                site=name,
                on_event=site.events.append,
                stop=site.stop,
                cancel=site.cancel,
                **({"times": FAST} | more),
            )
        except Exception as error:
            site.failure = error

    site.thread = threading.Thread(target=work, daemon=True)
    site.thread.start()
    try:
        yield site
    finally:
        site.end()


def echo_app(extra: Callable[[Message, Context], Any] | None = None) -> ClientApp:
    """A ClientApp that answers `query.echo` with the number it got and the site's name."""
    app = ClientApp()

    @app.query("echo")  # type: ignore[untyped-decorator]
    def echo(message: Message, context: Context) -> Message:
        if extra is not None:
            extra(message, context)
        number = message.content["ask"]["number"]
        answer = ConfigRecord({"number": number, "site": str(context.node_config["site"])})
        return Message(RecordDict({"answer": answer}), reply_to=message)

    return app


def write_server_app(folder: Path, name: str, body: str) -> str:
    """Write a ServerApp whose main is `body` (with grid, config, ask, nodes at hand); returns module:attribute."""
    head = """
    import time
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.serverapp import ServerApp

    app = ServerApp()

    def nodes(grid, count):
        while len(found := list(grid.get_nodes())) < count:
            time.sleep(0.1)
        return found

    def ask(grid, nodes, kind="query.echo", number=7, seconds=60.0):
        content = RecordDict({"ask": ConfigRecord({"number": number})})
        sent = [Message(content, node.node_id, kind, ttl=seconds) for node in nodes]
        ids = list(grid.push_messages(sent))
        waiting = {i: n.name for i, n in zip(ids, nodes)}
        end = time.monotonic() + seconds
        answers = {}
        while waiting and time.monotonic() < end:
            for reply in grid.pull_messages(list(waiting)):
                name = waiting.pop(reply.metadata.reply_to_message_id)
                answers[name] = reply.error if reply.has_error() else dict(reply.content["answer"])
            time.sleep(0.1)
        return answers

    @app.main()
    def main(grid, context):
        config = context.run_config
    """
    text = textwrap.dedent(head).lstrip() + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return f"{name}:app"
