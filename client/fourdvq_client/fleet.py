"""The Fleet API as a site uses it: the one module of the client that knows internals of Flower 1.41.

`Fleet` binds the calls to one key and, once activated, to one node id. Messages travel as a head and a tree of objects,
each addressed by its SHA-256; they are taken apart and put together here. The call that fetches a bundle is not here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import Error, Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fourdvq.errors import WIRE_CODES, ConfigError, Refused
from fourdvq_client.keys import SiteKey
from fourdvq_client.link import call_once
from fourdvq_client.network import spare_loopback

FLOWER_SERIES = "1.41."

Call = Callable[[Callable[[Any], Any], Any], Any]


class TransferFailed(Exception):
    """One message could not be fetched, put together or sent."""


def check_flower_version() -> None:
    """Raise Refused E_FLOWER unless the installed Flower is the one whose internals this module knows."""
    from importlib.metadata import version

    found = version("flwr")
    if not found.startswith(FLOWER_SERIES):
        raise Refused("E_FLOWER", where="flwr", found=found, wanted=f"{FLOWER_SERIES}x")


@contextlib.contextmanager
def open_fleet(address: str, ca_file: Path, key: SiteKey, max_message_bytes: int) -> Iterator[Fleet]:
    """A connection to host:port that trusts the given authority alone; nothing is sent yet.

    Raises ConfigError E_FILE without the authority's file, Refused E_TLS if it is not a certificate.
    """
    if not ca_file.is_file():
        raise ConfigError("E_FILE", where=str(ca_file), found="no certificate authority")
    spare_loopback(os.environ)
    interceptors = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key.private, key.private.public_key()),
    ]
    try:
        # As bytes: then this authority alone is trusted, not those of the operating system.
        client = FleetHttpClient.from_server_address(address, False, ca_file.read_bytes(), interceptors)
    except (OSError, ValueError) as error:
        raise Refused("E_TLS", where=str(ca_file), found=str(error)) from None
    with client:
        yield Fleet(client, key.public_pem, max_message_bytes)


class Fleet:
    """The calls of one site. `call` decides what to try again; the calls without one are made once."""

    def __init__(self, client: FleetHttpClient, public_pem: bytes, max_message_bytes: int) -> None:
        self._client, self._public_pem, self._max_bytes = client, public_pem, max_message_bytes
        self._node = Node()

    @property
    def node_id(self) -> int:
        return int(self._node.node_id)

    def activate(self, call: Call, heartbeat_s: float) -> None:
        """Say hello: from now on the coordinator counts this site as online."""
        request = ActivateNodeRequest(public_key=self._public_pem, heartbeat_interval=heartbeat_s)
        self._node = Node(node_id=call(self._client.ActivateNode, request).node_id)

    def deactivate(self) -> None:
        """Say goodbye: after it the same key is accepted again at once."""
        call_once(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))

    def beat(self, heartbeat_s: float) -> None:
        """Say that this site is still there."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=heartbeat_s)
        call_once(self._client.SendNodeHeartbeat, request)

    def confirm_run(self, run_id: int, call: Call = call_once) -> None:
        """Raise RunEnded unless the run goes on."""
        call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run_id))

    def receive(self, call: Call) -> tuple[Message, Any] | None:
        """The head of the next message and the tree of objects it is made of, if there is one."""
        response = call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        return message_from_proto(response.messages_list[0]), response.message_object_trees[0]

    def pull(self, call: Call, head: Message, tree: Any) -> tuple[Message, int]:
        """Fetch the objects of a message; returns it and its bytes.

        Raises TransferFailed if an object is missing or damaged, or the message is larger than this site accepts.
        """
        run_id, message_id, sizes = head.metadata.run_id, head.metadata.message_id, [0]

        def pull_one(object_id: str) -> bytes:
            request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
            response = call(self._client.PullObject, request)
            if not response.object_found:
                raise ObjectPullError(object_id, "it is not there")
            if not response.object_available:
                raise ObjectUnavailableError(object_id)
            sizes.append(len(response.object_content))
            if sum(sizes) > self._max_bytes:
                raise ObjectPullError(object_id, "the message is larger than this site accepts")
            return bytes(response.object_content)

        try:
            contents = pull_objects([node.object_id for node in iterate_object_tree(tree)], pull_one)
            confirmation = ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=message_id)
            call(self._client.ConfirmMessageReceived, confirmation)
            message = inflate_object_from_contents(message_id, contents)
        except (ObjectPullError, ValueError, KeyError) as error:
            raise TransferFailed(str(error)) from error
        if not isinstance(message, Message):
            raise TransferFailed("the object is not a message")
        # The id is not part of the serialised form.
        message.metadata.__dict__["_message_id"] = message_id
        return message, sum(sizes)

    def push(self, call: Call, reply: Message, seconds: float) -> int:
        """Send a reply; returns the bytes that went up (objects that the coordinator has already are not sent).

        Raises TransferFailed if the coordinator does not store an object.
        """
        run_id, sizes = reply.metadata.run_id, [0]
        with no_object_id_recompute():  # hash every object once
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            head = remove_content_from_message(reply) if reply.has_content() else reply
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(head)],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            response = call(self._client.PushMessages, request)

            def push_one(object_id: str, content: bytes) -> None:
                part = PushObjectRequest(
                    node=self._node,
                    run_id=run_id,
                    object_id=object_id,
                    object_content=content,
                    session_id=response.session_id,
                )
                if not call(self._client.PushObject, part).stored:
                    raise ObjectPushError(object_id, run_id, response.session_id)
                sizes.append(len(content))

            try:
                push_objects(objects, push_one, object_ids_to_push=set(response.objects_to_push))
            except ObjectPushError as error:
                raise TransferFailed(str(error)) from error
        return sum(sizes)


def error_reply(message: Message, reason: str) -> Message:
    """A Flower error that says one of the known codes and nothing else."""
    code = reason if reason in WIRE_CODES else "INTERNAL"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, code), reply_to=message)
