"""Sites for tests: a guard with its facts in memory, and a real site folder with a few tiny prepared patients."""

from __future__ import annotations

import atexit
import functools
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fourdvq.config import canonical_json
from fourdvq.data.prepared import write_table
from fourdvq.data.volume import write_nifti
from fourdvq.federation.codebook import CodebookState
from fourdvq.models.latent_ode import LatentODE
from fourdvq.models.vqgan import load_codebook, load_generator, tokenizer_sha256
from fourdvq.plan import FederationSpec, GanSpec, ModelSpec, Plan, TemporalSpec, VqganTraining
from fourdvq.preprocessing.profile import profile_from
from fourdvq.tensors import payload_sha256
from fourdvq.training.seeds import seeded
from fourdvq.training.vqgan import initial_model, initial_weights
from fourdvq.wire.flower import pack, unpack
from fourdvq.wire.messages import (
    PROTOCOL,
    PlanTask,
    Refusal,
    Reply,
    ReplyEnvelope,
    Task,
    TaskEnvelope,
    VqganTask,
    VqganUpdate,
    reply_types,
)
from fourdvq_client import embedded
from fourdvq_client.accepted import AcceptedRounds
from fourdvq_client.app import answer
from fourdvq_client.audit import AuditLog
from fourdvq_client.code_identity import Installed
from fourdvq_client.guard import Guard
from fourdvq_client.policy import LoadedPolicy, parse_policy
from fourdvq_client.released import store_release
from fourdvq_client.runtime import Site, open_site, store_plan
from fourdvq_client.workspace import open_workspace, read_profile
from synthetic_lungs import chest

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ROOT / "site_templates"
COHORT, PROFILE = "c0" * 32, "ab" * 32
INSTALLED = (Installed("fourdvq", "1.0.0", "1" * 64), Installed("fourdvq_client", "1.0.0", "2" * 64))
IDS = ("LEU-004217", "Vandenberghe^Marie")

SMALL = Plan(
    name="small",
    profile_sha256=PROFILE,
    model=ModelSpec(size=(8, 8, 8), base_width=4, n_codes=8, code_dim=2),
    gan=GanSpec(start_step=4, width=4, layers=1),
    temporal=TemporalSpec(hidden=4, dynamics_width=4),
    federation=FederationSpec(rounds=3, local_steps=4, ode_rounds=2, ode_local_steps=4, wire_dtype="float32"),
)


def template(name: str) -> str:
    return (TEMPLATES / name / "policy.yaml").read_text(encoding="utf-8")


def policy_text(**changes: str) -> str:
    """The demo policy with the small plan approved; `changes` replace the value of a key wherever it stands."""
    entry = f'\n  - {{plan: "{SMALL.hash}", cohort: "{COHORT}", by: test, "on": "2026-01-01"}}'
    text = template("demo").replace("allowed_plans: []", f"allowed_plans:{entry}")
    for key, value in changes.items():
        line = f"{key}: {value} ".replace("\\", r"\\")
        text, count = re.subn(rf"^(\s*){key}:[^\n#]*", rf"\g<1>{line}", text, flags=re.M)
        assert count == 1, key
    return text


class MemoryFacts:
    """The guard's facts, each of which a test can change."""

    def __init__(self, text: str | None = None) -> None:
        self.text = policy_text() if text is None else text
        self.plans = {SMALL.hash: SMALL}
        self.prepared = (COHORT, PROFILE)
        self.code = INSTALLED
        self.opened = 0

    def policy(self) -> LoadedPolicy:
        return LoadedPolicy(parse_policy(self.text), "f" * 64)

    def plan(self, sha256: str) -> Plan | None:
        return self.plans.get(sha256)

    def cohort(self) -> tuple[str, str]:
        return self.prepared

    def installed(self) -> tuple[Installed, ...]:
        return self.code

    def identifiers(self) -> Iterable[str]:
        return IDS


class Door:
    """A guard with a real log and a real record of rounds in `folder`."""

    def __init__(self, folder: Path, text: str | None = None) -> None:
        self.facts = MemoryFacts(text)
        self.audit = AuditLog(folder / "audit.jsonl", "key")
        self.rounds = AcceptedRounds(folder / "state")
        self.guard = Guard("leuven", self.facts, self.audit, self.rounds)

    @property
    def lines(self) -> list[dict]:
        return [json.loads(text) for text in self.audit.path.read_text().splitlines()]


