"""The start-up check of 16-bit arithmetic: sound machines pass, a wrong operation is found by name."""

from __future__ import annotations

import logging

import pytest
import torch

from fourdvq.training import precision
from fourdvq.training.precision import OPERATIONS, autocast, check_bf16, self_check


def edge_wrong(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """The convolution that some cuDNN versions gave: right inside, wrong at one face, in 16 bits only."""
    out = OPERATIONS["conv3d"](x, filters)
    if x.dtype is torch.bfloat16:
        out = torch.cat([0.5 * out[:, :, :1], out[:, :, 1:]], dim=2)
    return out


class WrongGradient(torch.autograd.Function):
    """The right values and, in 16 bits, a gradient of zeros."""

    @staticmethod
    def forward(ctx, x, filters):
        ctx.save_for_backward(x, filters)
        return OPERATIONS["conv3d"](x, filters)

    @staticmethod
    def backward(ctx, towards):
        x, filters = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            gradients = torch.autograd.grad(OPERATIONS["conv3d"](x, filters), (x, filters), towards)
        wrong = x.dtype is torch.bfloat16
        return tuple(torch.zeros_like(g) if wrong else g for g in gradients)


def test_this_machine_agrees_with_itself_in_float32():
    pretended = {name: lambda x, w, op=op: op(x.float(), w.float()) for name, op in OPERATIONS.items()}
    found = check_bf16("cpu", pretended)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert found.sound
        assert found.error < 0.01


@pytest.mark.parametrize("quiet", [torch.inference_mode, torch.no_grad])
def test_the_check_finds_the_same_where_its_caller_wants_no_gradients(quiet):
    expected = check_bf16("cpu")
    with quiet():
        assert check_bf16("cpu") == expected


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 instructions")
@pytest.mark.parametrize("wrong", [edge_wrong, WrongGradient.apply], ids=["a face", "the gradient"])
def test_a_wrong_convolution_is_found_by_name(wrong):
    assert check_bf16("cpu").sound
    found = check_bf16("cpu", OPERATIONS | {"strided conv3d": OPERATIONS["strided conv3d"], "conv3d": wrong})
    assert not found.sound
    assert found.worst == "conv3d"


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 instructions")
def test_an_unsound_machine_trains_in_float32_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(precision, "check_bf16", lambda device: check_bf16(device, {"conv3d": edge_wrong}))
    self_check.cache_clear()
    try:
        with caplog.at_level(logging.WARNING), autocast(torch.device("cpu"), "bf16"):
            out = torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
        assert out.dtype is torch.float32
        assert "conv3d differs from float32" in caplog.text
        assert torch.__version__ in caplog.text
    finally:
        self_check.cache_clear()
