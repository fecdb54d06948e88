"""The stage 1 loop: what a round reports, when discriminators exist, what a broken scan leaves behind."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fourdvq.errors import CohortError, ModelError
from fourdvq.metrics import psnr
from fourdvq.models.vqgan import codebook_state
from fourdvq.perceptual import PerceptualLoss
from fourdvq.training.codebook_init import kmeans_stats
from fourdvq.training.hardware import Hardware
from fourdvq.training.sampling import EpochSampler
from fourdvq.training.seeds import generator, seeded
from fourdvq.training.vqgan import DISCRIMINATOR_PREFIX, VqganTrainer, initial_model, initial_weights
from vqgan_cases import SMALL_GAN, Scans, first_codebook, ready_trainer, tiny_plan

DECAY = 0.37


def test_training_reconstructs_better_than_before():
    scans = Scans(4)
    trainer = ready_trainer(tiny_plan(lr=3e-3), scans)

    def quality() -> float:
        with torch.no_grad():
            return psnr((trainer.model(scans[0][None] - 0.5).recon + 0.5).clamp(0, 1), scans[0][None])

    before = quality()
    first = trainer.train(scans, steps=10, global_step=0, decay_per_round=DECAY)
    last = trainer.train(scans, steps=30, global_step=10, decay_per_round=DECAY)
    assert quality() > before + 3.0
    assert last.losses["loss_rec"] < first.losses["loss_rec"]


def test_a_round_counts_the_scans_and_patients_that_it_really_used():
    scans = Scans(6)
    reply = ready_trainer(tiny_plan(accumulate=2), scans).train(scans, steps=1, global_step=0, decay_per_round=DECAY)
    assert reply.scans_used == 2
    assert 1 <= reply.patients_used <= 2
    reply = ready_trainer(tiny_plan(accumulate=2), scans).train(scans, steps=5, global_step=0, decay_per_round=DECAY)
    assert (reply.scans_used, reply.patients_used) == (6, 3)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_code_counts_the_patients_it_was_seen_in_not_the_scans(micro_batch):
    plan, scans = tiny_plan(accumulate=3, lr=1e-12), Scans(6)
    trainer = VqganTrainer(plan, seed=0, hardware=Hardware(micro_batch=micro_batch))
    trainer.load_global(trainer.weights(), first_codebook(plan, scans))
    seen: dict[str, set[int]] = {}
    with torch.no_grad():
        for i in range(6):
            indices = trainer.model(scans[i][None] - 0.5).indices
            seen.setdefault(scans.patient_of(i), set()).update(indices.flatten().tolist())
    reply = trainer.train(scans, steps=2, global_step=0, decay_per_round=DECAY)
    assert reply.code_patients.tolist() == [sum(k in codes for codes in seen.values()) for k in range(16)]


def test_every_scan_comes_once_an_epoch_and_in_another_order_the_next():
    sampler = EpochSampler(generator(0, "test"))
    epochs = [[sampler.next(20) for _ in range(20)] for _ in range(2)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_steps_are_numbered_over_the_whole_experiment():
    scans, seen = Scans(2), []
    trainer = ready_trainer(tiny_plan(), scans)
    trainer.train(scans, steps=3, global_step=40, decay_per_round=DECAY, on_step=lambda step, _: seen.append(step))
    assert seen == [40, 41, 42]
    assert trainer.global_step == 43


def test_discriminators_do_not_exist_before_their_start():
    scans, seen = Scans(2), []
    trainer = ready_trainer(tiny_plan(gan=replace(SMALL_GAN, start_step=2)), scans)
    trainer.train(scans, steps=2, global_step=0, decay_per_round=DECAY, on_step=lambda _, losses: seen.append(losses))
    assert trainer.adversary is None
    assert not any("loss_discriminator" in losses for losses in seen)
    trainer.train(scans, steps=1, global_step=2, decay_per_round=DECAY, on_step=lambda _, losses: seen.append(losses))
    assert {"loss_discriminator", "loss_adversarial", "loss_matching"} <= set(seen[-1])


def test_local_discriminators_never_leave_and_shared_ones_do():
    scans = Scans(2)
    for where in ("local", "shared"):
        plan = tiny_plan(gan=replace(SMALL_GAN, discriminators=where))
        trainer = ready_trainer(plan, scans)
        reply = trainer.train(scans, steps=1, global_step=0, decay_per_round=DECAY)
        assert set(reply.delta) == set(initial_weights(plan))
        assert any(name.startswith(DISCRIMINATOR_PREFIX) for name in reply.delta) is (where == "shared")
        if where == "shared":
            changed = {n: t + 1 for n, t in trainer.weights().items()}
            trainer.load_global(changed, codebook_state(trainer.model))
            assert all(torch.equal(t, changed[n]) for n, t in trainer.weights().items())


@pytest.mark.parametrize("gan", ["hinge", "log", "adaptive"])
def test_every_adversarial_loss_trains_both_sides(gan):
    scans = Scans(2)
    spec = replace(SMALL_GAN, loss="hinge" if gan == "adaptive" else gan, adaptive_weight=gan == "adaptive")
    trainer = ready_trainer(tiny_plan(gan=spec), scans)
    trainer.train(scans, steps=1, global_step=0, decay_per_round=DECAY)
    assert trainer.adversary is not None
    before = {n: t.clone() for n, t in trainer.adversary.state_dict().items()}
    reply = trainer.train(scans, steps=1, global_step=1, decay_per_round=DECAY)
    assert any(not torch.equal(t, before[n]) for n, t in trainer.adversary.state_dict().items())
    assert all(bool(t.abs().sum() > 0) for n, t in reply.delta.items() if "conv.weight" in n)


class OneBroken(Scans):
    """The last scan holds a NaN."""

    def __getitem__(self, index: int) -> torch.Tensor:
        volume = super().__getitem__(index)
        return volume * math.nan if index == len(self) - 1 else volume


class AllBroken(Scans):
    """Nothing but NaN."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index) * math.nan


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_step_whose_loss_is_not_finite_is_left_out_as_if_it_had_not_been(norm):
    plan = tiny_plan(model={"norm": norm})
    trainer, states = ready_trainer(plan, Scans(4)), {}

    def remember(step: int, _losses: object) -> None:
        states[step] = trainer.state().tensors

    reply = trainer.train(OneBroken(4), steps=4, global_step=0, decay_per_round=DECAY, on_step=remember)
    assert len(states) == 3
    assert (reply.scans_used, reply.notes) == (3, ("W_SKIPPED",))
    assert all(math.isfinite(v) for v in reply.losses.values())
    # What follows the step that was left out starts from what was before it.
    whole = ready_trainer(plan, Scans(4))
    whole.sampler.order = torch.tensor([i for i in order_of(trainer) if i != 3])
    whole.train(Scans(3), steps=3, global_step=0, decay_per_round=DECAY)
    learnt = {n: t for n, t in whole.state().tensors.items() if n.startswith(("model.", "adam."))}
    now = trainer.state().tensors
    assert all(torch.equal(t, now[n]) for n, t in learnt.items())


