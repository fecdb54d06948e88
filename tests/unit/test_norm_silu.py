"""GroupNorm and SiLU in one operation: as torch's two, in value and gradient, in both layouts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fourdvq.models.norm_silu import group_norm_silu

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])


def inputs(dtype: torch.dtype, layout: torch.memory_format) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (3.0 + 2.0 * torch.randn(2, 6, 4, 3, 5, generator=generator)).to(dtype).contiguous(memory_format=layout)
    weight, bias = (torch.randn(6, generator=generator).double() for _ in range(2))
    return [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]


@LAYOUTS
def test_the_gradient_is_that_of_finite_differences(layout):
    values = inputs(torch.float64, layout)
    assert torch.autograd.gradcheck(lambda *v: group_norm_silu(*v, groups=3, eps=1e-6), values)


@LAYOUTS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_it_equals_torch_s_two_operations_in_float64(layout, dtype, tolerance):
    x, weight, bias = inputs(dtype, layout)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    wanted = F.silu(F.group_norm(exact[0], 3, exact[1], exact[2], 1e-6))
    out = group_norm_silu(x, weight.float(), bias.float(), groups=3, eps=1e-6)
    assert out.dtype is dtype
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, (x, weight, bias), towards.to(dtype))
    right = torch.autograd.grad(wanted, exact, towards.to(dtype).double())
    for one, other in zip((out, *found), (wanted, *right), strict=True):
        assert float((one.double() - other).detach().norm() / other.detach().norm()) < tolerance


@LAYOUTS
def test_only_the_input_is_kept_for_the_gradient(layout):
    x, weight, bias = inputs(torch.float64, layout)
    large = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: large.append(t.numel() == x.numel()), lambda t: t):
        group_norm_silu(x, weight, bias, groups=3, eps=1e-6)
    assert sum(large) == 1
