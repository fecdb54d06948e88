"""What can be run: the presets, a resolved plan with its hash, and where each value comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fourdvq.console import Result, table

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, e.g. experiment=tiny federation.rounds=3; quote text that looks like a number"),
]


def experiments() -> Result:
    """The presets: `experiment=NAME` chooses one."""
    from fourdvq_server.experiment import presets

    found = presets()
    return Result({"experiments": [{"name": n, "text": t} for n, t in found]}, (table(["name", "what"], found),))


def plan(
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write the plan as JSON")] = None,
) -> Result:
    """Resolve, type and hash an experiment: what sites will be asked to approve."""
    from fourdvq.data.files import write_atomic
    from fourdvq_server.experiment import compose, flatten

    experiment = compose(overrides or ())
    made = experiment.plan
    if output is not None:
        write_atomic(output, made.to_json().encode())
    from fourdvq.config import to_plain

    plain = to_plain(made)
    rows = sorted(flatten(plain).items())
    data = {
        "name": made.name,
        "sha256": made.hash,
        "profile": experiment.profile.name,
        "plan": plain,
        "output": str(output or ""),
    }
    return Result(data, (table(["key", "value"], rows), "", f"plan {made.name}  sha256 {made.hash}"))


def show_config(overrides: Overrides = None) -> Result:
    """Every setting with its value, and whether it is a default, the preset's or yours."""
    from fourdvq.config import to_plain
    from fourdvq.plan import Plan
    from fourdvq_server.experiment import compose_plain, flatten

    composed = flatten(compose_plain(overrides or ()))
    defaults = flatten(to_plain(Plan(name="", profile_sha256="")))
    typed = {o.lstrip("+").partition("=")[0] for o in overrides or ()}
    rows = [(key, value, _origin(key, value, defaults, typed)) for key, value in sorted(composed.items())]
    data = {"settings": [{"key": k, "value": v, "from": o} for k, v, o in rows]}
    return Result(data, (table(["key", "value", "from"], rows),))


def _origin(key: str, value: str, defaults: dict[str, str], typed: set[str]) -> str:
    if key in typed or any(key.startswith(f"{name}.") for name in typed):
        return "command line"
    return "default" if defaults.get(key) == value else "preset"
