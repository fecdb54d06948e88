"""biomarkers: code frequencies and risk of local patients."""

from __future__ import annotations

from math import exp
from typing import Annotated

import typer

from fourdvq import console
from fourdvq.console import Result
from fourdvq_client.verbs._site import here


def biomarkers(
    model: Annotated[str, typer.Option(help="Version of the model; without it the one that came last.")] = "",
    top: Annotated[int, typer.Option(help="How many codes to show.", min=1)] = 10,
) -> Result:
    """Shares of the codes in each patient's lungs at the first scan, and the risk where a survival model was told here.

    The table, and the picture of where the selected codes lie in a scan, stay here.
    """
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
    lines = [console.table(("code", "mean share", "patients"), rows)]
    scored = [float(value) for value in found.risk if value == value]
    facts |= {"selected": list(found.selected), "with_risk": len(scored), "picture": str(found.picture or "")}
    if found.picture is not None:
        middle = f", hazard against the training mean from x{exp(min(scored)):.2f} to x{exp(max(scored)):.2f}"
        codes = ", ".join(map(str, found.selected))
        lines.append(f"model of codes {codes}: risk of {len(scored)} patients{middle if scored else ''}")
        lines.append(f"what the codes look like and where they lie: {found.picture}")
    lines.append(f"{len(found.pseudonyms)} patients, all shares in {found.file}")
    return Result(facts, tuple(lines))
