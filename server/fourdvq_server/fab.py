"""The bundle that a Flower run must have, built in memory: it names the installed ServerApp and holds no code.

Flower unpacks the bundle at the coordinator and puts its folder first on the import path, so a bundle without a single
module can shadow nothing. Sites never fetch it. Equal input gives an equal bundle, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass

from fourdvq import __version__
from fourdvq.errors import FourdvqError

SERVER_APP = "fourdvq_server.app:app"
# The values are placeholders: Flower lets a run override only keys that the bundle declares.
RUN_CONFIG_KEYS = ("project", "run")

_PYPROJECT = """\
[project]
name = "fourdvq-run"
version = "{version}"
description = "Starts the ServerApp that is installed at the coordinator"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41,<1.42"]

[tool.flwr.app]
publisher = "fourdvq"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "{server_app}"
clientapp = "{server_app}"

[tool.flwr.app.config]
{config}
"""


@dataclass(frozen=True)
class Bundle:
    """The bytes of the bundle and their sha256."""

    content: bytes
    sha256: str


def build_bundle(server_app: str = SERVER_APP, keys: tuple[str, ...] = RUN_CONFIG_KEYS) -> Bundle:
    """Build the bundle for the ServerApp at `module:attribute`; `keys` are the text settings a run may set.

    Raises FourdvqError E_INTERNAL if Flower does not accept it.
    """
    import hashlib

    from flwr.cli.build import build_fab_from_files

    config = "\n".join(f'{key} = ""' for key in keys)
    # Flower wants each part of the version to be a number; a development suffix would be refused.
    version = ".".join(part for part in __version__.split(".")[:3] if part.isdigit())
    files = {
        "pyproject.toml": _PYPROJECT.format(version=version, server_app=server_app, config=config).encode(),
        "LICENSE": b"Apache-2.0\n",
    }
    try:
        content, _ = build_fab_from_files(files)
    except ValueError as error:
        raise FourdvqError("E_INTERNAL", where="bundle", found=str(error)) from None
    return Bundle(content, hashlib.sha256(content).hexdigest())
