"""Foreign weight files: only with the right hash, only named tensors, never code."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourdvq.errors import ModelError
from fourdvq.weights_import import import_weights

TENSORS = OrderedDict(a=torch.arange(6.0).view(2, 3).t(), b=torch.ones(1))


class Hostile:
    """A pickle that makes a folder when it is read by a careless reader."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [TENSORS, {"state_dict": TENSORS, "epoch": 3}], ids=["plain", "wrapped"])
def test_named_tensors_become_safetensors(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    digest = import_weights(tmp_path / "w.pth", tmp_path / "w.safetensors", sha256=sha256(tmp_path / "w.pth"))
    assert digest == sha256(tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")
    assert set(loaded) == {"a", "b"}
    assert all(torch.equal(loaded[n], TENSORS[n]) for n in TENSORS)


def test_a_hostile_pickle_runs_nothing_and_writes_nothing(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"a": Hostile(trace)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="E_WEIGHTS"):
        import_weights(tmp_path / "w.pth", tmp_path / "w.safetensors", sha256=sha256(tmp_path / "w.pth"))
    assert not trace.exists()
    assert not (tmp_path / "w.safetensors").exists()


def test_a_missing_file_or_another_hash_is_refused_before_reading(tmp_path):
    with pytest.raises(ModelError, match="no file"):
        import_weights(tmp_path / "w.pth", tmp_path / "w.safetensors", sha256="0" * 64)
    torch.save(TENSORS, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="sha256"):
        import_weights(tmp_path / "w.pth", tmp_path / "w.safetensors", sha256="0" * 64)
