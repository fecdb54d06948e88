"""The global model between rounds, as tensors of the run folder: weights, codebook, server optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fourdvq.federation.codebook import CodebookState
from fourdvq.models.vqgan import VQGAN3d, load_codebook, load_generator
from fourdvq.plan import Plan
from fourdvq.tensors import Weights, payload_sha256
from fourdvq.training.vqgan import DISCRIMINATOR_PREFIX, initial_model
from fourdvq_server.store import Round

_OPTIMIZER = "optimizer."
_CARRY = "carry."


@dataclass(frozen=True)
class GlobalModel:
    """Stage 1 after a round. `dead_for` (K,) int64: rounds each code has been dead; `optimizer` is the server's own.

    `weights` are what all sites have, rounded to the wire's dtype; `carry` is what rounding them left, which the next
    round's change is added to as well, so that small changes add up.
    """

    weights: dict[str, Tensor]
    codebook: CodebookState
    dead_for: Tensor
    optimizer: dict[str, Tensor]
    carry: dict[str, Tensor] = field(default_factory=dict)

    @property
    def generator(self) -> dict[str, Tensor]:
        """The weights without shared discriminators: what encodes, decodes and is released."""
        return {n: t for n, t in self.weights.items() if not n.startswith(DISCRIMINATOR_PREFIX)}

    @property
    def sha256(self) -> str:
        """Identity of the generator with its codes."""
        return model_sha256(self.generator, self.codebook.codes)

    def tensors(self) -> dict[str, Weights]:
        """Two named sets for `StageStore.write_round`."""
        state = {f"codebook.{n}": getattr(self.codebook, n) for n in ("codes", "counts", "sums")}
        state["dead_for"] = self.dead_for
        state |= {_OPTIMIZER + name: tensor for name, tensor in self.optimizer.items()}
        state |= {_CARRY + name: tensor for name, tensor in self.carry.items()}
        return {"weights": self.weights, "server_state": state}

    def codebook_fields(self) -> dict[str, Any]:
        """The codebook as the array fields that tasks carry."""
        return {
            "codes": self.codebook.codes.numpy(),
            "code_counts": self.codebook.counts.numpy(),
            "code_sums": self.codebook.sums.numpy(),
        }

    def build(self, plan: Plan) -> VQGAN3d:
        """The generator with its codebook, in evaluation mode. Raises ModelError E_WEIGHTS if it does not fit."""
        model = initial_model(plan)
        load_generator(model, self.generator)
        load_codebook(model, self.codebook)
        return model.eval()


def from_round(record: Round) -> GlobalModel:
    """The inverse of `GlobalModel.tensors`."""
    state: Mapping[str, Tensor] = record.tensors["server_state"]
    return GlobalModel(
        weights=dict(record.tensors["weights"]),
        codebook=CodebookState(*(state[f"codebook.{n}"] for n in ("codes", "counts", "sums"))),
        dead_for=state["dead_for"],
        optimizer=_below(_OPTIMIZER, state),
        carry=_below(_CARRY, state),
    )


def with_codebook(weights: Mapping[str, Tensor], carry: Mapping[str, Tensor], codebook: CodebookState) -> GlobalModel:
    """A model before its first round; codes learnt by gradient also stand among the weights."""
    own = dict(weights)
    if "codebook.codes" in own:
        own["codebook.codes"] = codebook.codes.clone()
    return GlobalModel(own, codebook, torch.zeros(len(codebook.codes), dtype=torch.int64), {}, dict(carry))


def model_sha256(generator: Weights, codes: Tensor) -> str:
    """Payload sha256 of generator weights and codes together."""
    return payload_sha256({**generator, "codebook.codes": codes})


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