def order_of(trainer: VqganTrainer) -> list[int]:
    """The scans of the trainer's epoch, in the order drawn."""
    return [int(i) for i in trainer.sampler.order]


def test_three_broken_steps_in_a_row_end_the_round_with_a_code_and_the_last_good_weights():
    plan, seen = tiny_plan(), []
    trainer = ready_trainer(plan, Scans(4))
    trainer.train(Scans(4), steps=2, global_step=0, decay_per_round=DECAY)
    good = trainer.state().tensors
    with pytest.raises(ModelError, match=r"E_NONFINITE.*steps 2 to 4"):
        trainer.train(
            AllBroken(4), steps=8, global_step=2, decay_per_round=DECAY, on_step=lambda step, _: seen.append(step)
        )
    assert not seen
    now = trainer.state().tensors
    assert all(torch.equal(t, now[n]) for n, t in good.items() if n.startswith(("model.", "adam.")))
    trainer.train(Scans(4), steps=1, global_step=5, decay_per_round=DECAY)


def test_a_round_without_one_good_step_gives_no_update():
    trainer = ready_trainer(tiny_plan(), Scans(4))
    with pytest.raises(ModelError, match="every step"):
        trainer.train(AllBroken(4), steps=1, global_step=0, decay_per_round=DECAY)


def test_a_scan_of_another_size_than_the_plan_s_is_refused():
    trainer = ready_trainer(tiny_plan(), Scans(1))
    with pytest.raises(CohortError, match="E_PROFILE"):
        trainer.train(Scans(2, size=(16, 32, 16)), steps=1, global_step=0, decay_per_round=DECAY)


