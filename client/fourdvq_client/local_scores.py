"""A model scored on this site's own test patients: nothing of it leaves unless a person submits the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from fourdvq.data.datasets import ScanDataset, load_lung, open_prepared
from fourdvq.data.files import write_atomic
from fourdvq.errors import CohortError
from fourdvq.evaluation.reconstruction import score_reconstruction
from fourdvq.evaluation.summary import RowSums
from fourdvq.evaluation.trajectory import longitudinal, score_trajectories
from fourdvq.tensors import Weights, payload_sha256
from fourdvq_client.released import Released, world_model
from fourdvq_client.workspace import SiteConfig, Workspace


@dataclass(frozen=True)
class LocalScores:
    """Sums over the patients of one split, for one model and one cohort."""

    weights_sha256: str
    cohort_sha256: str
    split: str
    sums: tuple[RowSums, ...]


def keep_part(workspace: Workspace, run: str, mode: str, model_sha256: str, sums: Sequence[RowSums]) -> None:
    """Keep what the site computed for the coordinator on its test patients, before any rounding, for its own report."""
    plain = {
        "model_sha256": model_sha256,
        "cohort_sha256": open_prepared(workspace.prep).cohort_sha256,
        "sums": [asdict(one) for one in sums],
    }
    write_atomic(_part(workspace, run, mode), (json.dumps(plain) + "\n").encode())


def join_parts(workspace: Workspace, release: Released) -> LocalScores | None:
    """The scores of a released model from the parts kept in its run; None unless all are of this model and cohort."""
    cohort = open_prepared(workspace.prep).cohort_sha256
    ode = payload_sha256(_part_of(release.weights, "ode."))
    tokenizer = _part_of(release.weights, "vqgan.") | {"codebook.codes": release.weights["codebook.codes"]}
    wanted = {"reconstruction": payload_sha256(tokenizer)}
    wanted |= {str(mode): ode for mode in release.plan.evaluation.modes}
    sums: list[RowSums] = []
    for mode, model in wanted.items():
        path = _part(workspace, str(release.card["run"]), mode)
        plain = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if (plain.get("model_sha256"), plain.get("cohort_sha256")) != (model, cohort):
            return None
        sums += [RowSums(**row) for row in plain["sums"]]
    scores = LocalScores(str(release.card["weights_sha256"]), cohort, "test", tuple(sums))
    _write(workspace, release, scores)
    return scores


def score_locally(workspace: Workspace, config: SiteConfig, release: Released, split: str = "test") -> LocalScores:
    """Score reconstructions and trajectories of one split and keep the sums beside the model's reports.

    Raises CohortError E_PROFILE if the scans were prepared under another profile, E_FEW if the split is empty.
    """
    cohort = open_prepared(workspace.prep)
    if cohort.profile_sha256 != release.plan.profile_sha256:
        raise CohortError("E_PROFILE", where="prep/", found=cohort.profile_sha256[:12], wanted="the model's profile")
    scans = cohort.scans(split)
    if not scans:
        raise CohortError("E_FEW", where=f"split {split}", found="no approved scan", wanted="one or more")
    window = release.plan.window_hu
    world = world_model(release, config.device)
    data = ScanDataset(scans, window)
    sums = score_reconstruction(world.vqgan, data, lung_of=lambda i: load_lung(scans[i]), window_hu=window)
    sums += score_trajectories(world, [longitudinal(p, window) for p in cohort.of(split)], release.plan)
    scores = LocalScores(str(release.card["weights_sha256"]), cohort.cohort_sha256, split, tuple(sums))
    _write(workspace, release, scores)
    return scores


def load_scores(workspace: Workspace, release: Released) -> LocalScores | None:
    """The kept scores of a model, or None if there are none, or the cohort is another one now."""
    path = _path(workspace, release)
    if not path.is_file():
        return None
    plain = json.loads(path.read_text(encoding="utf-8"))
    sums = tuple(RowSums(**row) for row in plain["sums"])
    scores = LocalScores(plain["weights_sha256"], plain["cohort_sha256"], plain["split"], sums)
    current = open_prepared(workspace.prep).cohort_sha256
    same = scores.weights_sha256 == release.card["weights_sha256"] and scores.cohort_sha256 == current
    return scores if same else None


def _write(workspace: Workspace, release: Released, scores: LocalScores) -> None:
    write_atomic(_path(workspace, release), (json.dumps(asdict(scores), indent=1) + "\n").encode())


def _part(workspace: Workspace, run: str, mode: str) -> Path:
    return workspace.runs / run / "scores" / f"{mode}.json"


def _part_of(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _path(workspace: Workspace, release: Released) -> Path:
    return workspace.reports / "scores" / f"{release.card['version']}.json"
