"""A whole volume, 96x256x256: arithmetic and memory of a training step from shapes alone, and its time on a GPU.

    python tests/benchmarks/vqgan_cost.py --json [--quick]

FLOP and memory are counted on tensors without storage, on any machine. Where there is a GPU the same step is timed with
the trainer's own code, compiled and not; it ends within nine minutes. Peak rates are from data sheets.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Run as a script, Python sees this folder only; the helpers of the tests are one level up.
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from _common import clock, emit, figure, quartiles  # type: ignore[import-not-found]
from _phantom_scans import MemoryScans  # type: ignore[import-not-found]
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fourdvq.federation.codebook import CodebookState
from fourdvq.losses import l1_loss
from fourdvq.models.blocks import ResBlock3d
from fourdvq.models.vqgan import VQGAN3d, load_codebook
from fourdvq.plan import GanSpec, ModelSpec, Plan, VqganTraining
from fourdvq.training.adversary import Adversary
from fourdvq.training.hardware import Hardware
from fourdvq.training.memory import set_recompute
from fourdvq.training.update import split_for_wire, to_wire
from fourdvq.training.vqgan import VqganTrainer, initial_weights
from fourdvq.wire.body import body_bytes
from fourdvq.wire.messages import VqganTask, VqganUpdate
from peak_memory import peak_bytes

SIZE = (96, 256, 256)
GIB = 2**30
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}  # bfloat16, dense
TARGETS = {"A100": 0.36, "H100": 0.15}  # s
SHARE = 0.25  # of the peak that the targets ask for
# Copies of a parameter in training: itself, its gradient and two moments in float32, and autocast's 16-bit copy.
BYTES_A_PARAMETER = 4 * 4 + 2
Decoder = Literal["tats", "half"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (always done)")
    parser.add_argument("--quick", action="store_true", help="without timing on a GPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    emit("vqgan_cost", figures(options.quick), options.quick)


def figures(quick: bool) -> list[dict[str, Any]]:
    """FLOP, memory and times; times are null without the GPU that they are about."""
    rows, flop = [], {}
    decoders: tuple[Decoder, ...] = ("tats", "half")
    for decoder in decoders:
        flop[decoder], row = _arithmetic(decoder)
        rows.append(row)
    for decoder in decoders:
        rows += [_memory(decoder, recompute=False, target=20.0), _memory(decoder, recompute=True, target=10.0)]
    rows += [_traffic(decoder) for decoder in decoders]
    rows += [_roofline(card, decoder, flop[decoder]) for card in ("A100", "H100") for decoder in decoders]
    if quick:
        return rows + _without_gpu()
    return rows + (_gpu_rows(flop) if torch.cuda.is_available() else [_on_cpu(flop["half"]), *_without_gpu()])


def _networks(decoder: Decoder) -> tuple[VQGAN3d, Adversary, Tensor]:
    """Generator, discriminators and a scan without storage."""
    with torch.device("meta"):
        return VQGAN3d(ModelSpec(decoder=decoder)), Adversary(GanSpec(), seed=0), torch.empty(1, 1, *SIZE)


def _traffic(decoder: Decoder) -> dict[str, Any]:
    """Bytes of a round's task and answer as Flower carries them, codebook and sums included."""
    plan = Plan(name="cost", profile_sha256="0" * 64, model=ModelSpec(decoder=decoder))
    weights, _ = split_for_wire(initial_weights(plan), plan.federation.wire_dtype)
    k, c = plan.model.n_codes, plan.model.code_dim
    counts, sums = np.zeros(k), np.zeros((k, c))
    task = VqganTask(100, 0, False, weights, np.zeros((k, c), np.float32), counts, sums)
    update = VqganUpdate(to_wire(weights, plan.federation.wire_dtype), counts, sums, 100, {"l1": 0.0})
    down, up = (body_bytes(body) for body in (task, update))
    result: dict[str, Any] = figure(
        f"bytes a round and site, decoder {decoder}, bfloat16, the larger of both ways",
        round(max(down, up) / 1e6, 2),
        "MB",
        target="<= 12.02",
        holds=max(down, up) <= 12.02e6,
        n=1,
        note=f"down {down / 1e6:.3f} MB, up {up / 1e6:.3f} MB",
    )
    return result


