"""Laws of one site with several devices: real processes, gloo between them, the same training as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fourdvq.errors import ConfigError
from fourdvq.training.checkpoint import load_state
from fourdvq.training.distributed import Ranks, processes_for
from fourdvq.training.hardware import Hardware
from fourdvq.training.vqgan import VqganTrainer
from rank_cases import DECAY, STEPS, shared_plan, start, train_alone
from vqgan_cases import Scans, tiny_plan


def trained(folder: Path, world: int, *, judged: bool = False) -> Path:
    """States of one process alone, and of `world` that trained together on the same scans of every step."""
    processes = start(world, folder, judged=judged)
    train_alone(folder / "alone", judged=judged)
    for process in processes:
        process.join(timeout=200)
        assert process.exitcode == 0
    return folder


# As the processes run: the order of a sum depends on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def results(one_thread, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("ranks"), 2)


def assert_same_round(folder: Path) -> None:
    alone, together = (load_state(folder / name / "round") for name in ("alone", "0"))
    assert together.meta["used"] == alone.meta["used"]
    for name, value in alone.meta["losses"].items():
        assert together.meta["losses"][name] == pytest.approx(value, rel=1e-5), name
    for name, tensor in alone.tensors.items():
        if name.startswith("delta."):
            torch.testing.assert_close(together.tensors[name], tensor, rtol=0, atol=2e-5)


def test_two_processes_lose_and_learn_as_one_with_the_same_global_batch(results):
    assert_same_round(results)


@pytest.mark.slow
def test_three_processes_share_the_discriminators_too(tmp_path):
    assert_same_round(trained(tmp_path, 3, judged=True))


def test_codebook_sums_of_a_frozen_step_are_the_same_bits(results):
    # The first step's sums come from equal weights; later ones from weights that differ by the order of addition.
    alone, together = (load_state(results / name / "round").tensors for name in ("alone", "0"))
    assert torch.equal(alone["counts"], together["counts"])
    assert torch.equal(alone["code_patients"], together["code_patients"])
    torch.testing.assert_close(together["sums"], alone["sums"], rtol=1e-6, atol=1e-6)


def test_all_processes_end_in_the_same_state(results):
    one, other = (load_state(results / name) for name in ("0", "1"))
    assert one.meta == other.meta
    assert all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())


def test_one_process_goes_on_from_the_state_of_several(results):
    plan, scans = shared_plan(), Scans(5)
    resumed = []
    for name in ("alone", "0"):
        trainer = VqganTrainer(plan, seed=5)
        trainer.restore(load_state(results / name))
        assert trainer.global_step == STEPS
        resumed.append(trainer.train(scans, steps=1, global_step=STEPS, decay_per_round=DECAY))
    assert resumed[0].losses == pytest.approx(resumed[1].losses, rel=1e-4)


def test_gathered_sums_are_exact_whatever_the_number_of_processes():
    """Rows come back in the order of the items: checked with the arithmetic of three processes in one."""
    rows = torch.arange(14, dtype=torch.float64).view(7, 2) / 3

    class Pretended(Ranks):
        def _call(self, exchange, parts, mine):
            for rank, part in enumerate(parts):
                own = rows[rank :: self.world]
                part.zero_()
                part[: len(own)] = own

    for rank in range(3):
        ranks = Pretended(rank, 3)
        assert torch.equal(ranks.gather(rows[rank::3], 7), rows)


def test_a_process_that_dies_ends_the_others_with_a_code_and_no_hang(tmp_path):
    processes = start(2, tmp_path, dying=0, timeout_s=60.0)
    for process in processes:
        process.join(timeout=100)
    assert processes[0].exitcode == -9
    # Ended: no hang. Under load gloo may abort a process whose peer is gone as it ends; its code is out by then.
    assert processes[1].exitcode is not None
    assert (tmp_path / "1.code").read_text() == "E_PEER"


@pytest.mark.parametrize(
    "plan", [tiny_plan(model={"norm": "batch"}), tiny_plan(federation={"codebook_sync": "local_ema"})]
)
def test_what_moves_scan_by_scan_is_refused_on_several_devices(plan):
    with pytest.raises(ConfigError, match="E_UNSUPPORTED"):
        VqganTrainer(plan, seed=0, ranks=Ranks(0, 2))
    VqganTrainer(plan, seed=0)


def test_the_number_of_processes_is_the_site_s_choice_within_what_is_there():
    assert processes_for(Hardware(), "cpu") == 1
    assert processes_for(Hardware(devices=3), "cpu") == 3
    assert processes_for(Hardware(), "cuda:1") == 1
    with pytest.raises(ConfigError, match=r"train\.devices"):
        processes_for(Hardware(devices=999), "cuda")
    with pytest.raises(ValueError, match="devices"):
        Hardware(devices=0)
