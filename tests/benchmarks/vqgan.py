"""Stage 1: cost of a step and of the code search, a whole volume's arithmetic and memory, exactness, and quality.

    python tests/benchmarks/vqgan.py --json [--quick] [--out results/vqgan.json]

Ratios are of CPU seconds on one thread, interleaved with the comparison in the same run; `holds` comes from the worse
quartile. What needs a GPU is null without one. The step stands in vqgan_step.py, the whole volume in vqgan_cost.py, the
experiments, whose finished cells are read here, in federated_quality.py, vqgan_quality.py and vqgan_real.py.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import federated_quality  # type: ignore[import-not-found]
import torch
import vqgan_cost  # type: ignore[import-not-found]
import vqgan_devices  # type: ignore[import-not-found]
import vqgan_quality  # type: ignore[import-not-found]
import vqgan_real  # type: ignore[import-not-found]
import vqgan_step  # type: ignore[import-not-found]
from _common import clock, emit, figure, quartiles  # type: ignore[import-not-found]
from torch.nn import functional as F

from fourdvq.federation.codebook import CodebookState, RunningStats, merge_codebooks
from fourdvq.metrics import ssim
from fourdvq.models.codebook import assignment_sums, nearest_codes

LATENTS, CODES, DIM = 98_304, 256, 16  # of one scan at compression 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (always done)")
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeat = 7 if options.quick else 15
    figures = [
        _search(repeat),
        _ssim(repeat),
        _merge_error(),
        *vqgan_step.figures(options.quick),
        *vqgan_cost.figures(options.quick),
        *vqgan_devices.figures(options.quick),
        *federated_quality.figures(options.quick),
        *vqgan_quality.figures(options.quick),
        *vqgan_real.figures(options.quick),
    ]
    emit("vqgan", figures, options.quick, out=options.out)


def _ratio(name: str, ours: Callable[[], object], theirs: Callable[[], object], repeat: int, target: float) -> Any:
    """CPU time of `theirs` over `ours`, measured in pairs after one warm-up of each."""
    started = clock()
    ours()
    theirs()
    pairs = [(_cpu(ours), _cpu(theirs)) for _ in range(repeat)]
    low, middle, high = quartiles([other / own for own, other in pairs])
    own = quartiles([own for own, _ in pairs])[1]
    return figure(
        name,
        round(middle, 3),
        "ratio",
        target=f">= {target}",
        holds=low >= target,
        n=repeat,
        spread=(round(low, 3), round(high, 3)),
        seconds=clock() - started,
        note=f"ours takes {own:.4f} CPU s",
    )


def _cpu(call: Callable[[], object]) -> float:
    """CPU seconds of a call, in nanosecond steps: the shared helper's 10 ms are too coarse for a code search."""
    before = time.process_time()
    call()
    return time.process_time() - before


def _search(repeat: int) -> Any:
    """Nearest code, counts and sums of one scan's latents against the form with an N x K one-hot matrix."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(LATENTS, DIM, generator=generator)
    codes = torch.randn(CODES, DIM, generator=generator)

    def ours() -> object:
        return assignment_sums(vectors, nearest_codes(vectors, codes), CODES)

    def one_hot() -> object:
        distances = vectors.square().sum(1, keepdim=True) - 2 * vectors @ codes.t() + codes.square().sum(1)
        chosen = F.one_hot(distances.argmin(1), CODES).to(vectors.dtype)
        return chosen.sum(0), chosen.t() @ vectors

    return _ratio("code search and sums, 98,304 x 256 x 16: one-hot form over ours", ours, one_hot, repeat, 3.0)


def _ssim(repeat: int) -> Any:
    from monai.metrics.regression import compute_ssim_and_cs

    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 1, 24, 64, 64, generator=generator)
    b = (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)

    def theirs() -> float:
        found, _ = compute_ssim_and_cs(
            y_pred=a, y=b, spatial_dims=3, kernel_size=(11, 11, 11), kernel_sigma=(1.5, 1.5, 1.5), data_range=1.0
        )
        return float(found.mean())

    result = _ratio("SSIM, 24x64x64: MONAI over ours", lambda: ssim(a, b), theirs, repeat, 2.0)
    difference = abs(ssim(a, b) - theirs())
    result["note"] += f"; the two differ by {difference:.1e}"
    result["holds"] = result["holds"] and difference < 1e-5
    return result


def _merge_error() -> Any:
    """Two unequal sites, 40 micro-batches, frozen encoder: largest code difference to pooled training."""
    started, steps, decay = clock(), 40, 0.37
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(CODES, DIM, generator=generator)
    counts = torch.full((CODES,), 8.0, dtype=torch.float64)
    state = CodebookState(codes, counts, codes.double() * counts[:, None])
    sites = [RunningStats(CODES, DIM, decay_per_round=decay, micro_batches=steps) for _ in range(2)]
    g, n, m = decay ** (1 / steps), state.counts, state.sums
    for _ in range(steps):
        batches = [torch.randn(size, DIM, generator=generator) + shift for size, shift in ((2048, 0.0), (3072, 0.5))]
        for site, vectors in zip(sites, batches, strict=True):
            site.add(*assignment_sums(vectors, nearest_codes(vectors, codes), CODES))
        together = torch.cat(batches).double()
        chosen = F.one_hot(torch.cdist(together, codes.double()).argmin(1), CODES).double()
        n, m = g * n + (1 - g) * chosen.sum(0), g * m + (1 - g) * chosen.t() @ together
    pooled = m / ((n + 1e-7) / (n.sum() + CODES * 1e-7) * n.sum())[:, None]
    merged = merge_codebooks(state, [site.result() for site in sites], decay=decay)
    error = float((merged.codes.double() - pooled).abs().max())
    return figure(
        "two-site codebook merge against pooled training, largest difference",
        error,
        "code units",
        target="<= 1e-6",
        holds=error <= 1e-6,
        n=1,
        seconds=clock() - started,
    )


if __name__ == "__main__":
    main()
