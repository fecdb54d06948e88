"""show-config, explain, version: what is set, what a code means, what is installed."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq_client.verbs._site import here


def show_config() -> Result:
    """Every setting of site.yaml with its value and where it comes from."""
    from fourdvq.config import to_plain
    from fourdvq_client.yaml_file import read_yaml

    workspace, config = here()
    stated = read_yaml(workspace.site_yaml)
    plain = to_plain(config)
    rows = [(key, value, "site.yaml" if key in stated else "default") for key, value in plain.items()]
    return Result(
        {"folder": str(workspace.root), "settings": plain}, (console.table(("setting", "value", "from"), rows),)
    )


def explain(code: Annotated[str, typer.Argument(help="A code as it is printed, such as E_GAP.")]) -> Result:
    """The long text of a code."""
    from fourdvq.errors import CODES

    text = console.format_explanation(code)
    return Result({"code": code, **vars(CODES[code])}, (text,))


def version() -> Result:
    """Versions, protocol number and the sha256 of the installed packages."""
    import importlib.metadata

    from fourdvq_client.code_identity import installed_code

    code = installed_code()
    protocol = _protocol()
    others = {name: importlib.metadata.version(name) for name in ("flwr", "torch")}
    lines = [f"{c.package} {c.version}  sha256 {c.sha256}" for c in code]
    lines += [f"protocol {protocol}", *(f"{name} {number}" for name, number in others.items())]
    facts = {"version": code[0].version, "protocol": protocol, "packages": [vars(c) for c in code], **others}
    return Result(facts, tuple(lines))


def _protocol() -> int:
    from fourdvq.wire import PROTOCOL

    return PROTOCOL
