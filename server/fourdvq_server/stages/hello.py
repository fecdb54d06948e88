"""Stage hello: wait for the sites, ask each who it is, admit or note why not. Runs again whenever a run is resumed."""

from __future__ import annotations

from typing import Any

from fourdvq_server.admission import remember, wait_for_sites
from fourdvq_server.stages.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Fill `context.sites`. Raises TemporaryStop E_QUORUM, ConfigError E_NORM or E_UNSUPPORTED."""
    wait_for_sites(context)
    for name, info in context.sites.items():
        context.metrics.site(name, info.role)
    return remember(context)
