"""Adam's moments as named tensors, so that they fit into a safetensors checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from fourdvq.errors import ModelError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def pack_adam(prefix: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies named `<prefix>.<parameter number>.<moment>`, on the CPU; empty before the first step."""
    state = optimiser.state_dict()["state"]
    return {
        f"{prefix}.{number}.{key}": moments[key].detach().cpu().clone()
        for number, moments in state.items()
        for key in MOMENTS
    }


def unpack_adam(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse; names here are `<parameter number>.<moment>`. ModelError E_WEIGHTS if shapes do not fit."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        fits = number.isdigit() and int(number) < len(parameters) and key in MOMENTS
        if fits and key != "step":
            fits = tensor.shape == parameters[int(number)].shape
        if not fits:
            raise ModelError("E_WEIGHTS", where=f"optimiser state {name}", found=str(tuple(tensor.shape)))
        state.setdefault(int(number), {})[key] = tensor.clone()
    if any(set(moments) != set(MOMENTS) for moments in state.values()):
        raise ModelError("E_WEIGHTS", where="optimiser state", found="a missing moment", wanted=", ".join(MOMENTS))
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
