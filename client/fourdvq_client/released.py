"""Released models at the site: models/<version>/ as the coordinator's bundle, each file with its sha256.

weights.safetensors   names prefixed vqgan., codebook., ode.
card.json             facts of the model      plan.json   the plan it was trained under
SHA256SUMS            as sha256sum writes and checks it
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from fourdvq.data.files import file_sha256, write_atomic
from fourdvq.errors import ModelError, WireError
from fourdvq.plan import Plan, plan_from
from fourdvq.tensors import payload_sha256
from fourdvq.wire.forms import Form
from fourdvq_client.workspace import Workspace

if TYPE_CHECKING:
    from fourdvq.generation import WorldModel

SUMS = "SHA256SUMS"
LATEST = "latest"
_VERSION = Form("model version", r"[a-z0-9][a-z0-9.-]{0,63}", 64)
_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_.-]+)")
_FILES = frozenset({"weights.safetensors", "card.json", "plan.json", "model_card.md", "profile.json"})


@dataclass(frozen=True)
class Released:
    """A released model that was checked: its folder, facts, plan and weights."""

    folder: Path
    card: Mapping[str, Any]
    plan: Plan
    weights: Mapping[str, Tensor]


def store_release(workspace: Workspace, card: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Keep a release that came over the wire; returns its payload sha256. ModelError E_RELEASE if card and weights
    differ, or the plan it names never came here."""
    found = payload_sha256(weights)
    if card.get("weights_sha256") != found:
        raise _bad(Path("the release"), "weights of another sha256 than its card says")
    plan_file = workspace.plans / f"{card.get('plan_sha256', '')}.json"
    if not plan_file.is_file():
        raise _bad(plan_file, "a plan that was never sent to this site")
    files = {
        "weights.safetensors": save_tensors({n: t.contiguous() for n, t in weights.items()}),
        "card.json": (json.dumps(card, indent=1, sort_keys=True) + "\n").encode(),
        "plan.json": plan_file.read_bytes(),
    }
    _install(workspace, _version(card), files)
    return found


def import_release(workspace: Workspace, bundle: Path) -> Released:
    """Copy a bundle folder (or the folder that holds a given file of it) into models/, after checking every file."""
    source = bundle if bundle.is_dir() else bundle.parent
    release = read_release(source)
    files = {p.name: p.read_bytes() for p in source.iterdir() if p.name in _FILES}
    return read_release(_install(workspace, _version(release.card), files))


def open_release(workspace: Workspace, version: str = "") -> Released:
    """A model by its version; without one the last that arrived. ModelError E_RELEASE if there is none."""
    if not version:
        pointer = workspace.models / LATEST
        version = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    if not version or not (workspace.models / version).is_dir():
        known = sorted(p.name for p in workspace.models.glob("*") if p.is_dir())
        raise ModelError(
            "E_RELEASE",
            where=str(workspace.models),
            found=version or "no model",
            wanted=", ".join(known) or "a release",
        )
    return read_release(workspace.models / version)


def read_release(folder: Path) -> Released:
    """Read a bundle. ModelError E_RELEASE if a file is missing, is not what SHA256SUMS says, or the parts differ."""
    if not (folder / SUMS).is_file():
        raise _bad(folder, f"no {SUMS}")
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        stated = _SUM_LINE.fullmatch(line)
        if not stated or not (folder / stated[2]).is_file() or file_sha256(folder / stated[2]) != stated[1]:
            raise _bad(folder, f"a file that is not as listed: {line[66:] or line[:20]}")
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        plan = plan_from(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
        weights = load_file(folder / "weights.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise _bad(folder, type(error).__name__) from None
    if card.get("weights_sha256") != payload_sha256(weights) or card.get("plan_sha256") != plan.hash:
        raise _bad(folder, "weights or plan of another sha256 than the card says")
    return Released(folder, card, plan, weights)


def world_model(release: Released, device: str = "cpu") -> WorldModel:
    """The networks of a release, ready to generate. ModelError E_TOKENIZER or E_WEIGHTS if they do not fit."""
    from fourdvq.federation.codebook import CodebookState
    from fourdvq.generation import WorldModel, check_world
    from fourdvq.models.latent_ode import LatentODE
    from fourdvq.models.vqgan import VQGAN3d, load_codebook, load_generator, load_strict

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in release.weights.items() if n.startswith(prefix)}

    codes = part("codebook.")
    vqgan = VQGAN3d(release.plan.model)
    load_generator(vqgan, part("vqgan."))
    load_codebook(vqgan, CodebookState(codes["codes"], codes["counts"], codes["sums"]))
    ode = LatentODE(release.plan.temporal, release.plan.model.code_dim)
    load_strict(ode.state_dict(), part("ode."), what="the latent ODE")
    world = WorldModel(vqgan.to(device).eval(), ode.to(device).eval(), str(release.card["tokenizer_sha256"]))
    check_world(world)
    return world


def _install(workspace: Workspace, version: str, files: Mapping[str, bytes]) -> Path:
    """Write the folder under a temporary name, then rename it; `latest` points to it afterwards."""
    folder = workspace.models / version
    temporary = workspace.models / f".{version}.new"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, data in files.items():
        write_atomic(temporary / name, data)
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items()))
    write_atomic(temporary / SUMS, sums.encode())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    write_atomic(workspace.models / LATEST, version.encode())
    return folder


def _version(card: Mapping[str, Any]) -> str:
    version = str(card.get("version", ""))
    try:
        _VERSION.check(version, "version")
    except WireError as error:
        raise _bad(Path("card.json"), error.found) from None
    return version


def _bad(path: Path, found: str) -> ModelError:
    return ModelError("E_RELEASE", where=str(path), found=found, wanted="a complete bundle")
