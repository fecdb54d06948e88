"""The released bundle: weights, model card, plan and profile in one folder, with the sha256 of each file.

releases/<version>/weights.safetensors   names prefixed vqgan., codebook., ode.
                   model_card.md         for people;  card.json the same facts for programs
                   plan.json profile.json
                   SHA256SUMS            as sha256sum writes and checks it
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fourdvq.data.files import file_sha256, write_atomic
from fourdvq.errors import ModelError
from fourdvq.tensors import payload_sha256
from fourdvq_server.store import load_tensors, read_json, save_tensors, write_json

SUMS = "SHA256SUMS"


def released_weights(
    generator: Mapping[str, Tensor], codebook: Mapping[str, Tensor], ode: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of a release under one flat name each."""
    parts = (("vqgan.", generator), ("codebook.", codebook), ("ode.", ode))
    return {prefix + name: tensor.contiguous() for prefix, part in parts for name, tensor in part.items()}


def write_bundle(
    folder: Path,
    weights: Mapping[str, Tensor],
    card: Mapping[str, Any],
    plan_json: str,
    profile: Mapping[str, Any],
) -> Path:
    """Write the folder completely or not at all; an existing one with the same weights is replaced.

    Raises ModelError E_RELEASE if the version is taken by other weights: a version names one model for good.
    """
    if folder.is_dir():
        taken = read_json(folder / "card.json", {}).get("weights_sha256")
        if taken not in (None, payload_sha256(weights)):
            raise ModelError("E_RELEASE", where=str(folder), found="another model of this version", wanted="a new name")
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_tensors(temporary / "weights.safetensors", weights)
    write_json(temporary / "card.json", card)
    write_atomic(temporary / "model_card.md", model_card(card).encode())
    write_atomic(temporary / "plan.json", plan_json.encode())
    write_json(temporary / "profile.json", profile)
    names = sorted(path.name for path in temporary.iterdir())
    sums = "".join(f"{file_sha256(temporary / name)}  {name}\n" for name in names)
    write_atomic(temporary / SUMS, sums.encode())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def read_bundle(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and card of a release. Raises ModelError E_RELEASE if a file is missing or not what SHA256SUMS says."""
    if not (folder / SUMS).is_file():
        raise ModelError("E_RELEASE", where=str(folder), found=f"no {SUMS}")
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"([0-9a-f]{64})  ([A-Za-z0-9_.-]+)", line)
        if not found or not (folder / found[2]).is_file() or file_sha256(folder / found[2]) != found[1]:
            raise ModelError("E_RELEASE", where=str(folder), found=f"a file that is not as listed: {line[66:]}")
    card: dict[str, Any] = read_json(folder / "card.json", {})
    return load_tensors(folder / "weights.safetensors"), card


def model_card(card: Mapping[str, Any]) -> str:
    """The card as Markdown: what it is, what it was made from, how it was scored, and what it is not for."""
    sites = "\n".join(
        f"| {name} | {s['role']} | {s['patients']} | {s['scans']} |" for name, s in sorted(card["sites"].items())
    )
    tables = "\n\n".join(f"### {group}\n\n```\n{text}\n```" for group, text in card["tables"].items())
    return f"""# 4D-VQ-GAN {card["version"]}

Generates future chest CT from two or more earlier scans of a patient with idiopathic pulmonary fibrosis.
**For research. Not a medical device. Generated scans are synthetic and must not be read as findings.**

| | |
|---|---|
| run | {card["run"]} |
| plan | {card["plan_name"]}, sha256 `{card["plan_sha256"]}` |
| preprocessing profile | sha256 `{card["profile_sha256"]}` |
| tokenizer_sha256 | `{card["tokenizer_sha256"]}` |
| weights | sha256 `{card["weights_sha256"]}` |
| round of stage 1 | {card["round"]} ({card["chosen_by"]}) |
| package | fourdvq {card["package"]}, protocol {card["protocol"]} |

## Sites

Counts are rounded by each site's policy.

| site | role | patients | scans |
|---|---|---|---|
{sites}

## Scores on held-out patients

Means with 95 % t intervals over patients. A model that is not better than copying the last scan is said to be so.

{tables or "No site answered with scores."}

## Use

    fourdvq-client pull --import FOLDER      (checks SHA256SUMS)
    fourdvq-client generate --patient P --interval 1 --years 3

Codes of this model mean the same thing only under this tokenizer_sha256.
"""
