"""Figures of preprocessing: intake, lung masks, registration, and whole runs of preparation.

    FOURDVQ_REAL_DATA=... python tests/benchmarks/preprocessing.py --json [--quick] [--only PART] [--out FILE]

The parts are scripts of their own beside this one, each with what it measures and how; a part that this machine cannot
measure (no public scans, no GPU) gives rows without a value that say why.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from _common import emit  # type: ignore[import-not-found]

PARTS = ("intake", "masks", "registration", "runs")


def main() -> None:
    """Measure, print the JSON object, and write it to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the output is always JSON; accepted for uniformity")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and cases")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part only; may be given several times")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for part in options.only or PARTS:
        rows += importlib.import_module(f"prep_{part}").figures(options.quick)
    emit("preprocessing", rows, options.quick, out=options.out)


if __name__ == "__main__":
    main()
