"""One call of `fourdvq-client` in this process."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from fourdvq import console
from fourdvq_client.cli import app


def call(root: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON object that `--json` prints last, and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = console.run(app, [*words, "--json", "--workdir", str(root)], "fourdvq-client")
    lines = out.getvalue().strip().splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return code, found, err.getvalue()
