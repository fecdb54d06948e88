"""fetch-weights: the file that the federation's segmentation method needs."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq_client.verbs._site import here

_MIB = 1 << 20


def fetch_weights(
    source: Annotated[
        str, typer.Option("--from", help="A file or an http(s) address; without it, where the authors published it.")
    ] = "",
) -> Result:
    """Fetch the lung segmentation's weights once, or take them from a file, if their sha256 is the profile's."""
    from fourdvq_client.weights import PUBLISHED, fetch_weights
    from fourdvq_client.workspace import read_profile

    workspace, config = here()
    spec = read_profile(workspace).segmentation
    if spec.method not in PUBLISHED:
        return Result({"needed": False, "method": spec.method}, (f"method {spec.method} needs no weights",))
    shown = 0
    with console.progress("MiB") as advance:

        def report(done: int, total: int | None) -> None:
            nonlocal shown
            new = done // _MIB - shown
            if new:
                advance(new, f"of {-(-total // _MIB)}" if total else "")
                shown += new

        fetched = fetch_weights(
            config.weights, sha256=spec.weights_sha256, source=source or PUBLISHED[spec.method], progress=report
        )
    facts = {"needed": True, "method": spec.method, **vars(fetched), "path": str(fetched.path)}
    how = "is there already" if fetched.reused else f"{fetched.bytes} bytes"
    return Result(facts, (f"{fetched.path}: {how}, sha256 {fetched.sha256}",))
