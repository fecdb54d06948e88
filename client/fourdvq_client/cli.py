"""`fourdvq-client`: registers the verbs and runs one. Settings of other packages come before any of their imports."""

from __future__ import annotations

import os
import signal

# Until there is somebody who answers them with a word and an exit code.
_held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))

# Nobody's software phones home from a hospital; read by the packages when they are imported.
for _name, _value in (
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
):
    os.environ.setdefault(_name, _value)

import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from typing import NoReturn  # noqa: E402

from fourdvq import console  # noqa: E402

with console.loading("fourdvq-client", _held):
    import typer

    from fourdvq_client.verbs import (
        about,
        audit,
        biomarkers,
        check,
        data,
        dry_run,
        follow,
        init,
        join,
        models,
        phantom,
        plans,
        policy,
        qc,
        reports,
        survival,
        weights,
    )

app = typer.Typer(
    help="A hospital's side of a fourdvq federation: nothing leaves but what policy.yaml allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=console.GLOBAL_HELP,
)

VERBS: dict[str, Callable[..., console.Result]] = {
    "init": init.init,
    "check": check.check,
    "scan": data.scan,
    "fetch-weights": weights.fetch_weights,
    "preprocess": data.preprocess,
    "dry-run": dry_run.dry_run,
    "approve": plans.approve,
    "join": join.join,
    "leave": join.leave,
    "watch": follow.watch,
    "status": follow.status,
    "pull": models.pull,
    "evaluate": models.evaluate,
    "report": reports.report,
    "submit": reports.submit,
    "generate": models.generate,
    "phantom": phantom.phantom,
    "biomarkers": biomarkers.biomarkers,
    "show-config": about.show_config,
    "explain": about.explain,
    "version": about.version,
}
GROUPS = {"qc": qc.app, "policy": policy.app, "audit": audit.app, "survival": survival.app}

for _verb, _function in VERBS.items():
    app.command(_verb, epilog=console.GLOBAL_HELP)(_function)
for _verb, _group in GROUPS.items():
    app.add_typer(_group, name=_verb)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit with its code."""
    sys.exit(console.run(app, list(argv) if argv is not None else sys.argv[1:], "fourdvq-client"))
