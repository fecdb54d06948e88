"""`fourdvq-server`: registers the verbs and runs one. Settings of other packages come before any of their imports."""

from __future__ import annotations

import os
import signal

# Until there is somebody who answers them with a word and an exit code.
_held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))

# Nobody's software phones home from a coordinator; read by the packages when they are imported.
for _name, _value in (
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
):
    os.environ.setdefault(_name, _value)

import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from typing import NoReturn  # noqa: E402

from fourdvq import console  # noqa: E402

with console.loading("fourdvq-server", _held):
    import typer

    from fourdvq_server.verbs import (
        ablate,
        about,
        biomarkers,
        demo,
        experiments,
        init,
        members,
        results,
        runs,
        serve,
        survival,
        ui,
    )

app = typer.Typer(
    help="The coordinator of a fourdvq federation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=console.GLOBAL_HELP,
)

VERBS: dict[str, Callable[..., console.Result]] = {
    "init": init.init,
    "renew-cert": init.renew_cert,
    "invite": members.invite,
    "approve": members.approve,
    "revoke": members.revoke,
    "sites": members.sites,
    "serve": serve.serve,
    "demo": demo.demo,
    "ablate": ablate.ablate,
    "experiments": experiments.experiments,
    "plan": experiments.plan,
    "show-config": experiments.show_config,
    "run": runs.run,
    "resume": runs.resume,
    "status": runs.status,
    "watch": runs.watch,
    "logs": runs.logs,
    "pause": runs.pause,
    "stop": runs.stop,
    "validate": results.validate,
    "compare": results.compare,
    "report": results.report,
    "export": results.export,
    "biomarkers": biomarkers.biomarkers,
    "survival": survival.survival,
    "release": results.release,
    "ui": ui.ui,
    "check": about.check,
    "explain": about.explain,
    "version": about.version,
}

for _verb, _function in VERBS.items():
    app.command(_verb, epilog=console.GLOBAL_HELP)(_function)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command: exits with the codes of docs/reference/server-cli.md."""
    sys.exit(console.run(app, sys.argv[1:] if argv is None else argv, "fourdvq-server"))
