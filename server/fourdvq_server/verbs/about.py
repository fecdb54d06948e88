"""check, explain, version: is this machine fit, what does a code mean, what is installed."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result, table


def check() -> Result:
    """The doctor: versions, folder, disk, MLflow store, certificates and ports. Exit 0, or the first failure's."""
    from fourdvq_server.checks import exit_code, run_checks

    findings = run_checks(console.options().workdir)
    rows = [(f.state, f.name, f.found, f.fix) for f in findings]
    data = {"checks": [vars(f) for f in findings]}
    return Result(data, (table(["", "check", "found", "fix"], rows),), exit_code(findings))


def explain(code: Annotated[str, typer.Argument(help="a code as printed, such as E_QUORUM")]) -> Result:
    """The long text of a code."""
    from fourdvq.errors import CODES

    text = console.format_explanation(code)
    return Result({"code": code, **vars(CODES[code])}, (text,))


def version() -> Result:
    """Versions, protocol number and the sha256 of the installed packages."""
    from importlib.metadata import version as version_of

    from fourdvq import __version__
    from fourdvq.code_identity import package_sha256
    from fourdvq.wire import PROTOCOL

    hashes = {name: package_sha256(name) for name in ("fourdvq", "fourdvq_server")}
    others = {name: version_of(name) for name in ("flwr", "mlflow", "torch")}
    lines = [f"{name} {__version__}  sha256 {sha256}" for name, sha256 in hashes.items()]
    lines += [f"protocol {PROTOCOL}", *(f"{name} {number}" for name, number in others.items())]
    return Result({"version": __version__, "protocol": PROTOCOL, "packages": hashes, **others}, tuple(lines))
