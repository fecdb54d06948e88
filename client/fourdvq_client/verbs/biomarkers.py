"""biomarkers: code frequencies of local patients."""

from __future__ import annotations

from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq_client.verbs._site import here


def biomarkers(
    model: Annotated[str, typer.Option(help="Version of the model; without it the one that came last.")] = "",
    top: Annotated[int, typer.Option(help="How many codes to show.", min=1)] = 10,
) -> Result:
    """Shares of the codes in each patient's lungs at the first scan, as a table that stays here."""
    from fourdvq_client.local_biomarkers import local_histograms
    from fourdvq_client.released import open_release

    workspace, config = here()
    found = local_histograms(workspace, config, open_release(workspace, model))
    rows = [(code, f"{share:.4f}", carriers) for code, share, carriers in found.most_common(top)]
    facts = {
        "file": str(found.file),
        "patients": len(found.pseudonyms),
        "codes": int(found.shares.shape[1]),
        "top": [{"code": c, "mean_share": float(s), "carriers": n} for c, s, n in found.most_common(top)],
    }
    table = console.table(("code", "mean share", "patients"), rows)
    return Result(facts, (table, f"{len(found.pseudonyms)} patients, all shares in {found.file}"))
