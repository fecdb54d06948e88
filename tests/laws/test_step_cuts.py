"""Laws of how a step is cut: scans at once, blocks computed again, compiled code change nothing but time and memory."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from fourdvq.errors import ModelError
from fourdvq.models.vqgan import VQGAN3d, VQOutput
from fourdvq.training.hardware import Hardware
from fourdvq.training.memory import Fit, is_out_of_memory
from fourdvq.training.vqgan import VqganTrainer
from vqgan_cases import NO_GAN, SMALL_GAN, Scans, first_codebook, ready_trainer, tiny_plan

DECAY = 0.37
GANS = pytest.mark.parametrize("gan", [NO_GAN, SMALL_GAN], ids=["no gan", "gan"])


def trained(plan, scans, hardware, *, steps=1, break_model=None):
    """A trainer with one round done, and the round; `break_model` may alter the trainer first."""
    trainer = VqganTrainer(plan, seed=5, hardware=hardware)
    trainer.load_global(trainer.weights(), first_codebook(plan, scans))
    if break_model:
        break_model(trainer)
    return trainer, trainer.train(scans, steps=steps, global_step=0, decay_per_round=DECAY)


def assert_same_round(one, other, *, atol):
    (trainer, reply), (trainer2, reply2) = one, other
    for name, tensor in reply.delta.items():
        torch.testing.assert_close(reply2.delta[name], tensor, rtol=0, atol=atol)
    assert torch.equal(reply.stats.counts, reply2.stats.counts)
    torch.testing.assert_close(reply2.stats.sums, reply.stats.sums, rtol=1e-6, atol=1e-5)
    assert torch.equal(reply.code_patients, reply2.code_patients)
    for name, value in reply.losses.items():
        assert reply2.losses[name] == pytest.approx(value, rel=1e-5), name
    assert torch.equal(trainer.random.get_state(), trainer2.random.get_state())
    assert torch.equal(trainer.sampler.generator.get_state(), trainer2.sampler.generator.get_state())


def gradients(plan, scans, hardware):
    """All gradients of one step, generator and discriminators."""
    trainer = VqganTrainer(plan, seed=5, hardware=hardware)
    trainer.load_global(trainer.weights(), first_codebook(plan, scans))
    trainer.model.train()
    adversary = trainer._wake_adversary()[0] if plan.gan.loss != "none" else None
    draws = trainer._draws(scans, 0)
    trainer.step.accumulate(scans, draws, adversary, at_once=trainer.fit.at_once, on_group=lambda _: None)
    networks = [trainer.model] if adversary is None else [trainer.model, adversary]
    return [p.grad for network in networks for p in network.parameters()]


@GANS
@pytest.mark.parametrize(
    "hardware",
    [Hardware(micro_batch=2), Hardware(micro_batch=3), Hardware(memory="low"), Hardware(layout="channels_last")],
)
def test_the_gradient_of_a_step_is_the_same_however_it_is_cut(gan, hardware):
    plan, scans = tiny_plan(gan=gan, accumulate=3), Scans(4)
    whole, cut = gradients(plan, scans, Hardware()), gradients(plan, scans, hardware)
    size = torch.cat([g.flatten() for g in whole]).abs().max()
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(size))


def test_blocks_that_are_computed_again_give_the_same_round_and_random_streams():
    plan, scans = tiny_plan(accumulate=2), Scans(3)
    rounds = [trained(plan, scans, Hardware(memory=memory)) for memory in ("auto", "low")]
    assert_same_round(*rounds, atol=1e-5)


def test_blocks_that_are_computed_again_keep_fewer_tensors():
    sizes = []
    for memory in ("auto", "low"):
        trainer = VqganTrainer(tiny_plan(), seed=0, hardware=Hardware(memory=memory))
        kept: list[int] = []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.model(torch.zeros(1, 1, 16, 32, 32))
        sizes.append(sum(kept))
    assert sizes[1] < 0.7 * sizes[0]


class NeedsRoom:
    """Raises as a full device does while more than one scan goes through, or while blocks keep what they need."""

    def __init__(self, *, always: bool = False) -> None:
        self.always = always
        self.failed = 0

    def __call__(self, trainer: VqganTrainer) -> None:
        def full(module: VQGAN3d, inputs: tuple[torch.Tensor, ...], output: VQOutput) -> None:
            if self.always or len(inputs[0]) > 1 or trainer.fit != Fit(1, True):
                self.failed += 1
                raise torch.OutOfMemoryError("CUDA out of memory")

        trainer.model.register_forward_hook(full)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_memory_that_runs_out_once_costs_a_retry_and_changes_nothing(micro_batch):
    plan, scans = tiny_plan(accumulate=2), Scans(3)
    roomy = trained(plan, scans, Hardware(), steps=2)
    device = NeedsRoom()
    tight = trained(plan, scans, Hardware(micro_batch=micro_batch), steps=2, break_model=device)
    assert device.failed == 1
    assert tight[1].notes == ("W_MEMORY",)
    assert_same_round(roomy, tight, atol=1e-5)


def test_memory_that_never_suffices_ends_in_a_code_with_the_last_good_state():
    plan, scans = tiny_plan(), Scans(3)
    trainer = ready_trainer(plan, scans)
    trainer.train(scans, steps=1, global_step=0, decay_per_round=DECAY)
    before = trainer.state().tensors
    device = NeedsRoom(always=True)
    device(trainer)
    with pytest.raises(ModelError, match="OUT_OF_MEMORY"):
        trainer.train(scans, steps=1, global_step=1, decay_per_round=DECAY)
    assert device.failed == 2
    now = trainer.state().tensors
    assert all(torch.equal(t, now[n]) for n, t in before.items() if n.startswith(("model.", "adam.")))


def test_a_cpu_that_cannot_allocate_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    "plan",
    [
        tiny_plan(model={"norm": "batch"}),
        tiny_plan(federation={"codebook_sync": "local_ema"}),
        tiny_plan(gan=replace(SMALL_GAN, adaptive_weight=True)),
    ],
    ids=["batch norm", "drifting codes", "adaptive weight"],
)
def test_scans_go_through_one_by_one_where_the_group_would_matter(plan):
    assert VqganTrainer(plan, seed=0, hardware=Hardware(micro_batch=4)).fit.at_once == 1


def test_a_crop_depends_on_seed_and_step_alone_and_trains():
    plan, scans = tiny_plan(accumulate=2, crop=(8, 16, 16)), Scans(3)
    _, reply = trained(plan, scans, Hardware(), steps=3)
    assert float(reply.stats.counts.sum()) == pytest.approx(2 * 4 * 4)
    late = VqganTrainer(plan, seed=5)
    late.load_global(late.weights(), first_codebook(plan, scans))
    corners = [[d.corner for d in late._draws(scans, step)] for step in (2, 0, 1)]
    early = VqganTrainer(plan, seed=5)
    early.load_global(early.weights(), first_codebook(plan, scans))
    assert corners == [[d.corner for d in early._draws(scans, step)] for step in (2, 0, 1)]
    assert len({corner for step in corners for corner in step}) > 3
    other = VqganTrainer(plan, seed=6)
    other.load_global(other.weights(), first_codebook(plan, scans))
    assert corners[0] != [d.corner for d in other._draws(scans, 2)]
    size = plan.model.size
    assert all(
        0 <= c <= s - k
        for step in corners
        for corner in step
        for c, s, k in zip(corner, size, (8, 16, 16), strict=True)
    )


@pytest.mark.parametrize("crop", [(8, 16, 64), (6, 16, 16)])
def test_a_crop_that_leaves_the_volume_or_the_code_grid_is_refused(crop):
    with pytest.raises(ValueError, match="crop"):
        tiny_plan(crop=crop)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_equals_plain_training():
    plan, scans = tiny_plan(accumulate=2), Scans(3)
    rounds = [trained(plan, scans, Hardware(compile=mode), steps=2) for mode in ("never", "always")]
    assert rounds[1][0].step.forward._compiled is not None
    assert_same_round(*rounds, atol=1e-4)


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog):
    plan, scans = tiny_plan(), Scans(2)

    def no_compiler(*_: object, **__: object) -> object:
        def broken(_x: torch.Tensor) -> object:
            raise RuntimeError("no C++ compiler")

        return broken

    monkeypatch.setattr(torch, "compile", no_compiler)
    rounds = [trained(plan, scans, Hardware(compile=mode)) for mode in ("never", "always")]
    assert_same_round(*rounds, atol=0)
    assert "without it" in caplog.text