def envelope_of(task: Task, number: int = 1, **changes: object) -> TaskEnvelope:
    weights = getattr(task, "weights", None)
    fields: dict = {
        "protocol": PROTOCOL,
        "run": "run-1",
        "round": number,
        "task_id": secrets.token_hex(16),
        "plan": SMALL.hash,
        "parent": payload_sha256(weights) if weights is not None else "",
        "profile": PROFILE,
        "code": "",
    }
    return TaskEnvelope(**{**fields, **changes})


@functools.cache
def small_weights() -> dict[str, torch.Tensor]:
    return initial_weights(SMALL)


def vqgan_task(**changes: object) -> VqganTask:
    k, c = SMALL.model.n_codes, SMALL.model.code_dim
    rng = np.random.default_rng(0)
    fields: dict = {
        "steps": 4,
        "global_step": 0,
        "discriminator": False,
        "weights": small_weights(),
        "codes": rng.normal(size=(k, c)).astype(np.float32),
        "code_counts": np.ones(k),
        "code_sums": rng.normal(size=(k, c)),
    }
    return VqganTask(**{**fields, **changes})


def vqgan_update(seed: int = 0, scans: int = 8, **changes: object) -> VqganUpdate:
    generator = torch.Generator().manual_seed(seed)
    k, c = SMALL.model.n_codes, SMALL.model.code_dim
    delta = {n: 1e-3 * torch.randn(t.shape, generator=generator) for n, t in small_weights().items()}
    rng = np.random.default_rng(seed)
    fields: dict = {
        "delta": delta,
        "code_counts": rng.random(k) * 10,
        "code_sums": rng.normal(size=(k, c)),
        "scans": scans,
        "losses": {"loss_rec": 0.123456789, "loss_total": 1.5},
    }
    return VqganUpdate(**{**fields, **changes})


def reply_in(records: Any, kind: str) -> tuple[ReplyEnvelope, Reply]:
    """What the coordinator would read: the typed reply, or the refusal."""
    try:
        return unpack(records, ReplyEnvelope, Refusal)
    except Exception:
        return unpack(records, ReplyEnvelope, *reply_types(kind))


# --- a real site ---------------------------------------------------------------------------------------------------

PATIENTS = tuple(f"LEU-00421{k}" for k in range(6))