def _arithmetic(decoder: Decoder) -> tuple[float, dict[str, Any]]:
    """FLOP of one scan's gradients, discriminators on."""
    started = clock()
    net, adversary, scan = _networks(decoder)
    row_of_d2 = torch.tensor([48], device="meta")
    with FlopCounterMode(display=False) as both:
        recon = net.decode(net.pre_quantise(net.encoder(scan)))
        torch.autograd.backward(l1_loss(recon, scan))
        torch.autograd.backward(adversary.judge(scan, recon, row_of_d2).own)
    # What the generator gets from the discriminators: through the same graph, without their own gradients.
    adversary.requires_grad_(False)
    judgement = adversary.judge(scan, recon, row_of_d2)
    with FlopCounterMode(display=False) as pull:
        torch.autograd.backward(judgement.adversarial + judgement.matching)
    flop = float(both.get_total_flops() + pull.get_total_flops())
    figure_of_it: dict[str, Any] = figure(
        f"arithmetic of a training step, 96x256x256, decoder {decoder}, with discriminators",
        round(flop / 1e12, 2),
        "TFLOP",
        target="<= 47, the published loop's" if decoder == "tats" else None,
        holds=flop < 47e12 if decoder == "tats" else None,
        n=1,
        seconds=clock() - started,
        note="one scan, without the perceptual network (0.1 TFLOP a slice); counted on shapes",
    )
    return flop, figure_of_it


