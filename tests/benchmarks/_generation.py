"""CPU time and memory of generating a trajectory at the paper's size, each case in a process of its own.

A child process prints one JSON object: its peak memory is then that of this case alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Run as a script, Python sees this folder only; the helpers of the tests are one level up.
sys.path.insert(0, str(Path(__file__).parents[1]))

from _common import figure  # type: ignore[import-not-found]

from peak_memory import peak_bytes

SIZE = (96, 256, 256)
TIMES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
# (decoder, precision, seconds allowed, GiB allowed); None: no target for this case.
CASES = (("half", "fp32", 210.0, 3.0), ("half", "bf16", 60.0, 3.0), ("tats", "bf16", 210.0, None))


def generation_figures(quick: bool) -> list[dict[str, Any]]:
    """Six times from two scans, encoding included, on one core."""
    return [row for case in CASES for row in _rows(*case, quick=quick)]


def _rows(decoder: str, precision: str, most_s: float, most_gib: float | None, *, quick: bool) -> list[dict[str, Any]]:
    name = f"generation of {len(TIMES)} times at {'x'.join(map(str, SIZE))}, {decoder}, {precision}"
    why = "takes minutes: not in quick mode" if quick else ""
    if precision == "bf16" and not _has_bf16():
        why = "this CPU has no bfloat16 arithmetic"
    found = None if why else _measure(decoder, precision)
    cpu, gib = (None, None) if found is None else (found["cpu_s"], found["peak_gib"])
    rows = [
        figure(
            name,
            cpu,
            "CPU s",
            target=f"<= {most_s:g}",
            holds=None if cpu is None else cpu <= most_s,
            n=None if cpu is None else 1,
            note=why if found is None else f"of these {found['encode_s']} s for the two scans",
        )
    ]
    if most_gib is not None:
        holds = None if gib is None else gib <= most_gib
        rows.append(figure(f"{name}: peak memory", gib, "GiB", target=f"<= {most_gib:g}", holds=holds, note=why))
    return rows


def _measure(decoder: str, precision: str) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), decoder, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text(encoding="utf-8")


def _child(decoder: str, precision: str) -> None:
    import time
    from dataclasses import replace

    import torch

    from fourdvq.generation import WorldModel, encode_given, generate
    from fourdvq.models.latent_ode import LatentODE
    from fourdvq.models.vqgan import VQGAN3d
    from fourdvq.plan import ModelSpec, TemporalSpec
    from fourdvq.training.memory import keep_freed_memory

    keep_freed_memory()  # as the command does
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = ModelSpec(size=SIZE, decoder="half" if decoder == "half" else "tats")
    ode = LatentODE(TemporalSpec(lung_context=True), spec.code_dim)
    for parameter in ode.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    world = replace(
        WorldModel(VQGAN3d(spec).eval(), ode.eval(), ""), precision="bf16" if precision == "bf16" else "fp32"
    )
    scans = torch.rand(2, 1, *SIZE)
    lung = torch.zeros(SIZE, dtype=torch.bool)
    lung[16:80, 60:200, 40:215] = True
    began = time.process_time()
    with torch.inference_mode():
        encode_given(world, scans, (0.0, 1.0), lung)
    encoded = time.process_time() - began
    began = time.process_time()
    generate(world, scans, (0.0, 1.0), TIMES, lung=lung)
    spent = time.process_time() - began
    peak = peak_bytes() / 2**30
    print(json.dumps({"cpu_s": round(spent, 1), "encode_s": round(encoded, 1), "peak_gib": round(peak, 2)}))


if __name__ == "__main__":
    _child(*sys.argv[1:3])