@functools.cache
def _prepared() -> Path:
    """A site folder with six patients of three scans each, prepared once for all tests of a process."""
    folder = Path(tempfile.mkdtemp(prefix="fourdvq-site-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    hospital(folder / "data")
    new_site(folder / "site", folder / "data")
    # A fixed secret: splits and scan order are the same in every run of the tests.
    (folder / "site" / "private" / "secret").write_bytes(b"k" * 32)
    embedded.preprocess(folder / "site", workers=1, decision="demo")
    return folder / "site"


def tiny_profile() -> dict:
    text = (ROOT / "configs" / "preprocessing" / "tiny.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def hospital(folder: Path, patients: tuple[str, ...] = PATIENTS, scans: int = 3) -> Path:
    """Scans with masks, scans.csv and clinical.csv as a hospital would bring them."""
    rows, clinical = [], []
    for p, name in enumerate(patients):
        for s in range(scans):
            volume, mask = chest((20, 32, 32), seed=p, noise=10 + s)
            path = folder / "scans" / name / f"{s}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_nifti(volume, path)
            write_nifti(mask, path.with_name(f"{s}_lung.nii.gz"))
            rows.append(
                {
                    "patient_id": name,
                    "scan_id": f"s{s}",
                    "path": f"scans/{name}/{s}.nii.gz",
                    "days_from_baseline": 200 * s,
                    "mask": f"scans/{name}/{s}_lung.nii.gz",
                }
            )
        event = "death" if p % 2 else "censored"
        clinical.append(
            {
                "patient_id": name,
                "age": 60 + p,
                "sex": "MF"[p % 2],
                "smoking": "ever",
                "time_days": 900 + p,
                "event": event,
            }
        )
    write_table(folder / "scans.csv", list(rows[0]), rows)
    write_table(folder / "clinical.csv", list(clinical[0]), clinical)
    return folder


def new_site(root: Path, data: Path, **options: object) -> Path:
    tables: dict = {"scans": data, "clinical": data / "clinical.csv", "scans_csv": data / "scans.csv"}
    settings: dict = {"site": "leuven", "role": "train", "profile": tiny_profile()}
    embedded.create_site(root, **{**tables, **settings, **options})
    return root


def prepared_site(root: Path) -> Path:
    """A copy of the prepared site in `root`: a test may do with it what it likes."""
    shutil.copytree(_prepared(), root)
    return root


def tiny_plan(**federation: object) -> Plan:
    """The plan of the prepared site: the smallest networks, a few steps."""
    # Enough steps that three of the four training patients are met for certain.
    rules = {"rounds": 3, "local_steps": 8, "ode_rounds": 2, "ode_local_steps": 16, "wire_dtype": "float32"}
    return Plan(
        name="tiny",
        profile_sha256=profile_from(tiny_profile()).sha256,
        model=ModelSpec(size=(16, 32, 32), base_width=4, n_codes=8, code_dim=2),
        gan=GanSpec(start_step=8, width=4, layers=1),
        vqgan=VqganTraining(accumulate=1, precision="fp32", lr=1e-3),
        temporal=TemporalSpec(hidden=4, dynamics_width=4),
        federation=FederationSpec(**{**rules, **federation}),  # type: ignore[arg-type]
    )


def codebook(seed: int = 0) -> CodebookState:
    """Codes that fit the tiny plan."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(8, 2, generator=generator)
    return CodebookState(codes, torch.ones(8, dtype=torch.float64), codes.double())


def codebook_fields(state: CodebookState) -> dict:
    return {"codes": state.codes.numpy(), "code_counts": state.counts.numpy(), "code_sums": state.sums.numpy()}


def tiny_task(plan: Plan, weights: dict[str, torch.Tensor], state: CodebookState, number: int = 0) -> VqganTask:
    """Round `number` (from 0) of stage 1, as a coordinator asks for it."""
    steps = plan.federation.local_steps
    first = number * steps
    on = first + steps > plan.gan.start_step
    return VqganTask(steps=steps, global_step=first, discriminator=on, weights=weights, **codebook_fields(state))


def ode_weights(plan: Plan) -> dict[str, torch.Tensor]:
    with seeded(plan.seed, "latent_ode"):
        model = LatentODE(plan.temporal, plan.model.code_dim)
    return {n: t.clone() for n, t in model.state_dict().items()}


class Caller:
    """Plays the coordinator for one site: sends tasks with ever higher rounds and reads the replies."""

    def __init__(self, root: Path, plan: Plan, *, worker: str = "inline") -> None:
        self.root = root
        self.plan = plan
        self.number = 0
        self.site: Site = open_site(root, worker=worker)

    def envelope(self, task: Task, **changes: object) -> TaskEnvelope:
        self.number += 1
        plan = {"plan": self.plan.hash, "profile": self.plan.profile_sha256}
        return envelope_of(task, self.number, **{**plan, **changes})

    def ask(self, task: Task, **changes: object) -> Reply:
        records = answer(task.kind, pack(self.envelope(task, **changes), task), self.site)
        return reply_in(records, task.kind)[1]

    def introduce(self) -> None:
        """Send the plan and let a person approve it."""
        profile = canonical_json(profile_from(tiny_profile()))
        self.ask(PlanTask(plan_json=self.plan.to_json(), profile_json=profile))
        embedded.approve(self.root, by="Dr Test")


def give_model(root: Path, plan: Plan | None = None, ode: dict[str, torch.Tensor] | None = None) -> Path:
    """A released model, untrained unless `ode` weights are given, as `query.release` would leave it."""
    workspace, _ = open_workspace(root)
    plan, state = plan or tiny_plan(), codebook()
    store_plan(workspace, plan, read_profile(workspace))
    model = initial_model(plan)
    load_generator(model, initial_weights(plan))
    load_codebook(model, state)
    named = {f"vqgan.{n}": t for n, t in initial_weights(plan).items()}
    named |= {f"ode.{n}": t for n, t in (ode or ode_weights(plan)).items()}
    named |= {f"codebook.{n}": getattr(state, n) for n in ("codes", "counts", "sums")}
    card = {
        "version": "r1", "run": "run-1", "round": 3, "plan_sha256": plan.hash,
        "tokenizer_sha256": tokenizer_sha256(model), "weights_sha256": payload_sha256(named),
    }  # fmt: skip
    store_release(workspace, card, named)
    return root
