"""One running site: its folder, policy, log, guard and worker, and the facts of it that the guard asks for."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fourdvq.errors import Refused
from fourdvq.plan import Plan, plan_from
from fourdvq.preprocessing.profile import Profile
from fourdvq.training.checkpoint import write_atomic
from fourdvq_client.accepted import AcceptedRounds
from fourdvq_client.audit import AuditLog, Entry
from fourdvq_client.code_identity import Installed, check_code, installed_code
from fourdvq_client.cox_desk import CoxDesk
from fourdvq_client.guard import Guard
from fourdvq_client.policy import LoadedPolicy, load_policy
from fourdvq_client.site_secret import real_ids
from fourdvq_client.survival_table import SurvivalTables
from fourdvq_client.worker import Worker, make_worker
from fourdvq_client.workspace import SiteConfig, Workspace, open_workspace


@dataclass
class Site:
    """What the handlers work with."""

    workspace: Workspace
    config: SiteConfig
    facts: Facts
    audit: AuditLog
    rounds: AcceptedRounds
    guard: Guard
    worker: Worker
    cox: CoxDesk

    def seed(self, plan: Plan) -> int:
        """The site's own seed under a plan: keyed with its secret, so nobody outside can repeat its draws."""
        secret = self.workspace.secret.read_bytes()
        digest = hmac.new(secret, b"training:" + plan.hash.encode(), hashlib.sha256).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def close(self) -> None:
        """End the worker; what it had finished is on disk."""
        self.worker.close()


class Facts:
    """The guard's view of the site, read from its files each time: a person may change them while we wait."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._plans: dict[str, Plan] = {}

    def policy(self) -> LoadedPolicy:
        return load_policy(self._workspace.policy_yaml)

    def plan(self, sha256: str) -> Plan | None:
        path = self._workspace.plans / f"{sha256}.json"
        if sha256 not in self._plans and path.is_file():
            plan = plan_from(json.loads(path.read_text(encoding="utf-8")))
            if plan.hash != sha256:
                raise Refused("PLAN_MISMATCH", where=str(path), found="a plan of another hash")
            self._plans[sha256] = plan
        return self._plans.get(sha256)

    def cohort(self) -> tuple[str, str]:
        from fourdvq.data.datasets import open_prepared

        cohort = open_prepared(self._workspace.prep)
        return cohort.cohort_sha256, cohort.profile_sha256

    def installed(self) -> tuple[Installed, ...]:
        return installed_code()

    def identifiers(self) -> Iterable[str]:
        return [name for names in real_ids(self._workspace).items() for name in names]


def open_site(root: Path, *, worker: str | None = None) -> Site:
    """Open the site in `root`; the policy must be sound and name the same site and code that is allowed to run.

    Raises ConfigError for site.yaml, Refused for policy.yaml, the code or the audit log.
    """
    workspace, config = open_workspace(root)
    facts = Facts(workspace)
    policy = facts.policy()
    if policy.rules.site != config.site:
        raise Refused(
            "E_POLICY", where="policy.yaml: site", found=policy.rules.site, wanted=f"{config.site}, as in site.yaml"
        )
    audit = AuditLog(workspace.audit_file, site_fingerprint(workspace))
    try:
        check_code(policy.rules, facts.installed())
    except Refused as error:
        audit.append(Entry("refuse", kind="start", decision=error.code, rule=error.where, policy=policy.sha256))
        raise
    rounds = AcceptedRounds(workspace.state)
    guard = Guard(config.site, facts, audit, rounds)
    return Site(
        workspace,
        config,
        facts,
        audit,
        rounds,
        guard,
        worker=make_worker(worker or config.worker, workspace, config.device, config.train),
        cox=CoxDesk(workspace, config.site, SurvivalTables(workspace, config.site).table),
    )


def site_fingerprint(workspace: Workspace) -> str:
    """What the audit chain begins with: the first key's fingerprint, kept apart because keys are changed over time."""
    path = workspace.state / "fingerprint"
    if not path.is_file():
        raise Refused(
            "E_KEY_FILE", where=str(path), found="no file", fix="restore state/ from a backup, or run `init` again"
        )
    return path.read_text(encoding="utf-8").strip()


def store_plan(workspace: Workspace, plan: Plan, profile: Profile) -> None:
    """Keep a plan and its profile under their hashes; a person then decides with `approve`."""
    from fourdvq.preprocessing.profile import profile_to_plain

    workspace.plans.mkdir(parents=True, exist_ok=True)
    write_atomic(workspace.plans / f"{profile.sha256}.profile.json", _json(profile_to_plain(profile)))
    path = workspace.plans / f"{plan.hash}.json"
    if not path.is_file():
        write_atomic(path, plan.to_json().encode())
    write_atomic(workspace.plans / "latest", plan.hash.encode())


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
