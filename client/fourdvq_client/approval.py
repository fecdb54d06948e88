"""A person's decision about a plan: what it says, how it differs from the last approved one, and the entry of a yes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fourdvq.config import to_plain
from fourdvq.errors import ConfigError, Refused
from fourdvq.plan import Plan, plan_from
from fourdvq_client.audit import AuditLog, Entry
from fourdvq_client.policy import add_approval, load_policy
from fourdvq_client.runtime import Facts, site_fingerprint
from fourdvq_client.workspace import Workspace

LATEST = "latest"


@dataclass(frozen=True)
class Difference:
    """One setting: dotted key, what the last approved plan says, what this one says."""

    key: str
    before: Any
    after: Any


def find_plan(workspace: Workspace, wanted: str) -> Plan:
    """A plan by file, by hash (8 digits or more) or `latest`. Raises ConfigError E_FILE or E_VALUE."""
    folder = workspace.plans
    if wanted == LATEST:
        pointer = folder / LATEST
        if not pointer.is_file():
            raise ConfigError("E_FILE", where=str(folder), found="no plan", wanted="a plan sent by the coordinator")
        return _read(folder / f"{pointer.read_text(encoding='utf-8').strip()}.json")
    if Path(wanted).is_file():
        return _read(Path(wanted))
    found = [p for p in folder.glob("*.json") if p.name.startswith(wanted) and ".profile." not in p.name]
    if len(wanted) < 8 or len(found) != 1:
        raise ConfigError(
            "E_VALUE", where="plan", found=wanted, wanted="a plan file, at least 8 digits of its hash, or --latest"
        )
    return _read(found[0])


def last_approved(workspace: Workspace) -> Plan | None:
    """The plan approved last that is still known here."""
    facts = Facts(workspace)
    for approval in reversed(facts.policy().rules.allowed_plans):
        plan = facts.plan(approval.plan)
        if plan is not None:
            return plan
    return None


def differences(before: Plan | None, after: Plan) -> list[Difference]:
    """Every setting of `after` that `before` has not, or has otherwise; all settings if there is no plan before."""
    old = dict(_flat(to_plain(before))) if before is not None else {}
    new = dict(_flat(to_plain(after)))
    return [Difference(key, old.get(key), value) for key, value in sorted(new.items()) if old.get(key) != value]


def approve(workspace: Workspace, plan: Plan, *, by: str, today: str = "") -> str:
    """Write the approval into policy.yaml and a line into the log; returns the plan's hash.

    Raises CohortError E_NO_APPROVED without approved scans, Refused PROFILE_MISMATCH if they were prepared under
    another profile, and what `add_approval` raises.
    """
    policy = load_policy(workspace.policy_yaml)
    cohort, profile = Facts(workspace).cohort()
    if profile != plan.profile_sha256:
        raise Refused("PROFILE_MISMATCH", where="prep/", found=profile[:12], wanted=plan.profile_sha256[:12])
    existing = policy.rules.approval(plan.hash)
    if existing is not None and existing.cohort == cohort:
        return plan.hash
    add_approval(workspace.policy_yaml, plan.hash, cohort, by, today or datetime.now(UTC).date().isoformat())
    audit = AuditLog(workspace.audit_file, site_fingerprint(workspace))
    audit.append(
        Entry("approve", plan=plan.hash, decision="approved", policy=load_policy(workspace.policy_yaml).sha256)
    )
    return plan.hash


def _read(path: Path) -> Plan:
    try:
        return plan_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError("E_TYPE", where=str(path), found=type(error).__name__, wanted="a plan") from None


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item
