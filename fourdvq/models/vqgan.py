"""The generator of the 3D-VQ-GAN: encode, quantise, decode. Source: paper section 2.1, equations 1 and 2.

Network input is x01 - 0.5 with x01 in [0, 1]. Axes: B batch, c code channels, D H W voxels, d h w latent grid, K codes.
What a federation shares are the generator's weights and, apart, the codebook; both load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourdvq.errors import ModelError
from fourdvq.federation.codebook import CodebookState
from fourdvq.models.autoencoder import Decoder3d, Encoder3d
from fourdvq.models.codebook import Codebook
from fourdvq.models.conv3d import fastest_forward
from fourdvq.plan import ModelSpec
from fourdvq.tensors import first_nonfinite, form_difference, payload_sha256

TOKENIZER_PARTS = ("encoder.", "pre_quantise.", "codebook.codes")
# BatchNorm's batch counter steers nothing here and is an integer, which has no mean over sites.
UNSHARED_SUFFIX = "num_batches_tracked"


@dataclass(frozen=True)
class Quantised:
    """Codes for a latent grid: `z_q` equals `embed(indices)` exactly and passes its gradient on to z unchanged."""

    z_q: Tensor  # (B, c, d, h, w) float32
    indices: Tensor  # (B, d, h, w) int64
    commitment: Tensor  # scalar, mean (z - sg z_q)^2; 0 for fsq
    codebook_loss: Tensor  # scalar, mean (sg z - z_q)^2; 0 except for quantiser "loss"


@dataclass(frozen=True)
class VQOutput:
    """One pass through the generator."""

    recon: Tensor  # (B, 1, D, H, W), as the input: about [-0.5, 0.5]
    z: Tensor  # (B, c, d, h, w)
    z_q: Tensor
    indices: Tensor
    commitment: Tensor
    codebook_loss: Tensor


class VQGAN3d(nn.Module):
    """Encoder, 1x1x1 convolution to c channels, codebook, 1x1x1 convolution back, decoder."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.encoder = Encoder3d(spec.base_width, spec.compression, norm=spec.norm, padding=spec.padding)
        self.pre_quantise = nn.Conv3d(self.encoder.width, spec.code_dim, 1)
        self.codebook = Codebook(spec.n_codes, spec.code_dim, spec.quantiser)
        self.post_quantise = nn.Conv3d(spec.code_dim, self.encoder.width, 1)
        self.decoder = Decoder3d(
            spec.base_width, spec.compression, variant=spec.decoder, norm=spec.norm, padding=spec.padding
        )

    def encode(self, x: Tensor) -> Tensor:
        """(B, 1, D, H, W) = x01 - 0.5 -> z (B, c, d, h, w); in (-1, 1) for fsq."""
        z: Tensor = self.pre_quantise(self.encoder(x))
        return torch.tanh(z.float()) if self.spec.quantiser == "fsq" else z

    def quantise(self, z: Tensor) -> Quantised:
        """Nearest code of each latent vector, in float32 whatever the surrounding precision. z (B, c, d, h, w)."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            grid = z.movedim(1, -1)
            indices = self.codebook.nearest(grid.detach().reshape(-1, grid.shape[-1])).view(grid.shape[:-1])
            hard = self.codebook.embed(indices).movedim(-1, 1)
            # z - sg z is exactly 0, so the value is the code itself, bit for bit.
            z_q = hard.detach() + (z - z.detach())
            learnt = self.spec.quantiser == "loss"
            commitment = z.new_zeros(()) if self.spec.quantiser == "fsq" else F.mse_loss(z, hard.detach())
            codebook_loss = F.mse_loss(hard, z.detach()) if learnt else z.new_zeros(())
        return Quantised(z_q, indices, commitment, codebook_loss)

    def decode(self, z_q: Tensor) -> Tensor:
        """(B, c, d, h, w) -> (B, 1, D, H, W), a volume minus 0.5; not clamped."""
        volume: Tensor = self.decoder(self.post_quantise(fastest_forward(z_q)))
        return volume

    def embed(self, indices: Tensor) -> Tensor:
        """Indices (B, d, h, w), any integer type -> z_q (B, c, d, h, w) float32."""
        return self.codebook.embed(indices.long()).movedim(-1, 1)

    def forward(self, x: Tensor) -> VQOutput:
        """(B, 1, D, H, W) = x01 - 0.5 -> reconstruction and codes."""
        z = self.encode(x)
        quantised = self.quantise(z)
        recon = self.decode(quantised.z_q)
        return VQOutput(recon, z, quantised.z_q, quantised.indices, quantised.commitment, quantised.codebook_loss)


def generator_weights(model: VQGAN3d) -> dict[str, Tensor]:
    """Copies, on the CPU, of what sites share and average: all but the codebook, which is merged from sums.

    A codebook learnt by gradient (quantiser "loss") is averaged like any weight and therefore included.
    """
    plain = torch.contiguous_format  # whatever layout this machine computes in
    return {n: t.detach().to("cpu", copy=True, memory_format=plain) for n, t in _shared(model).items()}


def load_generator(model: VQGAN3d, weights: Mapping[str, Tensor]) -> None:
    """Load what `generator_weights` gave.

    ModelError E_WEIGHTS, and no change, on any other name, shape or dtype and on a non-finite value.
    """
    load_strict(_shared(model), weights, what="the generator")


def codebook_state(model: VQGAN3d) -> CodebookState:
    """A copy of codes, counts and sums, on the CPU."""
    book = model.codebook
    return CodebookState(
        codes=book.codes.detach().to("cpu", copy=True),
        counts=book.counts.to("cpu", copy=True),
        sums=book.sums.to("cpu", copy=True),
    )


def load_codebook(model: VQGAN3d, state: CodebookState) -> None:
    """Set the codebook and mark it seeded; ModelError E_WEIGHTS if shapes, dtypes, values or an fsq grid differ."""
    book = model.codebook
    if book.quantiser == "fsq" and not torch.equal(state.codes.to(book.codes.device), book.codes):
        raise ModelError(
            "E_WEIGHTS", where="codebook.codes", found="other codes", wanted="the fixed grid of quantiser fsq"
        )
    load_strict(
        {"codes": book.codes, "counts": book.counts, "sums": book.sums},
        {"codes": state.codes, "counts": state.counts, "sums": state.sums},
        what="the codebook",
    )
    book.is_seeded.fill_(True)


def tokenizer_sha256(model: VQGAN3d) -> str:
    """Hash over encoder, pre-quantisation convolution and codes: code k means one thing only under one such hash."""
    state = model.state_dict()
    return payload_sha256(
        {n: t for n, t in state.items() if n.startswith(TOKENIZER_PARTS) and not n.endswith(UNSHARED_SUFFIX)}
    )


def load_strict(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], *, what: str) -> None:
    """Copy `values` into the tensors of the same names; ModelError E_WEIGHTS, and no change, on any difference."""
    difference = form_difference(values, targets)
    if difference:
        name, found, wanted = difference
        raise ModelError("E_WEIGHTS", where=f"{what}: {name}", found=found, wanted=wanted)
    broken = first_nonfinite(values)
    if broken:
        raise ModelError("E_WEIGHTS", where=f"{what}: {broken}", found="NaN or infinity", wanted="finite values")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])


def _shared(model: VQGAN3d) -> dict[str, Tensor]:
    kept = {n: t for n, t in model.state_dict().items() if not n.endswith(UNSHARED_SUFFIX)}
    learnt = model.spec.quantiser == "loss"
    return {n: t for n, t in kept.items() if not n.startswith("codebook.") or (learnt and n == "codebook.codes")}
