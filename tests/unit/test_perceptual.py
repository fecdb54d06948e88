"""The perceptual distance and the refusal of any weight file that is not the plan's."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from fourdvq.errors import ModelError
from fourdvq.perceptual import SCALE, SHIFT, PerceptualLoss, load_perceptual, perceptual_tensors
from fourdvq.training.seeds import seeded

# torchvision's VGG16: "M" is a pooling; LPIPS reads after the last ReLU of each block
LAYERS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]


@pytest.fixture(scope="module")
def loss() -> PerceptualLoss:
    with seeded(0, "vgg"):
        net = PerceptualLoss()
    with torch.no_grad():
        for head in net.heads:
            head.copy_(torch.rand(head.shape, generator=torch.Generator().manual_seed(1)))
    return net


def slices(seed: int) -> torch.Tensor:
    return torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) - 0.5


def reference(net: PerceptualLoss, a: torch.Tensor, b: torch.Tensor) -> float:
    """LPIPS written from its formula in float64, layer by layer in torchvision's numbering."""
    state = {name: t.double() for name, t in net.state_dict().items()}
    shift, scale = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (SHIFT, SCALE))
    features = [(2 * v.double().repeat(1, 3, 1, 1) - shift) / scale for v in (a, b)]
    total, number, block = 0.0, 0, 0
    for i, layer in enumerate(LAYERS):
        if layer == "M":
            features = [F.max_pool2d(f, 2) for f in features]
            number += 1
            continue
        weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
        features = [F.relu(F.conv2d(f, weight, bias, padding=1)) for f in features]
        number += 2
        if i + 1 == len(LAYERS) or LAYERS[i + 1] == "M":
            one, other = (f / f.norm(dim=1, keepdim=True) for f in features)
            total += float(((one - other) ** 2 * state[f"heads.{block}"].view(1, -1, 1, 1)).sum(1).mean())
            block += 1
    return total


def test_the_distance_equals_lpips_written_out_in_float64(loss):
    a, b = slices(0), slices(1)
    assert float(loss(a, b)) == pytest.approx(reference(loss, a, b), rel=1e-3)
    assert float(loss(a, a)) == 0.0


def test_it_has_the_13_convolutions_and_5_heads_of_vgg16(loss):
    assert sum(p.numel() for p in loss.parameters()) == 14_714_688 + 1_472


def test_the_gradient_reaches_the_reconstruction_and_no_weight(loss):
    recon = slices(0).requires_grad_()
    loss(recon, slices(1)).backward()
    assert recon.grad is not None
    assert recon.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.parameters())


def test_a_file_with_the_plan_s_hash_loads(loss, tmp_path):
    path = tmp_path / "vgg.safetensors"
    save_file(loss.state_dict(), path)
    loaded = load_perceptual(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert float(loaded(slices(0), slices(1))) == float(loss(slices(0), slices(1)))


@pytest.mark.parametrize("case", ["no path", "no file", "another hash", "not safetensors", "other tensors"])
def test_any_other_file_is_refused(case, tmp_path):
    path = tmp_path / "vgg.safetensors"
    if case == "other tensors":
        save_file({"features.0.weight": torch.zeros(1)}, path)
    elif case != "no file":
        path.write_bytes(b"not a tensor file")
    sha256 = "0" * 64 if case == "another hash" or not path.exists() else hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match="E_WEIGHTS"):
        load_perceptual(None if case == "no path" else path, sha256)


def test_published_key_names_are_mapped_and_a_missing_head_is_refused(loss):
    state = loss.state_dict()
    vgg = {name: t for name, t in state.items() if name.startswith("features")} | {"classifier.0.weight": torch.ones(1)}
    heads = {f"lin{k}.model.1.weight": state[f"heads.{k}"].view(1, -1, 1, 1) for k in range(5)}
    mapped = perceptual_tensors(vgg, heads)
    assert set(mapped) == set(state)
    assert all(torch.equal(mapped[name], state[name]) for name in state)
    del heads["lin3.model.1.weight"]
    with pytest.raises(ModelError, match=r"heads\.3"):
        perceptual_tensors(vgg, heads)