def _memory(decoder: Decoder, *, recompute: bool, target: float) -> dict[str, Any]:
    """Bytes at the end of the forward pass: what is kept for the gradient, and parameters with their copies."""
    started = clock()
    net, adversary, scan = _networks(decoder)
    set_recompute(net, recompute)
    again: list[int] = []
    with _kept() as kept, _block_inputs(net, kept, again):
        recon = net.decode(net.pre_quantise(net.encoder(scan)))
        judgement = adversary.judge(scan, recon, torch.tensor([48], device="meta"))
    networks: tuple[nn.Module, ...] = (net, adversary)
    own = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
    values = sum(t.untyped_storage().nbytes() // 4 for key, t in kept.items() if key not in own)
    parameters = sum(p.numel() for network in networks for p in network.parameters())
    # While a block is computed again, all that it keeps comes on top.
    total = (2 * (values + (max(again) if recompute else 0)) + BYTES_A_PARAMETER * parameters) / GIB
    del judgement, recon  # their graphs held the storages
    row: dict[str, Any] = figure(
        f"memory of a training step, 96x256x256, decoder {decoder}, bf16, memory: {'low' if recompute else 'auto'}",
        round(total, 2),
        "GiB",
        target=f"<= {target}",
        holds=total <= target,
        n=1,
        seconds=clock() - started,
        note="kept activations in 16 bits, discriminators' too, with parameters, gradients and moments; counted on "
        "shapes, without the workspace of convolutions",
    )
    return row


@contextmanager
def _kept() -> Iterator[dict[int, Tensor]]:
    """Tensors that autograd keeps, by storage."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


@contextmanager
def _block_inputs(net: nn.Module, kept: dict[int, Tensor], again: list[int]) -> Iterator[None]:
    """Count what checkpoints keep, which no hook sees: each block's input; and what a block needs when repeated."""

    def note(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(block, ResBlock3d) and block.recompute:
            (x,) = inputs
            kept[x.untyped_storage()._cdata] = x
            again.append(_of_one_block(block, x))

    handles = [m.register_forward_pre_hook(note) for m in net.modules() if isinstance(m, ResBlock3d)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_one_block(block: ResBlock3d, x: Tensor) -> int:
    """Values that the block keeps beyond its input when nothing is left out."""
    with _kept() as inside:
        out = block._block(x.detach().requires_grad_())
    own = {p.untyped_storage()._cdata for p in block.parameters()} | {x.untyped_storage()._cdata}
    values = sum(t.untyped_storage().nbytes() // 4 for key, t in inside.items() if key not in own)
    del out
    return values


def _roofline(card: str, decoder: Decoder, flop: float) -> dict[str, Any]:
    seconds = flop / (SHARE * PEAK_TFLOPS[card] * 1e12)
    target = TARGETS[card]
    row: dict[str, Any] = figure(
        f"time of a training step at {SHARE:.0%} of the bf16 peak, {card}, decoder {decoder}",
        round(seconds, 3),
        "s",
        target=f"<= {target}",
        holds=None,
        n=1,
        note=f"an estimate from the arithmetic and the data sheet, {PEAK_TFLOPS[card]:.0f} TFLOP/s; not a measurement",
    )
    return row


def _gpu_rows(flop: dict[str, float]) -> list[dict[str, Any]]:
    """Time, memory, TFLOP/s and share of the peak of the trainer's own step on the GPU that is here."""
    name = torch.cuda.get_device_name(0)
    card = next((c for c in PEAK_TFLOPS if c in name), "")
    rows = []
    for decoder, compiled, memory in (("tats", "always", "auto"), ("half", "always", "auto"), ("tats", "never", "low")):
        started = clock()
        hardware = Hardware(compile=compiled, memory=memory)  # type: ignore[arg-type]
        torch.cuda.reset_peak_memory_stats()
        step = _step_on("cuda", decoder, hardware)  # type: ignore[arg-type]
        times = [_seconds(step) for _ in range(3 + 7)][3:]
        low, middle, high = quartiles(times)
        rate = flop[decoder] / middle / 1e12
        share = f", {rate / PEAK_TFLOPS[card]:.0%} of the bf16 peak" if card else ""
        gib = torch.cuda.max_memory_allocated() / GIB
        target = TARGETS.get(card)
        rows.append(
            figure(
                f"training step, 96x256x256, bf16, {name}, decoder {decoder}, compile: {compiled}, memory: {memory}",
                round(middle, 4),
                "s",
                target=f"<= {target}" if target else None,
                holds=high <= target if target else None,
                n=len(times),
                spread=(round(low, 4), round(high, 4)),
                seconds=clock() - started,
                note=f"{rate:.0f} TFLOP/s{share}; peak memory {gib:.1f} GiB",
            )
        )
    return rows


def _on_cpu(flop: float) -> dict[str, Any]:
    """One whole volume through the trainer's own step on one CPU thread: that it fits, and in what memory."""
    started = clock()
    step = _step_on("cpu", "half", Hardware())
    before = time.process_time()
    step()
    seconds = time.process_time() - before
    gib = peak_bytes() / GIB
    row: dict[str, Any] = figure(
        "training step, 96x256x256, decoder half, bf16 where there is, one CPU thread",
        round(seconds, 1),
        "CPU s",
        n=1,
        seconds=clock() - started,
        note=f"{flop / seconds / 1e9:.0f} GFLOP/s; largest memory of the process {gib:.1f} GiB, all libraries included",
    )
    return row


def _step_on(
    device: str, decoder: Decoder, hardware: Hardware, size: tuple[int, int, int] = SIZE
) -> Callable[[], None]:
    """The gradients of one random scan, as in training."""
    spec = ModelSpec(size=size, decoder=decoder)
    plan = Plan(
        name="cost",
        profile_sha256="0" * 64,
        model=spec,
        gan=GanSpec(start_step=0),
        vqgan=VqganTraining(accumulate=1, precision="bf16"),
    )
    trainer = VqganTrainer(plan, device=device, seed=0, hardware=hardware)
    codes = torch.randn(spec.n_codes, spec.code_dim, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(spec.n_codes, dtype=torch.float64)
    load_codebook(trainer.model, CodebookState(codes, ones, codes.double()))
    trainer.model.train()
    adversary, _ = trainer._wake_adversary()
    scans = MemoryScans([torch.rand(1, *size)])

    def step() -> None:
        draws = trainer._draws(scans, 0)
        trainer.step.accumulate(scans, draws, adversary, at_once=1, on_group=lambda _: None)
        trainer._apply_gradients(adversary, [])
        trainer._zero_gradients()

    return step


def _seconds(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    before = clock()
    step()
    torch.cuda.synchronize()
    return clock() - before  # type: ignore[no-any-return]


def _without_gpu() -> list[dict[str, Any]]:
    return [
        figure(f"training step, 96x256x256, bf16, {card}", None, "s", target=f"<= {target}", note="needs that GPU")
        for card, target in TARGETS.items()
    ]


if __name__ == "__main__":
    main()
