"""Flower's Control API, as the coordinator itself uses it over loopback: register sites, start and follow runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourdvq.errors import ConnectionFailed, FourdvqError, Refused
from fourdvq_server.fab import Bundle

FINISHED = "finished"
COMPLETED = "completed"


@dataclass(frozen=True)
class Node:
    """A registered site as the SuperLink knows it. `public_key` is PEM."""

    node_id: int
    name: str
    status: str  # registered, online, offline
    public_key: bytes


@dataclass(frozen=True)
class RunState:
    """`status`: pending, starting, running or finished; `outcome` of a finished run: completed, failed or stopped."""

    status: str
    outcome: str
    details: str

    @property
    def is_finished(self) -> bool:
        return self.status == FINISHED

    @property
    def is_completed(self) -> bool:
        return self.status == FINISHED and self.outcome == COMPLETED


class Control:
    """A connection to the private port of a SuperLink on this machine."""

    def __init__(self, address: str, ca_file: Path) -> None:
        from flwr.supercore.control import ControlHttpClient

        self._address = address
        self._client = ControlHttpClient.from_server_address(address, False, ca_file.read_bytes(), interceptors=[])

    def close(self) -> None:
        """Close the connection; nothing can be called after this."""
        self._client.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def register(self, name: str, public_key: bytes) -> int:
        """Admit a site by its public key (PEM); returns its node id. Refused E_EXISTS if the key is known."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        response = self._call(self._client.RegisterNode, RegisterNodeRequest(public_key=public_key, name=name))
        return int(response.node_id)

    def unregister(self, node_id: int) -> None:
        """Shut a site out: from now on every call of its key is refused."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._call(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> list[Node]:
        """All registered sites."""
        from flwr.proto.control_pb2 import ListNodesRequest

        infos = self._call(self._client.ListNodes, ListNodesRequest()).nodes_info
        return [Node(n.node_id, n.name, n.status, bytes(n.public_key)) for n in infos if n.status != "unregistered"]

    def start_run(self, bundle: Bundle, config: Mapping[str, str]) -> int:
        """Queue a run of the ServerApp that the bundle names; returns the run's id."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.constant import NOOP_FEDERATION_ID
        from flwr.supercore.fab import Fab

        request = StartRunRequest(
            fab=fab_to_proto(Fab(bundle.sha256, bundle.content, {})),
            override_config=user_config_to_proto(dict(config)),
            federation=NOOP_FEDERATION_ID,
        )
        return int(self._call(self._client.StartRun, request).run_id)

    def stop_run(self, run_id: int) -> None:
        """Stop a run: its ServerApp ends, sites that watch it end their step."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._call(self._client.StopRun, StopRunRequest(run_id=run_id))

    def run_state(self, run_id: int) -> RunState:
        """Where a run stands."""
        from flwr.proto.control_pb2 import ListRunsRequest

        runs = self._call(self._client.ListRuns, ListRunsRequest(run_id=run_id)).run_dict
        status = runs[run_id].status
        return RunState(status.status, status.sub_status, status.details)

    def active_runs(self) -> list[int]:
        """Ids of the runs that have not finished."""
        from flwr.proto.control_pb2 import ListRunsRequest

        runs = self._call(self._client.ListRuns, ListRunsRequest()).run_dict
        return [run_id for run_id, run in runs.items() if run.status.status != FINISHED]

    def logs(self, run_id: int) -> Iterator[str]:
        """What the ServerApp prints, until the run has finished; reading to the end also lets Flower tidy up."""
        from flwr.proto.control_pb2 import StreamLogsRequest

        for part in self._client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=0.0)):
            yield from part.log_output.splitlines()

    def wait(self, run_id: int, *, poll_s: float = 0.5, stop: Callable[[], bool] | None = None) -> RunState:
        """Block until the run has finished, or until `stop()` says so."""
        while not (state := self.run_state(run_id)).is_finished and not (stop and stop()):
            time.sleep(poll_s)
        return state

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        import httpx
        from flwr.supercore.error import ApiErrorCode, FlowerError

        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            if known is not None and known.code == ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                raise Refused("E_EXISTS", where="site key", found="a key that is registered already") from None
            found = f"code {known.code}: {known.message}" if known else f"HTTP {error.response.status_code}"
            raise FourdvqError("E_INTERNAL", where=f"SuperLink at {self._address}", found=found) from None
        except httpx.TransportError as error:
            raise ConnectionFailed(
                "E_UNREACHABLE",
                where=self._address,
                found=type(error).__name__,
                wanted="a running `fourdvq-server serve`",
                fix="fourdvq-server serve",
            ) from None
