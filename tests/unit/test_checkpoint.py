"""A training state on disk: exact, atomic, and refused when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fourdvq.errors import ModelError
from fourdvq.training.checkpoint import TrainState, load_state, save_state

STATE = TrainState(
    {
        "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "scalar": torch.tensor(7.0),
        "sums": torch.ones(2, dtype=torch.float64) / 3,
        "flag": torch.tensor(True),
        "random": torch.Generator().get_state(),
    },
    {"global_step": 12, "loss": 0.1 + 0.2, "name": "run"},
)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    save_state(tmp_path / "s", STATE)
    back = load_state(tmp_path / "s")
    assert back.meta == STATE.meta
    assert set(back.tensors) == set(STATE.tensors)
    for name, tensor in STATE.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name], tensor)


def test_saving_again_replaces_the_state_and_leaves_nothing_behind(tmp_path):
    save_state(tmp_path, STATE)
    save_state(tmp_path, TrainState({"weight": torch.zeros(1)}, {"global_step": 13}))
    assert load_state(tmp_path).meta == {"global_step": 13}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["no folder", "no tensors", "cut", "flipped", "meta", "not json", "escape"])
def test_a_damaged_state_is_refused(tmp_path, damage):
    save_state(tmp_path, STATE)
    tensors = next(tmp_path.glob("*.safetensors"))
    record = tmp_path / "state.json"
    if damage == "no folder":
        record.unlink()
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "flipped":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif damage == "meta":
        record.write_text(record.read_text().replace('"global_step": 12', '"global_step": 13'))
    elif damage == "not json":
        record.write_text("{")
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"tensors": "../" + tensors.name}))
    with pytest.raises(ModelError, match="E_CHECKPOINT"):
        load_state(tmp_path)


def test_a_process_killed_while_saving_leaves_the_earlier_state(tmp_path):
    save_state(tmp_path, STATE)
    script = """
import os, sys, signal, pathlib, torch
from fourdvq.training import checkpoint
replace = pathlib.Path.replace
def die(self, target):
    if str(target).endswith("state.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
pathlib.Path.replace = die
checkpoint.save_state(pathlib.Path(sys.argv[1]), checkpoint.TrainState({"weight": torch.zeros(9)}, {"global_step": 99}))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -9
    assert load_state(tmp_path).meta == STATE.meta
