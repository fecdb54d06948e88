"""A grid in one process: the same ServerApp side and ClientApps as over the network, one thread per site.

For the demo, `dry-run` and tests: nothing to install, no socket, no process left behind. Sites have names; a name in
`offline` is a site that cannot be reached. `TaskIdentity`, `Run` and `NodeInfo` are internals of Flower 1.41 (pinned
exactly); TaskIdentity is one per process, so one LocalGrid is open at a time.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from queue import Queue
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1
_FIRST_SITE_ID = 101

App = Callable[[Message, Context], Message]
_log = logging.getLogger(__name__)


class LocalGrid(Grid):
    """Delivers messages to each site's own ClientApp in that site's thread; replies are copies, as on a network.

    `one_at_a_time`: no two sites work at once. Slower, and bit for bit the same every time even where the sites' code
    draws from torch's global generator, which all threads of a process share.
    """

    def __init__(self, apps: Mapping[str, App], *, run_id: int = 1, one_at_a_time: bool = False) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SERVER_NODE_ID, 1
        self.offline: set[str] = set()
        self._run = Run.create_empty(run_id)
        self._names = dict(enumerate(apps, start=_FIRST_SITE_ID))
        self._lock = threading.Lock()
        self._turn = threading.Lock() if one_at_a_time else contextlib.nullcontext()
        self._replies: dict[str, Message] = {}
        self._inbox: dict[int, Queue[Message | None]] = {node: Queue() for node in self._names}
        self._threads = [
            threading.Thread(target=self._work, args=(node, apps[name]), name=f"site-{name}", daemon=True)
            for node, name in self._names.items()
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self, timeout: float = 60.0) -> None:
        """Let every site finish what it does, drop what it has not begun, and end its thread."""
        for inbox in self._inbox.values():
            while not inbox.empty():
                inbox.get()
            inbox.put(None)
        for thread in self._threads:
            thread.join(timeout)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Deprecated in Flower; a message is made by `Message(...)`."""
        raise NotImplementedError("use Message(...)")

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=i, name=n, status="online") for i, n in self._names.items() if n not in self.offline]

    def get_node_ids(self) -> list[int]:
        return [node.node_id for node in self.get_nodes()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for original in messages:
            # A copy: sites that share a record with each other or the server could change it under their hands.
            message = copy.deepcopy(original)
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            node = message.metadata.dst_node_id
            if self._names[node] in self.offline:
                error = Error(ErrorCode.NODE_UNAVAILABLE, "site is offline")
                self._deliver(message_id, Message(error, reply_to=message))
            else:
                self._inbox[node].put(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        with self._lock:
            return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        end = None if timeout is None else time.monotonic() + timeout
        while waiting and (end is None or time.monotonic() < end):
            got = self.pull_messages(waiting)
            replies += got
            waiting -= {m.metadata.reply_to_message_id for m in got}
            if waiting:
                time.sleep(0.01)
        return replies

    def _work(self, node: int, app: App) -> None:
        import torch

        # Sites share the machine's cores: one thread each is the fastest split and keeps sums in one order.
        torch.set_num_threads(1)
        name, state = self._names[node], RecordDict()
        while (message := self._inbox[node].get()) is not None:
            context = Context(
                run_id=self._run.run_id, node_id=node, node_config={"site": name}, state=state, run_config={}
            )
            try:
                with self._turn:
                    reply = app(message, context)
            except Exception as error:
                # As at a real site: the class name leaves, the text stays in the site's log.
                _log.exception("the app of site %s raised", name)
                raised = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__)
                reply = Message(raised, reply_to=message)
            self._deliver(message.metadata.message_id, reply)

    def _deliver(self, message_id: str, reply: Message) -> None:
        with self._lock:
            self._replies[message_id] = copy.deepcopy(reply)