def test_a_federated_site_never_seeds_its_own_codebook_and_a_lone_site_does():
    scans, plan = Scans(2), tiny_plan()
    with pytest.raises(ModelError, match="never set"):
        VqganTrainer(plan, seed=0).train(scans, steps=1, global_step=0, decay_per_round=DECAY)
    alone = VqganTrainer(plan, seed=0, single_site=True)
    alone.train(scans, steps=1, global_step=0, decay_per_round=DECAY)
    assert bool(alone.model.codebook.is_seeded)


def test_without_scans_there_is_no_round():
    trainer = ready_trainer(tiny_plan(), Scans(1))
    with pytest.raises(CohortError, match="E_FEW"):
        trainer.train(Scans(0), steps=1, global_step=0, decay_per_round=DECAY)


def test_the_proximal_term_keeps_a_site_nearer_to_the_global_model():
    scans, sizes = Scans(3), []
    for mu in (0.0, 50.0):
        trainer = ready_trainer(tiny_plan(federation={"proximal_mu": mu}), scans)
        reply = trainer.train(scans, steps=6, global_step=0, decay_per_round=DECAY)
        sizes.append(math.sqrt(sum(float(t.square().sum()) for t in reply.delta.values())))
    assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.parametrize(("quantiser", "code_dim"), [("loss", 4), ("fsq", 3)])
def test_the_other_quantisers_train_and_report_their_usage(quantiser, code_dim):
    scans = Scans(2)
    plan = tiny_plan(model={"quantiser": quantiser, "code_dim": code_dim, "n_codes": 32})
    trainer = VqganTrainer(plan, seed=0)
    book = first_codebook(plan, scans) if quantiser == "loss" else codebook_state(trainer.model)
    trainer.load_global(trainer.weights(), book)
    reply = trainer.train(scans, steps=2, global_step=0, decay_per_round=DECAY)
    assert float(reply.stats.counts.sum()) == pytest.approx(256)
    assert ("codebook.codes" in reply.delta) is (quantiser == "loss")


def test_bfloat16_training_stays_near_float32():
    scans = Scans(2)
    losses = [
        ready_trainer(tiny_plan(precision=p), scans)
        .train(scans, steps=2, global_step=0, decay_per_round=DECAY)
        .losses["loss_rec"]
        for p in ("fp32", "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_perceptual_file_is_needed_where_the_plan_asks_for_it_and_adds_a_loss(tmp_path):
    path = tmp_path / "vgg.safetensors"
    with seeded(0, "vgg"):
        save_file(PerceptualLoss().state_dict(), path)
    plan = tiny_plan(perceptual="vgg_lpips", perceptual_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ModelError, match="no file"):
        VqganTrainer(plan, seed=0)
    scans = Scans(1)
    trainer = VqganTrainer(plan, seed=0, perceptual_file=path)
    trainer.load_global(trainer.weights(), first_codebook(plan, scans))
    reply = trainer.train(scans, steps=1, global_step=0, decay_per_round=DECAY)
    assert reply.losses["loss_perceptual"] > 0


def test_a_state_of_another_plan_is_refused():
    trainer = ready_trainer(tiny_plan(), Scans(1))
    with pytest.raises(ModelError, match="another plan"):
        VqganTrainer(tiny_plan(lr=5e-4), seed=0).restore(trainer.state())


def test_global_weights_that_do_not_fit_are_refused():
    trainer = ready_trainer(tiny_plan(), Scans(1))
    weights = trainer.weights()
    with pytest.raises(ModelError, match="E_WEIGHTS"):
        trainer.load_global(weights | {"discriminators.x": torch.zeros(1)}, codebook_state(trainer.model))


def test_kmeans_sums_are_per_scan_and_light_centroids_stay_at_home():
    scans, plan = Scans(3), tiny_plan()
    model = initial_model(plan)
    every = kmeans_stats(model, scans, n_codes=16, seed=0, min_vectors=1)
    assert float(every.counts.sum()) == pytest.approx(256)
    heavy = kmeans_stats(model, scans, n_codes=16, seed=0, min_vectors=50)
    assert bool(((heavy.counts == 0) | (heavy.counts * 3 >= 50)).all())
    assert bool((heavy.sums[heavy.counts == 0] == 0).all())
    again = kmeans_stats(model, scans, n_codes=16, seed=0, min_vectors=50)
    assert torch.equal(again.sums, heavy.sums)
